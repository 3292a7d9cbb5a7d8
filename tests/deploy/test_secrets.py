"""scripts/stack-secrets and scripts/host/rotate."""

from __future__ import annotations

import ssl
import stat
import subprocess
from pathlib import Path

import pytest

from jobsvc import settings
from jobsvc.tokens import parse_tokens
from tests.deploy.host import SCRIPTS, Host


def make(host: Host, *arguments: str) -> dict[str, str]:
    """Runs it; every file by its name."""
    done = host.run(SCRIPTS / "stack-secrets", *arguments, str(host.secrets))
    assert done.returncode == 0, done.stderr
    files = [path for path in host.secrets.rglob("*") if path.is_file()]
    return {str(path.relative_to(host.secrets)): path.read_text() for path in files}


def test_every_secret_that_compose_mounts_is_made_and_no_two_machines_share_one(
    host: Host, tmp_path: Path
) -> None:
    made = make(host)
    other = make(Host(tmp_path / "other"))

    compose = (SCRIPTS.parent / "docker-compose.yml").read_text()
    mounted = [
        line.split("}/")[1].rstrip('"}') for line in compose.splitlines() if '{file: "${' in line
    ]
    assert len(mounted) > 10
    assert set(mounted) <= set(made)
    public = {"smtp_url", "grpc/tokens"}  # empty, and a hash
    assert [name for name in made if made[name] == other[name] and name not in public] == []


def test_others_on_the_host_are_kept_out_and_containers_are_let_in(host: Host) -> None:
    make(host)

    assert stat.S_IMODE(host.secrets.stat().st_mode) == 0o700
    assert stat.S_IMODE((host.secrets / "ca.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((host.secrets / "database_url").stat().st_mode) == 0o644
    assert stat.S_IMODE((host.secrets / "grpc").stat().st_mode) == 0o755


def test_the_service_takes_them(host: Host) -> None:
    made = make(host, "--host", "jobs.example.com")

    loaded = settings.load(
        {
            "JOBSVC_DATABASE_URL_FILE": str(host.secrets / "database_url"),
            "JOBSVC_BROKER_URL_FILE": str(host.secrets / "broker_url"),
            "JOBSVC_BROKER_CA": str(host.secrets / "ca.crt"),
            "JOBSVC_SMTP_URL_FILE": str(host.secrets / "smtp_url"),
            "JOBSVC_TLS_CERT": str(host.secrets / "grpc/server.crt"),
            "JOBSVC_TLS_KEY": str(host.secrets / "grpc/server.key"),
            "JOBSVC_TOKENS_FILE": str(host.secrets / "grpc/tokens"),
            "JOBSVC_LISTEN": "0.0.0.0:50051",
        }
    )
    assert "sslmode=verify-full" in loaded.database_url
    assert loaded.broker_url.startswith("amqps://")
    token = parse_tokens(made["grpc/tokens"]).find(made["smoke_token"].strip())
    assert token is not None
    assert (token.name, set(token.scopes)) == ("smoke", {"submit", "read"})


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        ("grpc/server.crt", "jobs.example.com"),
        ("grpc/server.crt", "server"),
        ("postgres.crt", "postgres"),
        ("rabbitmq.crt", "rabbitmq"),
    ],
)
def test_each_certificate_is_for_its_name(host: Host, certificate: str, name: str) -> None:
    make(host, "--host", "jobs.example.com")

    def verified(as_name: str) -> bool:
        ca, file = host.secrets / "ca.crt", host.secrets / certificate
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
        command += ["-verify_hostname", as_name, "-CAfile", str(ca), str(file)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert verified(name)
    assert not verified("elsewhere.example.com")
    key = (host.secrets / certificate).with_suffix(".key")
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(host.secrets / certificate, key)


def test_what_is_there_stays(host: Host) -> None:
    made = make(host)
    (host.secrets / "smtp_url").write_text("smtp://mail:25\n")

    assert make(host) == made | {"smtp_url": "smtp://mail:25\n"}


def test_a_new_smoke_token_leaves_the_other_tokens_alone(host: Host) -> None:
    tokens = make(host)["grpc/tokens"]
    other = f"ann  {'ab' * 32}  read admin\n"
    (host.secrets / "grpc/tokens").write_text(other + tokens)
    (host.secrets / "smoke_token").unlink()

    made = make(host)

    assert made["grpc/tokens"].startswith(other)
    assert tokens not in made["grpc/tokens"]
    assert len(parse_tokens(made["grpc/tokens"])) == 2


def rotate(host: Host, what: str) -> tuple[dict[str, str], dict[str, str]]:
    """The secrets before and after."""
    before = make(host)
    done = host.host_script("rotate", what)
    assert done.returncode == 0, done.stderr
    return before, make(host)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def restarts(host: Host) -> list[str]:
    return [line.rpartition(" 180 ")[2] for line in host.calls() if "--force-recreate" in line]


def test_rotating_the_passwords_of_the_database_tells_the_database_first(deployed: Host) -> None:
    before, after = rotate(deployed, "database")

    assert changed(before, after) == {
        *("database_password", "database_url", "migrate_password", "migrate_url")
    }
    told = (deployed.fake / "stdin").read_text()
    assert f"ALTER ROLE jobsvc PASSWORD '{after['database_password'].strip()}'" in told
    assert f"ALTER ROLE jobsvc_migrate PASSWORD '{after['migrate_password'].strip()}'" in told
    assert after["database_password"].strip() in after["database_url"]
    assert restarts(deployed) == ["server", "worker"]


def test_rotating_the_password_of_the_broker(deployed: Host) -> None:
    before, after = rotate(deployed, "broker")

    assert changed(before, after) == {"broker_password", "broker_url", "rabbitmq.conf"}
    assert (deployed.fake / "stdin").read_text() == after["broker_password"]
    assert restarts(deployed) == ["server", "worker"]


def test_rotating_certificates_keeps_the_ca(deployed: Host) -> None:
    before, after = rotate(deployed, "certificates")

    assert changed(before, after) == {
        *("postgres.crt", "postgres.key", "rabbitmq.crt", "rabbitmq.key"),
        *("grpc/server.crt", "grpc/server.key"),
    }
    assert restarts(deployed) == ["postgres rabbitmq", "server", "worker"]


def test_rotating_certificates_keeps_one_that_another_ca_signed(
    deployed: Host, tmp_path: Path
) -> None:
    make(deployed)
    theirs = make(Host(tmp_path / "other"))["grpc/server.crt"]
    (deployed.secrets / "grpc/server.crt").write_text(theirs)

    _, after = rotate(deployed, "certificates")

    assert after["grpc/server.crt"] == theirs


def test_a_rotation_that_fails_can_be_run_again(deployed: Host) -> None:
    make(deployed)
    deployed.fail("* exec -T postgres psql *")
    assert deployed.host_script("rotate", "database").returncode != 0
    assert restarts(deployed) == []
    deployed.fail()

    rotate(deployed, "database")

    assert restarts(deployed) == ["server", "worker"]
