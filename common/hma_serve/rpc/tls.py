"""Mutual TLS: which files, read once at start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
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

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For clients: verify the server, show our certificate."""
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes())

    def server_credentials(self) -> grpc.ServerCredentials:
        """For servers: show our certificate, demand the client's."""
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair], self.ca.read_bytes(), require_client_auth=True)
