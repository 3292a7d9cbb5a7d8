"""PEM files, read and seen to be good before anything relies on them."""

from __future__ import annotations

import ssl
from pathlib import Path


def read_pair(certificate: str, key: str) -> tuple[bytes, bytes]:
    """What the files at these paths hold: the private key, and the chain of its certificate.
    Raises ValueError if they do not belong together, or cannot be used."""
    pair = _read(key), _read(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except OSError as error:
        raise ValueError(
            f"{certificate} and {key} are not a certificate and its key in PEM ({_reason(error)})"
        ) from None
    if pair != (_read(key), _read(certificate)):
        raise ValueError(f"{certificate} and {key} were changed while they were read")
    return pair


def read_ca(path: str) -> bytes:
    """The certificates that the file holds. Raises ValueError if there are none."""
    data = _read(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise ValueError(f"{path} holds no certificates in PEM ({_reason(error)})") from None
    return data


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)


def _refuse_password() -> str:
    # OpenSSL would ask for it on the terminal otherwise.
    raise ValueError("the key is encrypted; store it without a password")
