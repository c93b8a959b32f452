#!/usr/bin/python3
"""fake_l2_agent.py ETC MECHANISM HOST: make Neutron bind ports to HOST, which has no data plane.

For linuxbridge, ovs and sriov: report an agent for HOST every 20 s and do nothing else (a second real agent on one
machine would fight the first for its taps). For ovn: a chassis of that host name.
"""
import signal
import subprocess
import sys
import time

ADDRESS = '10.200.0.9'      # a tunnel end that nobody answers at


def chassis(host):
    def sb(*args):
        return subprocess.run(['ovn-sbctl', '--timeout=30', *args], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def sign():
        return ['nb_cfg=%d' % max(1, int(sb('get', 'SB_Global', '.', 'nb_cfg'))), 'nb_cfg_timestamp=%d' % (time.time() * 1000)]

    def gone(*_):
        sb('--if-exists', 'destroy', 'Chassis_Private', host, '--', '--if-exists', 'chassis-del', host)
        sys.exit(0)

    signal.signal(signal.SIGTERM, gone)
    sb('--may-exist', 'chassis-add', host, 'geneve', ADDRESS, '--', 'set', 'Chassis', host, 'hostname=' + host)
    if not sb('--bare', '--columns=name', 'find', 'Chassis_Private', 'name=' + host):
        # Neutron's servers keep the row as it came into being, and take in a new nb_cfg only where the old one was not 0:
        # a row made without one is that of a dead chassis until the number has changed twice.
        sb('create', 'Chassis_Private', 'name=' + host, 'chassis=' + sb('--bare', '--columns=_uuid', 'find', 'Chassis', 'name=' + host), *sign())
    print('chassis of', host, flush=True)
    while True:
        # Neutron calls a chassis dead whose nb_cfg stays behind.
        sb('set', 'Chassis_Private', host, *sign())
        time.sleep(5)


def agent(etc, mechanism, host):
    import eventlet
    eventlet.monkey_patch()
    from neutron.agent import rpc
    from neutron.common import config
    from neutron.conf.agent import common as agent_config
    from neutron_lib import context
    from neutron_lib.agent import topics
    from oslo_config import cfg

    agent_config.register_agent_state_opts_helper(cfg.CONF)
    config.register_common_config_options()
    config.init(['--config-file', etc + '/neutron.conf'])
    api = rpc.PluginReportStateAPI(topics.REPORTS)
    state = {
        'linuxbridge': {'binary': 'neutron-linuxbridge-agent', 'agent_type': 'Linux bridge agent',
                        'configurations': {'interface_mappings': {}}},
        'ovs': {'binary': 'neutron-openvswitch-agent', 'agent_type': 'Open vSwitch agent',
                'configurations': {'datapath_type': 'netdev', 'ovs_capabilities': {'datapath_types': ['netdev'], 'iface_types': []},
                                   'ovs_hybrid_plug': False, 'bridge_name': 'br-int', 'integration_bridge': 'br-int'}},
        'sriov': {'binary': 'neutron-sriov-nic-agent', 'agent_type': 'NIC Switch agent',
                  'configurations': {'device_mappings': {'lan1': ['cloud-nic1']}}},
    }[mechanism]
    state['configurations'].update(bridge_mappings={}, devices=0, tunneling_ip=ADDRESS, tunnel_types=['vxlan'],
                                   l2_population=True, extensions=[])
    state.update(host=host, topic='N/A', start_flag=True)
    while True:
        answer = api.report_state(context.get_admin_context_without_session(), state, True)
        state.pop('start_flag', None)
        print(time.strftime('%H:%M:%S'), answer, flush=True)
        time.sleep(20)


etc_dir, mech, name = sys.argv[1:]
if mech == 'ovn':
    chassis(name)
else:
    agent(etc_dir, mech, name)
