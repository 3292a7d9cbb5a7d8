"""The generated code offers every RPC of the public contract, and imports under `generated`."""

import importlib

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from generated.jobsvc.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    schedule_service_pb2,
    schedule_service_pb2_grpc,
)

UNARY_RPCS = {
    "jobsvc.v1.JobService": {
        "SubmitJob",
        "SubmitJobs",
        "GetJob",
        "GetResult",
        "ListJobEvents",
        "ListJobs",
        "CancelJob",
        "RetryJob",
        "UpdateJob",
        "DeleteJob",
        "ExplainJob",
        "ListJobTypes",
    },
    "jobsvc.v1.ScheduleService": {
        "CreateSchedule",
        "GetSchedule",
        "ListSchedules",
        "UpdateSchedule",
        "DeleteSchedule",
        "TriggerSchedule",
    },
    "jobsvc.v1.AdminService": {
        "ListQueues",
        "PauseQueue",
        "ResumeQueue",
        "UpdateQueue",
        "ListWorkers",
        "CancelJobs",
        "RetryJobs",
        "DeleteJobs",
        "ListFailureGroups",
    },
}
STREAMING_RPCS = {
    "jobsvc.v1.JobService": {"RunJob", "WatchJob", "WatchJobs"},
    "jobsvc.v1.ScheduleService": set(),
    "jobsvc.v1.AdminService": set(),
}
ONEOFS = {
    "Job": {"input"},
    "OutputChunk": {"chunk"},
    "SubmitJobRequest": {"input", "when", "expiration"},
    "RunJobResponse": {"message"},
    "GetResultResponse": {"outcome"},
    "WatchJobResponse": {"message"},
    "WatchJobsResponse": {"message"},
}
FILES = (job_pb2, job_service_pb2, schedule_service_pb2, admin_service_pb2)


def services() -> dict[str, ServiceDescriptor]:
    """Every service that the four files declare, by its full name."""
    return {
        service.full_name: service
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
    }


def methods() -> list[MethodDescriptor]:
    return [method for service in services().values() for method in service.methods]


def test_the_services_have_the_rpcs_of_the_contract_with_their_kinds() -> None:
    found = services()
    assert found.keys() == UNARY_RPCS.keys()
    for name, service in found.items():
        streaming = {method.name for method in service.methods if method.server_streaming}
        unary = {method.name for method in service.methods} - streaming
        assert unary == UNARY_RPCS[name]
        assert streaming == STREAMING_RPCS[name]
    assert [method.full_name for method in methods() if method.client_streaming] == []


def test_every_rpc_has_messages_of_its_own_name() -> None:
    for method in methods():
        assert method.input_type.full_name == f"jobsvc.v1.{method.name}Request"
        assert method.output_type.full_name == f"jobsvc.v1.{method.name}Response"


def test_the_oneofs_are_named_as_in_the_contract() -> None:
    found = {
        message.name: {
            oneof.name
            for oneof in message.oneofs
            # A field that is `optional` is a oneof of its own, named after it with a "_".
            if not oneof.name.startswith("_")
        }
        for file in FILES
        for message in file.DESCRIPTOR.message_types_by_name.values()
    }
    assert {name: oneofs for name, oneofs in found.items() if oneofs} == ONEOFS


def test_only_the_factors_of_a_retry_policy_tell_unset_from_zero() -> None:
    tracked = {
        field.full_name
        for file in FILES
        for message in file.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.message_type is None and field.has_presence
        # Members of a oneof always do.
        if field.containing_oneof is None or field.containing_oneof.name.startswith("_")
    }
    assert tracked == {
        "jobsvc.v1.RetryPolicy.backoff_multiplier",
        "jobsvc.v1.RetryPolicy.jitter",
    }


def test_every_enum_begins_with_unspecified() -> None:
    enums = [enum for file in FILES for enum in file.DESCRIPTOR.enum_types_by_name.values()]
    assert {enum.name for enum in enums} == {
        "JobEventType",
        "JobState",
        "JobView",
        "LogLevel",
        "MissedTicks",
        "Overlap",
        "UniqueConflict",
        "UniqueScope",
        "WaitReason",
    }
    for enum in enums:
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


@pytest.mark.parametrize("stem", ["job", "job_service", "schedule_service", "admin_service"])
def test_reflection_finds_a_file_by_the_name_that_clients_import(stem: str) -> None:
    module = importlib.import_module(f"generated.jobsvc.v1.{stem}_pb2")
    name = f"jobsvc/v1/{stem}.proto"
    assert module.DESCRIPTOR.name == name
    assert module.DESCRIPTOR.package == "jobsvc.v1"
    assert descriptor_pool.Default().FindFileByName(name) == module.DESCRIPTOR


def test_messages_live_in_the_module_that_they_are_imported_from() -> None:
    assert job_pb2.Job.__module__ == job_pb2.__name__ == "generated.jobsvc.v1.job_pb2"


def test_stubs_and_servicers_cover_every_rpc() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stubs = {
            "jobsvc.v1.JobService": job_service_pb2_grpc.JobServiceStub(channel),
            "jobsvc.v1.ScheduleService": schedule_service_pb2_grpc.ScheduleServiceStub(channel),
            "jobsvc.v1.AdminService": admin_service_pb2_grpc.AdminServiceStub(channel),
        }
    servicers = {
        "jobsvc.v1.JobService": job_service_pb2_grpc.JobServiceServicer,
        "jobsvc.v1.ScheduleService": schedule_service_pb2_grpc.ScheduleServiceServicer,
        "jobsvc.v1.AdminService": admin_service_pb2_grpc.AdminServiceServicer,
    }
    for name, service in services().items():
        for method in service.methods:
            assert hasattr(stubs[name], method.name)
            assert hasattr(servicers[name], method.name)
