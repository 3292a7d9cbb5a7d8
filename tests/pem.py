"""Certificates in files, made by the test that needs them."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    def __init__(self, directory: Path, name: str) -> None:
        """Its own certificate is in NAME.pem, at `path`."""
        self._directory = directory
        self._ca = trustme.CA()
        self.path = str(directory / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, name: str, *identities: str) -> tuple[str, str]:
        """The paths NAME.crt and NAME.key of a certificate for host names and addresses, and of
        its key; overwrites what is there."""
        leaf = self._ca.issue_cert(*identities)
        certificate, key = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return str(certificate), str(key)
