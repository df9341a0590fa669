"""Where a worker listens and registers, and what it costs: the part of the command line that all roles share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hma_serve.core.errors import InvalidArgument
from hma_serve.registry import Tls
from hma_serve.rpc import CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsConfig

_ANY_ADDRESS = ("0.0.0.0", "[::]", "")
_LAST_PORT = 65535

MOST_THREADS = 1024
"""More than a machine has cores for; far beyond it the operating system starts no more, and the engine dies unheard."""


@dataclass(frozen=True, slots=True)
class PlaceConfig:
    """What the command line decides about the place of a worker.

    Attributes:
        etcd: Registry; None: unregistered.
        registry_ttl: Seconds after which a silent worker vanishes from the registry.
        listen: host:port of gRPC; port 0 takes a free one.
        advertise: host or host:port that others use; None: the bound address.
        http_listen: host:port of /live, /ready and /metrics.
        price_per_hour: US dollars for the whole instance; 0: not stated.
        tls_dir: Certificates for mutual TLS on gRPC and to etcd; None: no encryption.
        etcd_tls_dir: Certificates for an etcd of another authority; None: `tls_dir`.
        drain_grace: Seconds that running requests get after SIGTERM.
        engine_timeout: Seconds after which an engine that stands still is ended, and the worker with it.
        log_format: `human` or `json`.
    """

    etcd: str | None
    registry_ttl: float
    listen: str
    advertise: str | None
    http_listen: str
    price_per_hour: float
    tls_dir: Path | None
    etcd_tls_dir: Path | None
    drain_grace: float
    engine_timeout: float
    log_format: str

    @property
    def least_of_place(self) -> dict[str, tuple[float | None, float]]:
        """Its numbers with their minima, as `require_at_least` takes them."""
        return {
            "--registry-ttl": (self.registry_ttl, 2),
            "--price-per-hour": (self.price_per_hour, 0),
            "--drain-grace": (self.drain_grace, 0),
            "--engine-timeout": (self.engine_timeout, 0.1),
        }

    def tls(self) -> TlsConfig | None:
        """The certificates, checked; None without TLS.

        Raises:
            InvalidArgument: They cannot be read.
        """
        return None if self.tls_dir is None else TlsConfig.in_directory(self.tls_dir)

    def require_ports_after(self, flag: str, count: int) -> None:
        """Checks that so many ports follow that of `--listen`, which has any if it is 0.

        Raises:
            InvalidArgument: They do not; names the flag.
        """
        port = self.listen.rpartition(":")[2]
        if port.isdigit() and int(port) and int(port) + count > _LAST_PORT:
            raise InvalidArgument(
                f"{flag} {count} needs as many ports after {port}, that of --listen; the last is {_LAST_PORT}",
                field=flag,
            )

    @property
    def advertises_port(self) -> bool:
        """Whether `--advertise` names the port too, which then is not the bound one."""
        return self.advertise is not None and _has_port(self.advertise)

    def advertised(self, bound: str) -> str:
        """The address that others use, given the bound one.

        Raises:
            InvalidArgument: Every interface is bound and `--advertise` does not say which one to name.
        """
        address = advertised_address(bound, self.advertise)
        if address is None and self.etcd is not None:
            raise InvalidArgument(
                f"nobody can connect to {bound}: say with --advertise under which host name this worker is found",
                field="--advertise",
            )
        return address or bound


def advertised_address(bound: str, named: str | None) -> str | None:
    """Where others find what listens on `bound`; None: every interface is bound and no name is given.

    Args:
        bound: host:port.
        named: host or host:port from the command line, an IPv6 address alone also without brackets; None: as bound.
    """
    host, _, port = bound.rpartition(":")
    if named is None:
        return None if host in _ANY_ADDRESS else bound
    if _is_bare_ipv6(named):
        named = f"[{named}]"
    return named if _has_port(named) else f"{named}:{port}"


def _is_bare_ipv6(named: str) -> bool:
    """Without brackets, as Kubernetes gives a pod's address."""
    return named.count(":") > 1 and not named.startswith("[")


def _has_port(named: str) -> bool:
    ends_in_one = named.rpartition(":")[2].isdigit() and not named.endswith("]") and ":" in named
    return ends_in_one and not _is_bare_ipv6(named)


