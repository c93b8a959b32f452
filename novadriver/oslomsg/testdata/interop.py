"""The other side of TestInterop: a stock oslo.messaging client or server.

interop.py server URL EXCHANGE TOPIC SERVER    serve until stdin ends
interop.py client URL EXCHANGE TOPIC SERVER    make some calls, print what came back as JSON lines
interop.py listener URL EXCHANGE TOPIC SERVER  print notifications of TOPIC as JSON lines until stdin ends
"""
import json
import sys
import time

from oslo_config import cfg
import oslo_messaging

ROLE, URL, EXCHANGE, TOPIC, SERVER = sys.argv[1:6]
CONF = cfg.CONF
CONF(args=[], project='interop', default_config_files=[], default_config_dirs=[])
oslo_messaging.set_transport_defaults(EXCHANGE)


def transport():
    return oslo_messaging.get_rpc_transport(CONF, url=URL)


class Odd(Exception):
    def __init__(self, message=None, **kwargs):
        super().__init__(message)
        self.kwargs = kwargs


class Endpoint:
    target = oslo_messaging.Target(version='3.0')

    def echo(self, ctxt, value):
        return {'value': value, 'user_id': ctxt.get('user_id')}

    def nothing(self, ctxt):
        return None

    def fails(self, ctxt):
        raise Odd('it is odd', code=418)

    def slow(self, ctxt, seconds):
        time.sleep(seconds)
        return 'late'


def serve():
    target = oslo_messaging.Target(topic=TOPIC, server=SERVER)
    server = oslo_messaging.get_rpc_server(transport(), target, [Endpoint()], executor='threading')
    server.start()
    print('ready', flush=True)
    sys.stdin.read()
    server.stop()
    server.wait()


def call():
    target = oslo_messaging.Target(topic=TOPIC, server=SERVER, version='6.0')
    client = oslo_messaging.get_rpc_client(transport(), target)
    ctxt = {'user_id': 'u1', 'request_id': 'req-1', 'auth_token': 'none'}

    def show(what, f):
        try:
            out = f()
        except oslo_messaging.RemoteError as e:
            out = {'remote': e.exc_type, 'value': str(e.value)}
        except Exception as e:
            out = {'raised': type(e).__name__, 'value': str(e)}
        print(json.dumps([what, out]), flush=True)

    show('echo', lambda: client.call(ctxt, 'echo', value={'text': '<\u00fc\u2028>', 'n': [1, None, 2.5]}))
    show('null', lambda: client.call(ctxt, 'nothing'))
    show('cast', lambda: client.cast(ctxt, 'note', value='cast'))
    show('builtin', lambda: client.call(ctxt, 'unimplemented'))
    show('nova', lambda: client.call(ctxt, 'missing'))
    show('method', lambda: client.call(ctxt, 'nosuch'))
    show('version', lambda: client.prepare(version='7.0').call(ctxt, 'echo', value=1))
    show('ping', lambda: client.prepare(namespace='baseapi', version='1.0').call(ctxt, 'ping', arg='hello'))
    show('slow', lambda: client.prepare(timeout=60, call_monitor_timeout=2).call(ctxt, 'slow'))
    show('unmonitored', lambda: client.prepare(timeout=1).call(ctxt, 'slow'))


class Ear:
    def info(self, ctxt, publisher_id, event_type, payload, metadata):
        print(json.dumps([ctxt, publisher_id, event_type, payload, sorted(metadata)], sort_keys=True), flush=True)


def listen():
    listener = oslo_messaging.get_notification_listener(
        oslo_messaging.get_notification_transport(CONF, url=URL), [oslo_messaging.Target(topic=TOPIC)], [Ear()],
        executor='threading')
    listener.start()
    sys.stdin.read()
    listener.stop()
    listener.wait()


if ROLE == 'server':
    serve()
elif ROLE == 'listener':
    listen()
else:
    call()
