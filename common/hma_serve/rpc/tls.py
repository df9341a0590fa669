"""Mutual TLS between services: three PEM files in one directory, as Kubernetes and cert-manager lay out a secret.

Workers are called by address, and addresses come and go, so a service is recognised by a name that every service's
certificate carries (`SERVICE_NAME`) and by the authority that signed it, which must sign for this cluster alone.

Files that are replaced are taken up without a restart: servers look before each handshake, clients before each use of a
channel.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import grpc

from hma_serve.core.errors import InvalidArgument

SERVICE_NAME = "hma-serve.internal"
"""A name in every service's certificate."""

CA_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"

_log = logging.getLogger(__name__)

Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files of one service.

    Attributes:
        ca: Certificates of the authority that signs every peer.
        certificate: This service's chain.
        key: This service's private key.
    """

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def in_directory(cls, directory: Path) -> TlsConfig:
        """The files `ca.crt`, `tls.crt` and `tls.key` of a directory.

        Raises:
            InvalidArgument: One of them cannot be read, or they are no certificates and key.
        """
        config = cls(directory / CA_FILE, directory / CERTIFICATE_FILE, directory / KEY_FILE)
        for path, kind in ((config.ca, "CERTIFICATE"), (config.certificate, "CERTIFICATE"), (config.key, "KEY")):
            try:
                text = path.read_bytes()
            except OSError as exc:
                raise InvalidArgument(
                    f"cannot read {path}: {exc.strerror}; --tls-dir wants {CA_FILE}, {CERTIFICATE_FILE} and {KEY_FILE} "
                    "(`hma-serve certs DIR` makes them for trying out)",
                    field="--tls-dir",
                ) from exc
            if f"{kind}-----".encode() not in text:
                raise InvalidArgument(f"{path} holds no {kind.lower()} in PEM", field="--tls-dir")
        return config

    def stamp(self) -> Stamp:
        """Changes when a file was replaced; empty while one is missing, as in the middle of a replacement."""
        try:
            return tuple(path.stat().st_mtime_ns for path in (self.ca, self.certificate, self.key))
        except OSError:
            return ()

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For clients: verify the server, show our certificate."""
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes())

    def server_credentials(self) -> grpc.ServerCredentials:
        """For servers: show our certificate, demand the client's."""
        used = self.stamp()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            found = self.stamp()
            if found in ((), used):
                return None
            try:
                configuration = self._server_configuration()
            except OSError as exc:
                _log.warning("keeping the old certificate: cannot read the new one: %s", exc)
                return None
            used = found
            _log.info("certificates were replaced; new connections use the new ones")
            return configuration

        return grpc.dynamic_ssl_server_credentials(
            self._server_configuration(),
            renewed,  # type: ignore[arg-type]  # None, says gRPC's documentation, keeps what there is.
            require_client_authentication=True,
        )

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], self.ca.read_bytes())
