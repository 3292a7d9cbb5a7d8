"""What a release carries for clients that do not ask reflection."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from tests.docs.shell import BIN
from tests.harness.process import ROOT


def test_grpcurl_calls_by_the_protoset_alone(released: Path, dev_address: str) -> None:
    options = ["-plaintext", "-protoset", str(released / "jobsvc.protoset")]
    data = ["-d", '{"job_type": "Not a type"}']
    command = [str(BIN / "grpcurl"), *options, *data, dev_address, "jobsvc.v1.JobService/SubmitJob"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert "Code: InvalidArgument" in done.stderr
    assert '"reason":"INVALID_FIELD"' in done.stderr
    assert '"field":"job_type"' in done.stderr


def test_the_protoset_is_complete_and_bare(released: Path) -> None:
    files = FileDescriptorSet.FromString((released / "jobsvc.protoset").read_bytes()).file
    names = {file.name for file in files}
    assert {dependency for file in files for dependency in file.dependency} <= names
    assert {"google/rpc/error_details.proto", "google/rpc/status.proto"} <= names
    assert not any(file.HasField("source_code_info") for file in files)
    services = {service.name for file in files for service in file.service}
    assert services == {"JobService", "ScheduleService", "AdminService"}


def test_the_archive_is_the_protos_under_the_paths_that_they_import(released: Path) -> None:
    with tarfile.open(released / "jobsvc-protos.tar.gz") as archive:
        members = {m.name: archive.extractfile(m) for m in archive.getmembers()}
        texts = {name: file.read() for name, file in members.items() if file}
    protos = ROOT / "protos"
    assert texts == {str(p.relative_to(protos)): p.read_bytes() for p in protos.rglob("*.proto")}


def test_the_same_protos_make_the_same_bytes(released: Path, tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/protoset", tmp_path], check=True)
    first, second = (
        {path.name: path.read_bytes() for path in directory.iterdir()}
        for directory in (released, tmp_path)
    )
    assert first == second
    assert first.keys() == {"jobsvc.protoset", "jobsvc-protos.tar.gz"}
