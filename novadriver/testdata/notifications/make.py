#!/usr/bin/env python3
"""Makes the fixtures of TestNotifications with the notification code of an installed Nova.

    make.py BUILD_SAMPLE.json >RELEASE.json

BUILD_SAMPLE is a build_and_run_instance as the controllers of that release send it. The clock stands still, so that a
second run gives the same.
"""

import datetime
import json
import sys

from oslo_utils import timeutils

import nova.conf
from nova import context as nova_context
from nova import exception
from nova import objects
from nova import rpc
from nova.compute import utils
from nova.network import model
from nova.notifications import base as notifications
from nova.objects import base as objects_base

CONF = nova.conf.CONF
NOW = datetime.datetime(2026, 11, 28, 4, 30, 0, 250000)
PORT = '7a4b0c5e-2d2b-4f65-9d4e-d5d1f2b0a001'
IMAGE = '2b0a6f2e-55a5-4d5c-bb53-0b3a0f8a1c02'
sent = []


class Recorder(object):
    def __init__(self, form, publisher=None):
        self.form, self.publisher = form, publisher

    def prepare(self, publisher_id):
        return Recorder(self.form, publisher_id)

    def is_enabled(self):
        return True

    def _take(self, priority, ctxt, event_type, payload):
        payload = rpc.JsonPayloadSerializer().serialize_entity(ctxt, payload)
        sent.append({'form': self.form, 'publisher_id': self.publisher, 'event_type': event_type,
                     'priority': priority, 'payload': payload})

    def info(self, ctxt, event_type, payload):
        self._take('INFO', ctxt, event_type, payload)

    def error(self, ctxt, event_type, payload):
        self._take('ERROR', ctxt, event_type, payload)


def load(path):
    objects.register_all()
    with open(path) as f:
        message = json.load(f)
    while 'args' not in message:
        message = next(v for k, v in message.items() if k in ('message', 'oslo.message', 'body'))
        if isinstance(message, str):
            message = json.loads(message)
    return objects_base.NovaObject.obj_from_primitive(message['args']['instance'])


def active(instance):
    """The instance as it stands after its boot."""
    at = datetime.datetime(2026, 11, 28, 4, 0, 0)
    instance.vm_state, instance.task_state, instance.power_state = 'active', None, 1
    instance.host, instance.node, instance.launched_at = 'host1', 'host1', at
    instance.access_ip_v4 = '10.0.0.5'
    if not instance.obj_attr_is_set('system_metadata') or not instance.system_metadata:
        instance.system_metadata = {'image_os_type': 'linux'}
    ip = model.FixedIP(address='10.0.0.5')
    ip.add_floating_ip(model.IP(address='192.0.2.7', type='floating'))
    subnet = model.Subnet(cidr='10.0.0.0/24', gateway=model.IP('10.0.0.1', 'gateway'), dns=[], routes=[], version=4,
                          ips=[ip])
    net = model.Network(id='5f0c', bridge='brq', label='private', subnets=[subnet], tenant_id='p', mtu=1450)
    vif = model.VIF(id=PORT, address='fa:16:3e:00:00:01', network=net, type='bridge', devname='tap7a4b0c5e-2d',
                    active=True, vnic_type='normal', profile={}, preserve_on_delete=False)
    cache = objects.InstanceInfoCache(instance_uuid=instance.uuid, network_info=model.NetworkInfo([vif]))
    cache.obj_reset_changes()
    instance.info_cache = cache
    instance.obj_reset_changes(recursive=False)


