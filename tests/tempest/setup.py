#!/usr/bin/python3
"""setup.py STATE: remove the network and the accounts again, which others would find in the way.
setup.py STATE IMAGES WORK [accounts]: make what Tempest needs in the cloud of STATE (images from the folder IMAGES,
two flavors, a network that every project may use) and write WORK/tempest.conf and WORK/isolated.conf, with accounts
also those and WORK/accounts.conf. May be repeated."""
import configparser
import json
import os
import secrets
import sys

HOST = 'http://127.0.0.1'
# name, file, container format, the kind of instance it becomes
IMAGES = (('tempest-machine', 'tempest-machine.tar.gz', 'bare'),
          ('tempest-application', 'tempest-application.tar', 'docker'))
NETWORK = 'tempest'
# Each worker takes up to three users and one administrator at a time.
ACCOUNT = 'tempest-account-'
USERS, ADMINS = 12, 4
FLAVORS = ('tempest', 1, 64, 1), ('tempest-alt', 1, 96, 1)


def connect(password):
    import openstack
    return openstack.connect(auth_url=HOST + ':5000/v3', username='admin', password=password, project_name='admin',
                             user_domain_name='Default', project_domain_name='Default', region_name='RegionOne')


def image(c, folder, name, file, container):
    """The image of that name with that content; an older one is replaced."""
    path = os.path.join(folder, file)
    size = os.stat(path).st_size
    for i in c.image.images(name=name):
        if i.status == 'active' and i.size == size and i.properties.get('made') == str(int(os.stat(path).st_mtime)):
            return i.id
        c.image.delete_image(i)
    with open(path, 'rb') as f:
        return c.image.create_image(name=name, container_format=container, disk_format='raw', visibility='public',
                                    data=f.read(), made=str(int(os.stat(path).st_mtime))).id


def network(n, public):
    """A shared network with a router. Tempest could make one for each of its hundreds of projects, but Neutron takes
    half a minute for each; the scenarios make their own all the same."""
    net = n.find_network(NETWORK) or n.create_network(name=NETWORK, is_shared=True)
    sub = n.find_subnet(NETWORK) or n.create_subnet(name=NETWORK, network_id=net.id, ip_version=4, cidr='10.99.0.0/22')
    r = n.find_router(NETWORK) or n.create_router(name=NETWORK, external_gateway_info={'network_id': public})
    if not any(p.network_id == net.id for p in n.ports(device_id=r.id)):
        n.add_interface_to_router(r.id, subnet_id=sub.id)


def remove(n):
    r, net = n.find_router(NETWORK), n.find_network(NETWORK)
    if r:
        for p in n.ports(device_id=r.id, device_owner='network:router_interface'):
            n.remove_interface_from_router(r.id, port_id=p.id)
        n.delete_router(r)
    if net:
        n.delete_network(net)


def accounts(c):
    """Projects with one user each, as Tempest's accounts file names them."""
    forget(c)
    out = []
    for n in range(USERS + ADMINS):
        name, password, role = ACCOUNT + str(n), secrets.token_hex(16), 'member' if n < USERS else 'admin'
        project = c.identity.create_project(name=name, domain_id='default')
        user = c.identity.create_user(name=name, password=password, domain_id='default')
        c.identity.assign_project_role_to_user(project, user, c.identity.find_role(role))
        out.append({'username': name, 'password': password, 'project_name': name, 'user_domain_name': 'Default',
                    'project_domain_name': 'Default', 'roles': [role, 'reader'] if n < USERS else [role],
                    'types': [] if n < USERS else ['admin']})
    return out


def forget(c):
    for user in c.identity.users():
        if user.name.startswith(ACCOUNT):
            c.identity.delete_user(user)
    for project in c.identity.projects():
        if project.name.startswith(ACCOUNT):
            for group in c.network.security_groups(project_id=project.id):
                c.network.delete_security_group(group)
            c.identity.delete_project(project)


