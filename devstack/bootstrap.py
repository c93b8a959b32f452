#!/usr/bin/python3
"""What a new cloud needs. Each command may be repeated.

bootstrap.py broker PASSWORD_FILE             RabbitMQ's definitions, on stdout
bootstrap.py keys PASSWORD_FILE DIR...        what keystone-manage fernet_setup and credential_setup make
bootstrap.py identity PASSWORD_FILE           services, end points, projects, users, roles
bootstrap.py ready PASSWORD_FILE BINARY...    wait for nova's services and those agents to be alive
bootstrap.py resources PASSWORD_FILE [LAN...] flavors, image, networks (flat ones on those physical networks), routers
bootstrap.py empty PASSWORD_FILE              delete every server
bootstrap.py forget PASSWORD_FILE HOST        remove the records of a compute host that has no servers
"""
import base64
import hashlib
import io
import json
import os
import sys
import tarfile
import time

HOST = 'http://127.0.0.1'
PROJECTS = 'demo', 'demo2'
SERVICES = (('glance', 'image', HOST + ':9292'),
            ('nova', 'compute', HOST + ':8774/v2.1'),
            ('placement', 'placement', HOST + ':8778'),
            ('neutron', 'network', HOST + ':9696'),
            ('heat', 'orchestration', HOST + ':8004/v1/%(tenant_id)s'))
if os.environ.get('WITH_BARBICAN') == '1':
    SERVICES += (('barbican', 'key-manager', HOST + ':9311'),)
FLAVORS = ('m1.tiny', 1, 64, 1), ('m1.small', 1, 256, 2), ('m1.medium', 2, 1024, 5)


def connect(password):
    import openstack
    return openstack.connect(auth_url=HOST + ':5000/v3', username='admin', password=password, project_name='admin',
                             user_domain_name='Default', project_domain_name='Default', region_name='RegionOne')


def broker(password):
    """A definitions file needs the hash of the password; with it no rabbitmqctl has to run."""
    salt = os.urandom(4)
    digest = hashlib.sha256(salt + password.encode()).digest()
    vhosts = '/', 'neutron', 'heat'
    json.dump({
        'users': [{'name': 'openstack', 'password_hash': base64.b64encode(salt + digest).decode(),
                   'hashing_algorithm': 'rabbit_password_hashing_sha256', 'tags': 'administrator'}],
        'vhosts': [{'name': v} for v in vhosts],
        'permissions': [{'user': 'openstack', 'vhost': v, 'configure': '.*', 'write': '.*', 'read': '.*'} for v in vhosts],
    }, sys.stdout)


def keys(password, *dirs):
    """Two runs of keystone-manage would take five seconds for four random numbers."""
    for d in dirs:
        os.makedirs(d, mode=0o700, exist_ok=True)
        for name in '0', '1':
            with open(os.path.join(d, name), 'wb', opener=lambda p, f: os.open(p, f, 0o600)) as f:
                f.write(base64.urlsafe_b64encode(os.urandom(32)))


def identity(password):
    i = connect(password).identity
    domain = i.find_domain('Default')
    heat = i.find_domain('heat') or i.create_domain(name='heat')
    projects = {p.name: p for p in i.projects()}
    roles = {r.name: r for r in i.roles()}
    users = {(u.domain_id, u.name): u for u in i.users()}
    services = {s.name: s for s in i.services()}
    for n in ('service',) + PROJECTS:
        projects.setdefault(n, None)
        projects[n] = projects[n] or i.create_project(name=n, domain_id=domain.id)
    for n in 'admin', 'member', 'reader', 'service', 'heat_stack_user', 'heat_stack_owner', 'creator':
        roles[n] = roles.get(n) or i.create_role(name=n)

    def user(name, where=domain):
        return users.get((where.id, name)) or i.create_user(name=name, domain_id=where.id, password=password)

    for name, kind, url in SERVICES:
        u = user(name)
        for r in 'admin', 'service':
            i.assign_project_role_to_user(projects['service'].id, u.id, roles[r].id)
        s = services.get(name) or i.create_service(name=name, type=kind)
        have = {e.interface for e in i.endpoints(service_id=s.id)}
        for interface in 'public', 'internal', 'admin':
            if interface not in have:
                i.create_endpoint(service_id=s.id, interface=interface, region_id='RegionOne', url=url)
    for n in PROJECTS:
        u = user(n)
        for r in 'member', 'reader', 'heat_stack_owner', 'creator':
            i.assign_project_role_to_user(projects[n].id, u.id, roles[r].id)
    # The domain in which heat makes the users of its stacks.
    i.put(f'/domains/{heat.id}/users/{user("heat_domain_admin", heat).id}/roles/{roles["admin"].id}')


def ready(password, *binaries):
    c = connect(password)
    end = time.monotonic() + 400
    while True:
        up = {s.binary for s in c.compute.services() if s.state == 'up'}
        up |= {a.binary for a in c.network.agents() if a.is_alive}
        missing = ({'nova-conductor', 'nova-scheduler'} | set(binaries)) - up
        if not missing:
            return
        if time.monotonic() > end:
            sys.exit('!! not alive after 400 s: ' + ', '.join(sorted(missing)))
        time.sleep(1)


