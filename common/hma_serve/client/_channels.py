"""Addresses, TLS and the options of every channel.

The options repeat those of the services' own channels, because the SDK does not import them: what a router is used to
from its peers it also gets from the SDK.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from hma_serve.core.errors import InvalidArgument

MAX_MESSAGE_BYTES = 3 << 20
"""What a router accepts in one message; a prompt must fit."""

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A router that stopped or vanished is noticed within seconds, in the middle of an answer too.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Only the SDK knows whether a token has arrived, so only it decides on a retry.
    ("grpc.enable_retries", 0),
    # Despite its name the time that one attempt to connect may take: an address that swallows packets costs this much.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # The address given is the address called.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]

_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:/\s]+):[0-9]{1,5}")
_RESOLVER = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract):\S+")


@dataclass(frozen=True)
class Tls:
    """Which PEM files an encrypted connection uses.

    Attributes:
        ca: Certificates of the authority that signed the router's certificate; None: the public ones that gRPC brings.
        certificate: The client's own chain, where the router asks for one.
        key: The private key of `certificate`.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgument("tls.certificate and tls.key belong together: give both or neither", field="tls")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files; raises InvalidArgument naming one that cannot be read."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))


def _read(path: Path | str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"cannot read {path}: {exc.strerror}", field="tls") from exc


def parse_addresses(address: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses of one or several routers, checked.

    Args:
        address: `host:port`, several of them separated by commas, or a sequence. gRPC's own `dns:`, `ipv4:`, `ipv6:`
            and `unix:` targets pass as they are.

    Raises:
        InvalidArgument: None is given, or one is no address.
    """
    parts = address.split(",") if isinstance(address, str) else list(address)
    addresses = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not addresses:
        raise InvalidArgument("no address was given; it looks like localhost:50051", field="address")
    for one in addresses:
        if not (_HOST_AND_PORT.fullmatch(one) or _RESOLVER.fullmatch(one)):
            raise InvalidArgument(f"{one!r} is no host:port, such as localhost:50051", field="address")
    return addresses
