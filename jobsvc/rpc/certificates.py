"""The server's side of TLS on gRPC."""

from __future__ import annotations

import grpc

from jobsvc.files import Followed
from jobsvc.tls import read_ca, read_pair


def server_credentials(certificate: str, key: str, client_ca: str) -> grpc.ServerCredentials:
    """From PEM files, which are looked at before each handshake: a new certificate is in use as
    soon as its files are there, and a bad one is logged while the old one stays. With a client CA
    (its path, else "") clients must have a certificate of it. Raises ValueError."""

    def read() -> grpc.ServerCertificateConfiguration:
        roots = read_ca(client_ca) if client_ca else None
        return grpc.ssl_server_certificate_configuration([read_pair(certificate, key)], roots)

    paths = [path for path in (certificate, key, client_ca) if path]
    followed = Followed("certificates", paths, read)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC on threads of its own; None: go on with the last one."""
        return followed.current if followed.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        followed.current,
        fetch,  # type: ignore[arg-type]  # None is missing from the stub alone
        require_client_authentication=bool(client_ca),
    )