def archive(program='/bin/busybox'):
    """A `docker save` archive of one static program."""
    def add(tar, name, data=None, mode=0o644, link=None):
        t = tarfile.TarInfo(name)
        t.mode = mode
        if link:
            t.type, t.linkname = tarfile.SYMTYPE, link
        elif data is None:
            t.type, t.mode = tarfile.DIRTYPE, 0o1777 if name == 'tmp' else 0o755
        else:
            t.size = len(data)
        tar.addfile(t, io.BytesIO(data or b''))

    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode='w') as tar:
        for d in 'bin', 'dev', 'etc', 'proc', 'root', 'run', 'sbin', 'sys', 'tmp', 'usr', 'usr/bin', 'var':
            add(tar, d)
        with open(program, 'rb') as f:
            add(tar, 'bin/busybox', f.read(), 0o755)
        add(tar, 'etc/passwd', b'root:x:0:0:root:/root:/bin/sh\n')
        add(tar, 'etc/group', b'root:x:0:\n')
        for a in os.popen(program + ' --list').read().split():
            if a != 'busybox':
                add(tar, 'bin/' + a, link='busybox')
    layer = layer.getvalue()
    config = json.dumps({
        'architecture': {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(os.uname().machine, os.uname().machine), 'os': 'linux',
        'config': {'Env': ['PATH=/bin:/sbin'], 'WorkingDir': '/',
                   'Cmd': ['/bin/sh', '-c', 'echo up: $(hostname); while :; do sleep 3600 & wait $!; done']},
        'rootfs': {'type': 'layers', 'diff_ids': ['sha256:' + hashlib.sha256(layer).hexdigest()]},
        'history': [{'created_by': 'busybox'}],
    }).encode()
    name = hashlib.sha256(config).hexdigest() + '.json'
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        add(tar, 'layer.tar', layer)
        add(tar, name, config)
        add(tar, 'manifest.json', json.dumps([{'Config': name, 'RepoTags': ['busybox:latest'], 'Layers': ['layer.tar']}]).encode())
    return out.getvalue()


def resources(password, *lans):
    c = connect(password)
    n = c.network
    have = {f.name for f in c.compute.flavors()}
    for name, vcpus, ram, disk in FLAVORS:
        if name not in have:
            c.compute.create_flavor(name=name, vcpus=vcpus, ram=ram, disk=disk)
    if not c.image.find_image('busybox') and os.access('/bin/busybox', os.X_OK):
        c.image.create_image(name='busybox', container_format='docker', disk_format='raw', visibility='public', data=archive())
    public = n.find_network('public') or n.create_network(
        name='public', is_router_external=True, provider_network_type='flat', provider_physical_network='public')
    n.find_subnet('public-v4') or n.create_subnet(
        name='public-v4', network_id=public.id, ip_version=4, cidr='172.24.4.0/24', gateway_ip='172.24.4.1',
        allocation_pools=[{'start': '172.24.4.100', 'end': '172.24.4.250'}], is_dhcp_enabled=False)
    # One subnet names its resolver (its DHCP server has the first address), the other leaves it to DHCP.
    lans = list(lans)
    for project, name, router, cidr, more in (
            ('demo', 'private', 'router', '10.77.0.0/22', {'dns_nameservers': ['10.77.0.2']}),
            ('demo2', 'private2', 'router2', '10.88.0.0/24', {})):
        owner = c.identity.find_project(project).id
        flat = {'provider_network_type': 'flat', 'provider_physical_network': lans.pop(0)} if lans else {}
        net = n.find_network(name) or n.create_network(name=name, project_id=owner, **flat)
        sub = n.find_subnet(name + '-v4') or n.create_subnet(
            name=name + '-v4', network_id=net.id, project_id=owner, ip_version=4, cidr=cidr, **more)
        r = n.find_router(router) or n.create_router(
            name=router, project_id=owner, external_gateway_info={'network_id': public.id})
        if not any(p.network_id == net.id for p in n.ports(device_id=r.id)):
            n.add_interface_to_router(r.id, subnet_id=sub.id)


def empty(password):
    c = connect(password).compute
    end = time.monotonic() + 90
    asked = set()
    while True:
        servers = list(c.servers(details=False, all_projects=True))
        if not servers:
            return
        if time.monotonic() > end:
            sys.exit('!! not deleted: ' + ', '.join(s.id for s in servers))
        for s in servers:
            if s.id not in asked:
                asked.add(s.id)
                c.delete_server(s.id, force=True, ignore_missing=True)
        time.sleep(0.5)


def forget(password, host):
    c = connect(password)
    for a in c.network.agents(host=host):
        c.network.delete_agent(a)
    for s in c.compute.services(host=host, binary='nova-compute'):
        c.compute.delete_service(s)


if __name__ == '__main__':
    commands = {f.__name__: f for f in (broker, keys, identity, ready, resources, empty, forget)}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    with open(sys.argv[2]) as f:
        commands[sys.argv[1]](f.read().strip(), *sys.argv[3:])
