"""What a client is willing to connect with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from jobsvc.client import Client
from tests.pem import Authority


@pytest.mark.parametrize("address", ["10.0.0.1:1", "jobs.internal:1", "dns:///jobs.internal:1"])
def test_a_token_is_not_sent_unencrypted_beyond_the_loopback(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"JOBSVC_TLS_CA.*JOBSVC_INSECURE=1") as caught:
        Client(address, token="t0ken")
    assert "t0ken" not in str(caught.value)
    Client(address).close()
    Client(address, token="t0ken", insecure=True).close()
    Client(address, token="t0ken", tls_ca=Authority(tmp_path, "ca").path).close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/x"])
def test_a_token_may_be_sent_within_the_machine(address: str) -> None:
    Client(address, token="t0ken").close()


@pytest.mark.parametrize("token", ["t0k\r", "t0k\n", " t0k", "t0 k", "tök", "t\x7f"], ids=repr)
def test_what_cannot_be_a_token_is_said_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="has a character that no token has") as caught:
        Client(token=token)
    assert token not in str(caught.value)


def test_the_owner_of_a_channel_answers_for_it() -> None:
    with grpc.insecure_channel("jobs.internal:1") as channel:
        Client(channel=channel, token="t0ken").close()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"client_cert": "x"}, "go together"),
        ({"client_key": "x"}, "go together"),
        ({"client_cert": "x", "client_key": "x"}, "there is no TLS"),
        ({"tls_server_name": "x"}, "there is no TLS"),
        ({"tls_ca": "/no/such/file"}, "No such file"),
        ({"tls_ca": __file__}, "no certificates in PEM"),
    ],
)
def test_options_that_make_no_tls_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Client(**options)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    certificate, _ = authority.issue("one", "x.internal")
    _, key = authority.issue("other", "x.internal")
    with pytest.raises(ValueError, match="are not a certificate and its key"):
        Client(tls_ca=authority.path, client_cert=certificate, client_key=key)
