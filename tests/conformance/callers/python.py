"""The Python client: the generated messages over grpc."""

from __future__ import annotations

from typing import Any, cast

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from generated.jobsvc.v1 import admin_service_pb2, job_service_pb2, schedule_service_pb2
from tests.conformance.callers.base import CALL_SECONDS_MAX, Caller, Json, Reply, Stream

# Imported for what they put into the pool: the services, and what errors carry.
FILES = (
    job_service_pb2.DESCRIPTOR,
    schedule_service_pb2.DESCRIPTOR,
    admin_service_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    error_details_pb2.DESCRIPTOR,
)


class PythonCaller(Caller):
    name = "python"

    def __init__(self, address: str) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(address, options=options)

    def call(self, method: str, request: Json, token: str | None = None) -> Reply:
        send, receive = _types(method)
        call = self._channel.unary_unary(
            f"/{method}", send.SerializeToString, cast(Any, receive).FromString
        )
        try:
            answer = call(
                ParseDict(request, send()), timeout=CALL_SECONDS_MAX, metadata=_metadata(token)
            )
        except grpc.RpcError as error:
            return _reply(cast(grpc.Call, error))
        return Reply("OK", body=_dict(answer))

    def stream(self, method: str, request: Json, token: str | None = None) -> Stream:
        send, receive = _types(method)
        call = self._channel.unary_stream(
            f"/{method}", send.SerializeToString, cast(Any, receive).FromString
        )
        return _PythonStream(
            call(ParseDict(request, send()), timeout=CALL_SECONDS_MAX, metadata=_metadata(token))
        )

    def services(self) -> list[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(self._channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = stub.ServerReflectionInfo(iter([request]), timeout=CALL_SECONDS_MAX)
        return [each.name for answer in answers for each in answer.list_services_response.service]

    def close(self) -> None:
        self._channel.close()


class _PythonStream(Stream):
    def __init__(self, call: Any) -> None:
        self._call = call

    def __next__(self) -> Json:
        try:
            return _dict(next(self._call))
        except grpc.RpcError:
            raise StopIteration from None

    def close(self) -> None:
        self._call.cancel()

    @property
    def reply(self) -> Reply:
        return _reply(self._call)


def _types(method: str) -> tuple[type[Message], type[Message]]:
    service, _, name = method.partition("/")
    found = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    return (
        message_factory.GetMessageClass(found.input_type),
        message_factory.GetMessageClass(found.output_type),
    )


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _dict(message: Message) -> Json:
    return MessageToDict(message, preserving_proto_field_name=True)


def _reply(call: grpc.Call) -> Reply:
    status = rpc_status.from_call(call)
    if status is None:  # gRPC's own, or OK
        return Reply(call.code().name, call.details() or "")
    return Reply.of_status(_dict(status))


def plain(method: str, answer: Json) -> Json:
    """An answer in proto JSON with the field names of the .proto, however they were written: where
    a client knows the JSON names it uses those. Raises ParseError for what is no such answer."""
    _, receive = _types(method)
    return _dict(ParseDict(answer, receive()))


def descriptor_set(*files: FileDescriptor) -> bytes:
    """The files and all that they import, as a FileDescriptorSet."""
    found: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        for each in file.dependencies:
            add(each)
        found.setdefault(file.name, file)

    for file in files:
        add(file)
    made = FileDescriptorSet()
    for file in found.values():
        file.CopyToProto(made.file.add())
    return made.SerializeToString()
