"""What the installed release of Nova speaks, as JSON: service version, RPC versions, versions of the objects, and the
methods that it sends to computes."""
import inspect
import json
import re

from nova import objects
from nova.compute import manager as compute
from nova.compute import rpcapi
from nova.conductor import manager as conductor
from nova.objects import base
from nova.objects import migrate_data
from nova.objects import service

objects.register_all()
versions = {n: max((c.VERSION for c in classes), key=lambda v: [int(p) for p in v.split('.')])
            for n, classes in base.NovaObjectRegistry.obj_classes().items()}
# The base of the others is not registered.
versions['LiveMigrateData'] = migrate_data.LiveMigrateData.VERSION
print(json.dumps({
    'service': service.SERVICE_VERSION,
    'oldest': service.SERVICE_VERSION_ALIASES[service.OLDEST_SUPPORTED_SERVICE_VERSION],
    'compute': compute.ComputeManager.target.version,
    'compute_task': conductor.ComputeTaskManager.target.version,
    'objects': versions,
    'methods': sorted(set(re.findall(r'\.(?:cast|call)\(\s*\w+,\s*[\'"](\w+)[\'"]', inspect.getsource(rpcapi.ComputeAPI)))),
}))