def main(state, folder=None, work=None, made=None):
    with open(os.path.join(state, 'etc', 'password')) as f:
        password = f.read().strip()
    c = connect(password)
    if not folder:
        remove(c.network)
        forget(c)
        return
    have = {f.name: f.id for f in c.compute.flavors()}
    flavors = [have.get(n) or c.compute.create_flavor(name=n, vcpus=v, ram=r, disk=d).id for n, v, r, d in FLAVORS]
    images = [image(c, folder, *i) for i in IMAGES]
    public = c.network.find_network('public').id
    network(c.network, public)
    extensions = sorted(e.alias for e in c.network.extensions())

    conf = configparser.RawConfigParser()
    conf.read_dict({
        'DEFAULT': {'log_file': os.path.join(work, 'tempest.log')},
        'oslo_concurrency': {'lock_path': os.path.join(work, 'lock')},
        'auth': {'admin_username': 'admin', 'admin_password': password, 'admin_project_name': 'admin',
                 'admin_domain_name': 'Default', 'use_dynamic_credentials': 'true',
                 'create_isolated_networks': 'false'},
        'identity': {'uri_v3': HOST + ':5000/v3', 'auth_version': 'v3', 'region': 'RegionOne', 'v3_endpoint_type': 'public'},
        'identity-feature-enabled': {'api_v2': 'false'},
        'service_available': {'nova': 'true', 'glance': 'true', 'neutron': 'true', 'keystone': 'true', 'cinder': 'false',
                              'swift': 'false', 'horizon': 'true'},
        'compute': {'image_ref': images[0], 'image_ref_alt': images[1], 'flavor_ref': flavors[0], 'flavor_ref_alt': flavors[1],
                    'min_microversion': '2.1', 'max_microversion': 'latest', 'hypervisor_type': 'novalet',
                    'fixed_network_name': NETWORK},
        'compute-feature-enabled': {
            # What the agent does.
            'console_output': 'true', 'pause': 'true', 'suspend': 'true', 'disk_config': 'true', 'snapshot': 'true',
            'enable_instance_password': 'true', 'metadata_service': 'true', 'interface_attach': 'true', 'shelve': 'true',
            'rescue': 'true', 'hostname_fqdn_sanitization': 'true', 'serial_console': 'true', 'personality': 'true',
            'change_password': 'true',
            # What needs a move to another host, a volume, or a virtual machine.
            'resize': 'false', 'cold_migration': 'false', 'shelve_migrate': 'false', 'live_migration': 'false',
            'config_drive': 'false', 'attach_encrypted_volume': 'false', 'vnc_console': 'false', 'spice_console': 'false',
            'ide_bus': 'false', 'stable_rescue': 'false', 'volume_multiattach': 'false', 'swap_volume': 'false'},
        'placement': {'min_microversion': '1.0', 'max_microversion': 'latest'},
        'image': {'container_formats': 'bare,docker', 'disk_formats': 'raw,qcow2'},
        'network': {'public_network_id': public, 'floating_network_name': 'public'},
        'network-feature-enabled': {'ipv6': 'true', 'port_security': 'true', 'api_extensions': ','.join(extensions)},
        'dashboard': {'dashboard_url': HOST + ':8080/'},
        'validation': {'run_validation': 'true', 'connect_method': 'floating', 'auth_method': 'keypair',
                       'image_ssh_user': 'root', 'image_alt_ssh_user': 'root', 'ssh_key_type': 'ecdsa',
                       'ping_timeout': '180', 'ssh_timeout': '300'},
    })
    write(conf, work, 'tempest.conf')
    if made:
        # Else a third of a whole run would go into making and removing three for each class of tests.
        conf['auth']['use_dynamic_credentials'] = 'false'
        conf['auth']['test_accounts_file'] = os.path.join(work, 'accounts.yaml')
        with private(conf['auth']['test_accounts_file']) as f:
            json.dump(accounts(c), f)   # which is YAML, too
        write(conf, work, 'accounts.conf')
        del conf['auth']['test_accounts_file']
        conf['auth']['use_dynamic_credentials'] = 'true'
    # For the few tests that ask for addresses by name, which Neutron grants to the owner of a network only.
    conf['auth']['create_isolated_networks'] = 'true'
    del conf['compute']['fixed_network_name']
    # The L3 agent takes seconds to move a floating IP from a server to another: who logs in before is let in by the old one, and
    # expects its host key from then on. The wait follows each change of a server's state.
    conf['compute']['ready_wait'] = '5'
    write(conf, work, 'isolated.conf')


def write(conf, work, name):
    with private(os.path.join(work, name)) as f:
        conf.write(f)


def private(path):
    return open(path, 'w', opener=lambda p, f: os.open(p, f, 0o600))


if __name__ == '__main__':
    if len(sys.argv) not in (2, 4) and (len(sys.argv) != 5 or sys.argv[4] != 'accounts'):
        sys.exit(__doc__)
    main(*sys.argv[1:])
