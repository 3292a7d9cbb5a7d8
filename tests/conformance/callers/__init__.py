"""The clients, each as a Caller."""

from tests.conformance.callers.base import Caller, Json, Reply, Stream
from tests.conformance.callers.grpcurl import GrpcurlCaller
from tests.conformance.callers.node import NodeCaller, install
from tests.conformance.callers.python import PythonCaller

CALLERS: dict[str, type[GrpcurlCaller | NodeCaller | PythonCaller]] = {
    caller.name: caller for caller in (PythonCaller, NodeCaller, GrpcurlCaller)
}

__all__ = [
    "CALLERS",
    "Caller",
    "GrpcurlCaller",
    "Json",
    "NodeCaller",
    "PythonCaller",
    "Reply",
    "Stream",
    "install",
]