def main():
    CONF([], project='nova', default_config_files=[])
    CONF.set_override('notification_format', 'both', 'notifications')
    CONF.set_override('api_servers', ['http://127.0.0.1:9292'], 'glance')
    CONF.set_override('host', 'host1')
    timeutils.set_time_override(NOW)
    rpc.LEGACY_NOTIFIER, rpc.NOTIFIER = Recorder('unversioned'), Recorder('versioned')
    instance = load(sys.argv[1])
    ctxt = nova_context.RequestContext(user_id='u', project_id='p', request_id='req-1')
    admin = nova_context.get_admin_context()
    notifier = rpc.get_notifier('compute', 'host1')
    cases = []

    def case(action, phase, call, **extra):
        del sent[:]
        call()
        cases.append(dict(extra, action=action, phase=phase, instance=instance.obj_to_primitive(), messages=list(sent)))

    def usage(suffix, **kw):
        utils.notify_about_instance_usage(notifier, ctxt, instance, suffix, **kw)

    def both(action, phase, bdms=None, network=False):
        usage('%s.%s' % (action, phase), network_info=instance.get_network_info() if network else None)
        utils.notify_about_instance_action(ctxt, instance, 'host1', action, phase=phase, bdms=bdms)

    def create(phase, extra=None, fault=None, network=False):
        usage('create.' + phase, extra_usage_info=extra, fault=fault,
              network_info=instance.get_network_info() if network else None)
        utils.notify_about_instance_create(ctxt, instance, 'host1', phase=phase, exception=fault, bdms=[])

    case('create', 'start', lambda: create('start', extra={'image_name': 'demo'}), image_name='demo')
    failed = exception.BuildAbortException(instance_uuid=instance.uuid, reason='no')

    def abort():
        try:
            raise failed
        except exception.BuildAbortException as e:
            create('error', fault=e)

    case('create', 'error', abort, error={'class': 'BuildAbortException', 'text': failed.format_message()})
    active(instance)
    case('create', 'end', lambda: create('end', extra={'message': 'Success'}, network=True))
    case('pause', 'start', lambda: both('pause', 'start'))
    case('reboot', 'end', lambda: both('reboot', 'end', bdms=[]))
    case('unrescue', 'end', lambda: both('unrescue', 'end', network=True))

    def rescue():
        usage('rescue.start', extra_usage_info={'rescue_image_name': ''}, network_info=instance.get_network_info())
        utils.notify_about_instance_rescue_action(ctxt, instance, 'host1', IMAGE, phase='start')

    case('rescue', 'start', rescue, image_id=IMAGE)

    def rebuild():
        usage('rebuild.end', extra_usage_info={'image_name': ''}, network_info=instance.get_network_info())
        utils.notify_about_instance_rebuild(ctxt, instance, 'host1', phase='end', bdms=[])

    case('rebuild', 'end', rebuild)

    def snapshot():
        usage('snapshot.end')
        utils.notify_about_instance_snapshot(ctxt, instance, 'host1', phase='end', snapshot_image_id=IMAGE)

    case('snapshot', 'end', snapshot, image_id=IMAGE)
    case('interface_attach', 'end',
         lambda: utils.notify_about_instance_action(ctxt, instance, 'host1', 'interface_attach', phase='end'))
    case('create_ip', 'end', lambda: usage('create_ip.end', network_info=instance.get_network_info()))
    case('exists', '', lambda: utils.notify_usage_exists(notifier, ctxt, instance, 'host1', current_period=True))
    case('exists', '', lambda: utils.notify_usage_exists(notifier, admin, instance, 'host1'), audit=True)
    instance.vm_state, instance.power_state = 'deleted', 0
    instance.terminated_at = instance.deleted_at = NOW.replace(microsecond=0)
    instance.deleted = True
    instance.info_cache.network_info = model.NetworkInfo([])
    case('delete', 'end', lambda: both('delete', 'end', bdms=[]))

    for c in cases:
        for m in c['messages']:
            # Places in Python's code, which differ with the installation.
            fault = m['payload'].get('nova_object.data', {}).get('fault')
            for k in ('module_name', 'function_name', 'traceback') if fault else ():
                del fault['nova_object.data'][k]
    sys.stdout.write('{"now": "%sZ", "cases": [\n' % NOW.isoformat())
    sys.stdout.write(',\n'.join(json.dumps(c, sort_keys=True) for c in cases))
    sys.stdout.write('\n]}\n')


assert notifications  # loaded for its side effects on the options
main()
