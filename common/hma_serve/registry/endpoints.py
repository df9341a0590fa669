"""Where etcd listens and how to speak TLS with it, as an operator writes it on a command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from hma_serve.core.errors import InvalidArgument

DEFAULT_PORT = 2379
MAX_ENDPOINTS = 16


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One etcd member: `host:port` (IPv6 in brackets) and whether it wants TLS."""

    target: str
    secure: bool

    def __str__(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.target}"


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for TLS to etcd; PEM.

    Attributes:
        root_ca: What the server's certificate must chain to; None means the system's roots.
        certificate: Shown to the server, for client authentication; needs `key`.
        key: Private key of `certificate`.
    """

    root_ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            InvalidArgument: A file cannot be read, or one of certificate and key is missing.
        """
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgument("a client certificate for etcd needs its key, and a key its certificate")
        return grpc.ssl_channel_credentials(_read(self.root_ca), _read(self.key), _read(self.certificate))

    def stamp(self) -> tuple[int, ...]:
        """Changes when a file was replaced; empty without files, and while one is missing in a replacement."""
        files = (self.root_ca, self.certificate, self.key)
        try:
            return tuple(path.stat().st_mtime_ns for path in files if path is not None)
        except OSError:
            return ()


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"cannot read {path} for TLS to etcd: {error.strerror}") from error


def parse_endpoints(text: str) -> tuple[Endpoint, ...]:
    """The members in `http://host:port,https://host:port,host:port`; the port is 2379 if left out.

    Raises:
        InvalidArgument: Empty, too many, or one of them is no address.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not 0 < len(parts) <= MAX_ENDPOINTS:
        raise InvalidArgument(f"--etcd names {len(parts)} endpoints; give 1 to {MAX_ENDPOINTS}", field="--etcd")
    return tuple(dict.fromkeys(_parse(part) for part in parts))


def _parse(part: str) -> Endpoint:
    wrong = InvalidArgument(f"--etcd: {part!r} is not http://host:port, https://host:port or host:port", field="--etcd")
    try:
        url = urlsplit(part if "://" in part else f"http://{part}")
        host, port = url.hostname, url.port
    except ValueError:
        raise wrong from None
    plain = url.path in ("", "/") and not (url.query or url.fragment or url.username is not None)
    if url.scheme not in ("http", "https") or not host or any(c.isspace() for c in host) or port == 0 or not plain:
        raise wrong
    return Endpoint(
        f"[{host}]:{port or DEFAULT_PORT}" if ":" in host else f"{host}:{port or DEFAULT_PORT}", url.scheme == "https"
    )
