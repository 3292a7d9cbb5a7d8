"""What the end-to-end and chaos tests stand on: real processes, load, and watchers that record."""

from tests.harness.broker import Rabbit
from tests.harness.load import Load
from tests.harness.process import Process, ProcessFailed
from tests.harness.proxy import Proxy
from tests.harness.service import Service
from tests.harness.wait import until
from tests.harness.watchers import Recording, Watchers

__all__ = [
    "Load",
    "Process",
    "ProcessFailed",
    "Proxy",
    "Rabbit",
    "Recording",
    "Service",
    "Watchers",
    "until",
]
