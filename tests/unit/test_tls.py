"""PEM files that are good, and those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from jobsvc.tls import read_ca, read_pair
from tests.pem import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


def test_a_pair_is_its_key_and_its_chain(authority: Authority) -> None:
    certificate, key = authority.issue("server", "localhost")
    assert read_pair(certificate, key) == (Path(key).read_bytes(), Path(certificate).read_bytes())
    assert read_ca(authority.path) == Path(authority.path).read_bytes()


def test_what_does_not_belong_together_is_refused(authority: Authority) -> None:
    certificate, key = authority.issue("server", "localhost")
    other, _ = authority.issue("other", "localhost")
    for one, two in ((other, key), (key, certificate), (certificate, certificate)):
        with pytest.raises(ValueError, match="are not a certificate and its key in PEM"):
            read_pair(one, two)


def test_an_encrypted_key_is_refused_and_nobody_asked(authority: Authority) -> None:
    certificate, key = authority.issue("server", "localhost")
    plain = serialization.load_pem_private_key(Path(key).read_bytes(), password=None)
    Path(key).write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hunter2"),
        )
    )
    with pytest.raises(ValueError, match="the key is encrypted"):
        read_pair(certificate, key)


def test_what_is_no_ca_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    with pytest.raises(ValueError, match=r"cannot read .*: No such file"):
        read_ca(str(path))
    for text in ("", "no certificate"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no certificates in PEM"):
            read_ca(str(path))
