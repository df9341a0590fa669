"""Which store an operator's `--etcd` means."""

from __future__ import annotations

from pathlib import Path

from hma_serve.core.errors import InvalidArgument
from hma_serve.registry.endpoints import Tls, parse_endpoints
from hma_serve.registry.etcd_store import EtcdStore
from hma_serve.registry.static_file import StaticFileStore
from hma_serve.registry.store import ReadableStore, Store

_FILE = "file:"


def open_store(url: str, tls: Tls | None = None) -> Store:
    """The store for a worker: `http://host:port,https://host:port,host:port`. Connects when first used.

    Raises:
        InvalidArgument: No such address, one without TLS although `tls` is given, or a static file, in which a worker
            cannot register.
    """
    if url.startswith(_FILE):
        raise InvalidArgument("a worker cannot register in a static file: give --etcd an address", field="--etcd")
    endpoints = parse_endpoints(url)
    plain = [str(endpoint) for endpoint in endpoints if not endpoint.secure]
    if tls is not None and plain:
        raise InvalidArgument(
            f"TLS to etcd is asked for, but --etcd names {plain[0]}, which is not encrypted: write https://",
            field="--etcd",
        )
    return EtcdStore(endpoints, tls)


def open_readable_store(url: str, tls: Tls | None = None) -> ReadableStore:
    """The store for a router: etcd as for `open_store`, or `file:PATH` for a static fleet.

    Raises:
        InvalidArgument: No such address.
    """
    if url.startswith(_FILE):
        return StaticFileStore(Path(url.removeprefix(_FILE).removeprefix("//")))
    return open_store(url, tls)