def status_address(bound: str, advertised: str) -> str:
    """Where others find the status port: on the advertised host if every interface is bound.

    Args:
        bound: host:port of the status port.
        advertised: host:port of gRPC.
    """
    host, _, port = bound.rpartition(":")
    return f"{advertised.rpartition(':')[0]}:{port}" if host in _ANY_ADDRESS else bound


def require_at_least(least: Mapping[str, tuple[float | None, float]]) -> None:
    """Checks numbers from the command line.

    Args:
        least: For each flag its value and the smallest good one; None was not given and is good.

    Raises:
        InvalidArgument: One of them is smaller, or not a number; names the flag.
    """
    for flag, (value, minimum) in least.items():
        if value is not None and not value >= minimum:
            raise InvalidArgument(f"{flag} must be at least {minimum}, not {value}", field=flag)


def require_at_most(most: Mapping[str, tuple[int, int]]) -> None:
    """Checks numbers from the command line.

    Args:
        most: For each flag its value and the largest good one.

    Raises:
        InvalidArgument: One of them is larger; names the flag.
    """
    for flag, (value, maximum) in most.items():
        if value > maximum:
            raise InvalidArgument(f"{flag} must be at most {maximum}, not {value}", field=flag)


def add_place_arguments(parser: argparse.ArgumentParser, *, listen: str) -> None:
    """Adds the flags of `PlaceConfig`.

    Args:
        parser: Of a service's whole command line.
        listen: Default of `--listen`.
    """
    place = parser.add_argument_group("place")
    place.add_argument(
        "--etcd",
        default=os.environ.get("ETCD_ENDPOINTS", "none"),
        metavar="URL[,URL]|none",
        help="the registry; none: do not register (environment: ETCD_ENDPOINTS)",
    )
    place.add_argument(
        "--registry-ttl",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="lease in the registry (default: %(default)s)",
    )
    place.add_argument(
        "--listen", default=listen, metavar="HOST:PORT", help="gRPC; port 0: a free one (default: %(default)s)"
    )
    place.add_argument("--advertise", metavar="HOST[:PORT]", help="where others find this worker; default: as bound")
    place.add_argument(
        "--http-listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="/live, /ready and /metrics; port 0: a free one (default: %(default)s)",
    )
    place.add_argument(
        "--price-per-hour",
        type=float,
        default=0.0,
        metavar="USD",
        help="of this worker; 0: not stated (default: %(default)s)",
    )
    add_tls_argument(place)
    add_etcd_tls_argument(place)
    place.add_argument(
        "--drain-grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for running requests after SIGTERM (default: %(default)s)",
    )
    place.add_argument(
        "--engine-timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="after which an engine that stands still, in one step, is ended and the worker with it (default: "
        "%(default)s)",
    )
    place.add_argument(
        "--log-format", default="human", choices=["human", "json"], help="of the log on stderr (default: %(default)s)"
    )


def add_tls_argument(parser: argparse._ActionsContainer) -> None:
    """Adds `--tls-dir`."""
    parser.add_argument(
        "--tls-dir",
        type=Path,
        metavar="DIR",
        help="mutual TLS on every gRPC port and to etcd, with ca.crt, tls.crt and tls.key of this directory",
    )


def add_etcd_tls_argument(parser: argparse._ActionsContainer) -> None:
    """Adds `--etcd-tls-dir`."""
    parser.add_argument(
        "--etcd-tls-dir",
        type=Path,
        metavar="DIR",
        help="instead of --tls-dir's for an etcd of another authority: its ca.crt, and tls.crt and tls.key if it wants "
        "a certificate",
    )


def etcd_tls(tls: TlsConfig | None, directory: Path | None = None) -> Tls | None:
    """Certificates for the registry's client: those of `directory` if it is given, else the services' own.

    Raises:
        InvalidArgument: The directory holds no `ca.crt`, or one of certificate and key alone.
    """
    if directory is not None:
        ca, certificate, key = (directory / name for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE))
        files = Tls(ca, certificate if certificate.exists() else None, key if key.exists() else None)
        files.credentials()
        return files
    return None if tls is None else Tls(tls.ca, tls.certificate, tls.key)


def registry_of(text: str) -> str | None:
    """The value of `--etcd`, None where it says that there is none."""
    return None if text in ("", "none") else text
