"""`hma-serve top`: workers, load, KV occupancy, objectives attained and transfer rates, live in the terminal.

Workers and routers come from the registry, and everything else from each service's /metrics, so it shows what a
monitoring system would see. Rates and shares are over the last `WINDOW_SECONDS`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hma_serve.cli.scrape import Scraper
from hma_serve.cli.top_view import Seen, render
from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.registry import Watcher, open_readable_store
from hma_serve.rpc import TlsConfig
from hma_serve.worker import add_etcd_tls_argument, add_tls_argument, etcd_tls

WINDOW_SECONDS = 10.0
"""What rates are taken over."""

_LIST_SECONDS = 5.0
# What is asked where no router is registered or named: the one of `hma-serve up`.
_DEFAULT_ROUTER = "http://127.0.0.1:8000"
_SCRAPE_SECONDS = 2.0
_MIN_INTERVAL, _MAX_INTERVAL = 0.2, 60.0
_ENTER = "\x1b[?1049h\x1b[?25l"
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


@dataclass(frozen=True)
class TopConfig:
    """What to look at.

    Attributes:
        registry: As for `hma-serve router --etcd`.
        tls_dir: Certificates for the registry; None: no encryption.
        etcd_tls_dir: Certificates for a registry of another authority; None: `tls_dir`.
        routers: Base URLs of routers beside the registered ones.
        interval: Seconds between two looks.
        once: One look, without escape sequences.
    """

    registry: str
    tls_dir: Path | None
    etcd_tls_dir: Path | None
    routers: tuple[str, ...]
    interval: float
    once: bool


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve top",
        description="Show workers, load, KV occupancy, objectives attained and transfer rates. q or Ctrl-C ends it.",
        epilog="Without a terminal that can be drawn on, or with --once, it prints one look and ends.",
    )
    parser.add_argument(
        "--etcd",
        default=os.environ.get("ETCD_ENDPOINTS", ""),
        metavar="URL[,URL]",
        help="registry of the workers; file:PATH names a static list (environment: ETCD_ENDPOINTS)",
    )
    add_tls_argument(parser)
    add_etcd_tls_argument(parser)
    parser.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="URL",
        help="a router that is not registered, by its HTTP address; may be repeated",
    )
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="print one look and end")
    return parser


def parse_config(argv: Sequence[str] | None) -> TopConfig:
    """Parses and checks the command line; raises InvalidArgument."""
    args = build_parser().parse_args(argv)
    if not args.etcd:
        raise InvalidArgument(
            "there is no registry to find workers in: give --etcd http://HOST:2379 (`hma-serve up` prints it), or set "
            "ETCD_ENDPOINTS",
            field="--etcd",
        )
    if not _MIN_INTERVAL <= args.interval <= _MAX_INTERVAL:
        raise InvalidArgument(
            f"--interval must be between {_MIN_INTERVAL} and {_MAX_INTERVAL:g} seconds, not {args.interval:g}",
            field="--interval",
        )
    routers = [url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}" for url in args.router]
    return TopConfig(
        registry=args.etcd,
        tls_dir=args.tls_dir,
        etcd_tls_dir=args.etcd_tls_dir,
        routers=tuple(routers),
        interval=args.interval,
        once=args.once or not _is_screen(),
    )


def _is_screen() -> bool:
    """Whether stdout can be drawn on. Python has no stdout at all where the shell closed it."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    config = parse_config(argv)
    tls = None if config.tls_dir is None else TlsConfig.in_directory(config.tls_dir)
    store = open_readable_store(config.registry, etcd_tls(tls, config.etcd_tls_dir))
    try:
        with Watcher(store) as watcher, contextlib.suppress(KeyboardInterrupt):
            watcher.wait_listed_blocking(_LIST_SECONDS)
            asyncio.run(_look_once(config, watcher) if config.once else _look_on(config, watcher))
    finally:
        store.close()
    return 0


async def _look_once(config: TopConfig, watcher: Watcher) -> None:
    async with Scraper(timeout=_SCRAPE_SECONDS, window=2) as scraper:
        # The first look gives the rates their beginning.
        await _look(config, watcher, scraper)
        await asyncio.sleep(config.interval)
        seen = await _look(config, watcher, scraper)
    try:
        print(render(seen, 10_000, bold=False), flush=True)
    except BrokenPipeError:
        pass
    except OSError as exc:
        raise FailedPrecondition(f"cannot write to stdout: {exc.strerror}") from exc


async def _look_on(config: TopConfig, watcher: Watcher) -> None:
    window = max(2, round(WINDOW_SECONDS / config.interval) + 1)
    bold = "NO_COLOR" not in os.environ
    async with Scraper(timeout=_SCRAPE_SECONDS, window=window) as scraper:
        with _screen() as keys:
            while True:
                seen = await _look(config, watcher, scraper)
                width, height = shutil.get_terminal_size()
                lines = render(seen, width, bold=bold).split("\n")[:height]
                sys.stdout.write(_HOME + f"{_CLEAR_LINE}\n".join(lines) + _CLEAR_LINE + _CLEAR_BELOW)
                sys.stdout.flush()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(config.interval):
                        while await keys.get() not in (b"q", b"Q"):
                            pass
                        return


async def _look(config: TopConfig, watcher: Watcher, scraper: Scraper) -> Seen:
    snapshot = watcher.current
    workers = list(snapshot.workers.values())
    urls = {worker.instance: f"http://{worker.http_address}/metrics" for worker in workers}
    registered = [f"http://{router.http_address}" for router in snapshot.routers.values()]
    routers = list(dict.fromkeys([*config.routers, *sorted(registered)])) or [_DEFAULT_ROUTER]
    pairs = await scraper.ask([*urls.values(), *(f"{router}/metrics" for router in routers)])
    return Seen(
        clock=time.strftime("%H:%M:%S"),
        workers=[(worker, pairs[urls[worker.instance]]) for worker in workers],
        routers=[(router, pairs[f"{router}/metrics"]) for router in routers],
        stale_seconds=None if snapshot.stale_since is None else time.monotonic() - snapshot.stale_since,
    )


@contextlib.contextmanager
def _screen() -> Iterator[asyncio.Queue[bytes]]:
    """The terminal's other screen, without cursor; yields the keys that are pressed. All is as before afterwards."""
    keys: asyncio.Queue[bytes] = asyncio.Queue(maxsize=16)
    fd = sys.stdin.fileno()
    interactive = os.isatty(fd)
    before = termios.tcgetattr(fd) if interactive else None
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        with contextlib.suppress(asyncio.QueueFull):
            keys.put_nowait(os.read(fd, 1))

    sys.stdout.write(_ENTER)
    try:
        if interactive:
            tty.setcbreak(fd)
            loop.add_reader(fd, pressed)
        yield keys
    finally:
        if before is not None:
            loop.remove_reader(fd)
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
