"""`hma-serve up`: etcd, a router, prefill and decode workers on this machine, serving one model.

Every part is the process that a cluster would run, started with the flags that a cluster would give. `up` only starts
them in order, waits until a request can be served, shows one, and takes them down again: router first, so that nothing
new arrives while the workers drain, etcd last.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import http.client
import json
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hma_serve.checkpoint import add_model_arguments, resolve_checkpoint
from hma_serve.cli.asking import leave_stdout
from hma_serve.cli.children import Children, describe_end
from hma_serve.core.errors import FailedPrecondition, HmaError, InvalidArgument, Unavailable
from hma_serve.core.worker import WorkerInfo
from hma_serve.prefill.config import build_parser as build_prefill_parser
from hma_serve.prefill.profiles import find_profile
from hma_serve.registry import Tls, Watcher, open_store
from hma_serve.registry.local_etcd import LocalEtcd
from hma_serve.rpc import TlsConfig
from hma_serve.worker import add_tls_argument, etcd_tls

DTYPES = ("bfloat16", "float32")
SAMPLE_PROMPT = "It was a dark and stormy night, and the old house"
SAMPLE_TOKENS = 48
SAMPLE_SEED = 7
MAX_WORKERS = 64
ETCD_PORT = 2379
MAX_SECONDS = 86_400

_POLL_SECONDS = 0.1
_HTTP_TIMEOUT = 60.0
_LEAVING_SECONDS = 15.0
_CUTTING_SECONDS = 5.0


@dataclass(frozen=True)
class UpConfig:
    """What `hma-serve up` runs.

    Attributes:
        model: `demo`, a checkpoint directory or a Hub id.
        prefill: Number of prefill workers.
        decode: Number of decode workers.
        prefill_profile: How prefill computes and packs.
        dtype: Decode's weights and generated KV.
        host: Address that the router listens on.
        http_port: The router's HTTP port; 0 takes a free one.
        grpc_port: The router's gRPC port; 0 takes a free one.
        etcd: URLs of a running etcd; None starts one.
        etcd_port: Client port of the one that is started; 0 takes a free one.
        data_dir: Keeps etcd's data and the logs; None uses a temporary directory.
        tls_dir: Certificates for mutual TLS between all parts; None: no encryption.
        log_format: Of the children's logs.
        start_timeout: Seconds until the cluster must be ready.
        drain_grace: Seconds that each process gets to finish what runs.
        prefill_arguments: More flags for each prefill worker.
        decode_arguments: More flags for each decode worker.
        router_arguments: More flags for the router.
    """

    model: str
    prefill: int
    decode: int
    prefill_profile: str
    dtype: str
    host: str
    http_port: int
    grpc_port: int
    etcd: str | None
    etcd_port: int
    data_dir: Path | None
    tls_dir: Path | None
    log_format: str
    start_timeout: float
    drain_grace: float
    prefill_arguments: tuple[str, ...]
    decode_arguments: tuple[str, ...]
    router_arguments: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve up", description="Serve a model from a whole cluster on this machine."
    )
    add_model_arguments(parser)
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers (default: 1)")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode workers (default: 1)")
    parser.add_argument(
        "--prefill-profile",
        metavar="NAME",
        default="tt_bfp8",
        help="prefill's arithmetic and KV codec (default: tt_bfp8)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="decode's weights (default: bfloat16)")
    parser.add_argument("--host", default="127.0.0.1", help="address the router listens on (default: 127.0.0.1)")
    parser.add_argument("--http-port", type=int, default=8000, help="the router's HTTP port; 0: any (default: 8000)")
    parser.add_argument("--grpc-port", type=int, default=50051, help="the router's gRPC port; 0: any (default: 50051)")
    parser.add_argument("--etcd", metavar="URL[,URL]", help="use this etcd instead of starting one")
    parser.add_argument(
        "--etcd-port",
        type=int,
        help=f"the started etcd's port; 0: any (default: {ETCD_PORT}, or any where that is taken)",
    )
    parser.add_argument("--data-dir", type=Path, help="keep etcd's data and the logs here (default: a temporary one)")
    add_tls_argument(parser)
    parser.add_argument("--log-format", choices=("human", "json"), default="human")
    parser.add_argument("--start-timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument(
        "--drain-grace", type=float, default=30.0, metavar="SECONDS", help="for running requests, on Ctrl-C"
    )
    examples = {"prefill": "--chunk-tokens=256", "decode": "--max-running=8", "router": "--max-waiting=100"}
    for role, example in examples.items():
        parser.add_argument(
            f"--{role}-arg",
            action="append",
            default=[],
            metavar="FLAG=VALUE",
            help=f"pass a flag on to each {role}, for example --{role}-arg={example}; may be repeated",
        )
    return parser


def parse_config(argv: Sequence[str]) -> UpConfig:
    """Parses and checks the command line; raises InvalidArgument."""
    args = build_parser().parse_args(argv)
    for flag, count, least in (("--prefill", args.prefill, 0), ("--decode", args.decode, 1)):
        if not least <= count <= MAX_WORKERS:
            raise InvalidArgument(f"{flag} must be between {least} and {MAX_WORKERS}, not {count}", field=flag)
    ports = (("--http-port", args.http_port), ("--grpc-port", args.grpc_port), ("--etcd-port", args.etcd_port or 0))
    for flag, port in ports:
        if not 0 <= port <= 65535:
            raise InvalidArgument(f"{flag} must be between 0 and 65535, not {port}", field=flag)
    if args.http_port and args.http_port == args.grpc_port:
        raise InvalidArgument(f"--http-port and --grpc-port are both {args.http_port}", field="--grpc-port")
    for flag, seconds in (("--drain-grace", args.drain_grace), ("--start-timeout", args.start_timeout)):
        if not 0 <= seconds < MAX_SECONDS:
            raise InvalidArgument(f"{flag} must be between 0 and {MAX_SECONDS} seconds, not {seconds:g}", field=flag)
    if args.prefill:
        prefill = build_prefill_parser().parse_args(["--profile", args.prefill_profile, *args.prefill_arg])
        find_profile(prefill.profile, prefill.profiles)
    return UpConfig(
        model=args.model,
        prefill=args.prefill,
        decode=args.decode,
        prefill_profile=args.prefill_profile,
        dtype=args.dtype,
        host=args.host,
        http_port=args.http_port or free_port(args.host),
        grpc_port=args.grpc_port or free_port(args.host),
        etcd=args.etcd,
        etcd_port=_etcd_port() if args.etcd_port is None else args.etcd_port,
        data_dir=args.data_dir,
        tls_dir=args.tls_dir,
        log_format=args.log_format,
        start_timeout=args.start_timeout,
        drain_grace=args.drain_grace,
        prefill_arguments=tuple(args.prefill_arg),
        decode_arguments=tuple(args.decode_arg),
        router_arguments=tuple(args.router_arg),
    )


def _etcd_port() -> int:
    """The one that everybody expects, or any."""
    try:
        check_port("127.0.0.1", ETCD_PORT, "--etcd-port")
    except FailedPrecondition:
        return 0
    return ETCD_PORT


def free_port(host: str) -> int:
    """A port that is free now; raises FailedPrecondition when the address is not ours."""
    try:
        with socket.create_server((host, 0)) as probe:
            return int(probe.getsockname()[1])
    except OSError as exc:
        raise _not_ours(host, exc) from exc


def check_port(host: str, port: int, flag: str) -> None:
    """Raises FailedPrecondition when nothing could listen there, before anything is started."""
    try:
        socket.create_server((host, port)).close()
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise FailedPrecondition(f"port {port} on {host} is taken; choose another with {flag}", field=flag) from exc
        raise _not_ours(host, exc) from exc


def _not_ours(host: str, exc: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"cannot listen on {host}: {exc.strerror or exc}; give an IPv4 address of this machine with --host",
        field="--host",
    )


@contextlib.contextmanager
def data_directory(chosen: Path | None) -> Iterator[Path]:
    """The chosen directory, kept; or a temporary one, removed at the end unless an error points to a log in it."""
    if chosen is not None:
        with claimed(chosen):
            yield chosen
        return
    directory = Path(tempfile.mkdtemp(prefix="hma-serve-"))
    needed = False
    try:
        yield directory
    except HmaError as exc:
        needed = str(directory) in exc.message
        raise
    finally:
        if not needed:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Makes the directory and holds it, so that no two clusters write the same files."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("ab")
    except OSError as exc:
        raise FailedPrecondition(f"cannot use {directory}: {exc.strerror}", field="--data-dir") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise FailedPrecondition(
                f"{directory} is in use by another `hma-serve up`; choose another --data-dir", field="--data-dir"
            ) from exc
        yield


@contextlib.contextmanager
def registry(config: UpConfig, directory: Path, tls: Tls | None) -> Iterator[Registry]:
    """The chosen etcd, checked; or one that lives as long as the context."""
    if config.etcd is not None:
        store = open_store(config.etcd, tls)
        try:
            store.check(timeout=5.0)
        finally:
            store.close()
        yield Registry(config.etcd, tls)
        return
    launcher = [sys.executable, "-m", "hma_serve.cli.tethered"]
    log_path = directory / "logs" / "etcd.log"
    port = config.etcd_port
    with LocalEtcd(directory / "etcd", client_port=port, log_path=log_path, tls=tls, launcher=launcher) as etcd:
        yield Registry(etcd.url, tls, etcd, log_path)


@dataclass(frozen=True)
class Registry:
    """The etcd of the cluster.

    Attributes:
        urls: For `--etcd`.
        tls: To speak with it.
        own: Set when `up` started it.
        log: What `own` writes.
    """

    urls: str
    tls: Tls | None
    own: LocalEtcd | None = None
    log: Path | None = None

    def check(self) -> None:
        """Raises Unavailable if an etcd of ours has ended."""
        status = None if self.own is None else self.own.poll()
        if status is not None:
            raise Unavailable(f"etcd {describe_end(status)}; its log is {self.log}")


def role_command(role: str, *flags: str) -> list[str]:
    """The command line of one service."""
    return [sys.executable, "-m", "hma_serve.cli.main", role, *flags]


def start_services(config: UpConfig, children: Children, etcd: str) -> None:
    """Starts decode, prefill and router."""
    common = ["--model", config.model, "--etcd", etcd, "--log-format", config.log_format]
    if config.tls_dir is not None:
        common += ["--tls-dir", str(config.tls_dir)]
    common += ["--drain-grace", f"{config.drain_grace:g}"]
    worker = [*common, "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"]
    for index in range(config.decode):
        flags = [*worker, "--dtype", config.dtype, *config.decode_arguments]
        children.start(f"decode-{index}", role_command("decode", *flags))
    for index in range(config.prefill):
        flags = [*worker, "--profile", config.prefill_profile, *config.prefill_arguments]
        children.start(f"prefill-{index}", role_command("prefill", *flags))
    entrance = ["--http-listen", f"{config.host}:{config.http_port}"]
    entrance += ["--grpc-listen", f"{config.host}:{config.grpc_port}"]
    children.start("router", role_command("router", *common, *entrance, *config.router_arguments))


def is_ready(host: str, port: int) -> bool:
    """Whether the router's `/ready` answers 200."""
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_ready(config: UpConfig, children: Children, etcd: Registry, stop: threading.Event) -> tuple[WorkerInfo, ...]:
    """Waits until every worker is registered and the router can serve; returns the workers, none when stopped.

    Raises:
        Unavailable: A child ended, or the time is up.
    """
    deadline = time.monotonic() + config.start_timeout
    store = open_store(etcd.urls, etcd.tls)
    try:
        with Watcher(store) as watcher:
            while not stop.wait(_POLL_SECONDS):
                children.check()
                etcd.check()
                workers = tuple(watcher.current.workers.values())
                if len(workers) >= config.prefill + config.decode and is_ready(config.host, config.http_port):
                    return workers
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"the cluster was not ready within {config.start_timeout:g} seconds; "
                        f"raise --start-timeout or look at the logs in {children.log_directory}"
                    )
    finally:
        store.close()
    return ()


def describe(config: UpConfig, workers: Sequence[WorkerInfo], etcd: str, directory: Path) -> str:
    """The table of what listens where."""
    rows = [("router", "HTTP (OpenAI API)", f"http://{config.host}:{config.http_port}")]
    rows.append(("router", "gRPC (Inference)", f"{config.host}:{config.grpc_port}"))
    for worker in sorted(workers, key=lambda worker: (worker.role, worker.instance)):
        detail = worker.profile if worker.profile else config.dtype
        rows.append((worker.instance, f"gRPC ({detail})", worker.address))
        rows.append((worker.instance, "metrics", f"http://{worker.http_address}/metrics"))
    rows.append(("etcd", "client", etcd))
    if config.data_dir is not None:
        rows.append(("logs", "", str(directory / "logs")))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {name:{widths[0]}}  {what:{widths[1]}}  {where}" for name, what, where in rows)


def stream_sample(config: UpConfig) -> Iterator[str]:
    """One streamed completion through the public API, piece by piece; raises Unavailable when it fails."""
    body = {
        "prompt": SAMPLE_PROMPT,
        "max_tokens": SAMPLE_TOKENS,
        "temperature": 0.7,
        "seed": SAMPLE_SEED,
        "stream": True,
    }
    connection = http.client.HTTPConnection(config.host, config.http_port, timeout=_HTTP_TIMEOUT)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise Unavailable(f"the sample prompt failed with status {response.status}: {response.read(500)!r}")
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise Unavailable(f"the sample prompt failed: {event['error'].get('message')}")
            yield from (choice["text"] for choice in event["choices"])
    except (OSError, http.client.HTTPException) as exc:
        raise Unavailable(f"the sample prompt failed: {exc}") from exc
    finally:
        connection.close()


def show_sample(config: UpConfig, children: Children) -> None:
    """Prints the sample prompt and its continuation as it comes."""
    print(f"\n  {SAMPLE_PROMPT}", end="", flush=True)
    try:
        for text in stream_sample(config):
            print(text.replace("\n", "\n  "), end="", flush=True)
    except Unavailable as exc:
        # A child that died explains it better.
        children.check()
        raise Unavailable(f"{exc.message}; the logs are in {children.log_directory}") from exc
    print("\n", flush=True)


def serve(config: UpConfig, stop: threading.Event, urgent: threading.Event) -> None:
    """Runs the cluster until `stop`; raises when it cannot start or a process ends."""
    resolve_checkpoint(config.model)
    with data_directory(config.data_dir) as directory:
        children = Children(directory / "logs")
        print(f"starting {config.decode} decode, {config.prefill} prefill ({config.prefill_profile}) and a router ...")
        tls = None if config.tls_dir is None else etcd_tls(TlsConfig.in_directory(config.tls_dir))
        with registry(config, directory, tls) as etcd:
            try:
                start_services(config, children, etcd.urls)
                workers = wait_ready(config, children, etcd, stop)
                if not stop.is_set():
                    print(describe(config, workers, etcd.urls, directory))
                    show_sample(config, children)
                    print("serving; Ctrl-C drains and stops", flush=True)
                while not stop.wait(_POLL_SECONDS):
                    children.check()
                    etcd.check()
            except BaseException:
                children.kill()
                raise
            take_down(children, config.drain_grace, urgent)


def take_down(children: Children, drain: float, urgent: threading.Event) -> None:
    """Stops the children in order; a second Ctrl-C kills them once the router has ended its streams with an error."""
    print(f"\ndraining, for {drain:g} s at most; Ctrl-C again ends it at once ...", flush=True)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            if urgent.is_set():
                children.hurry("router", _CUTTING_SECONDS)
                for child in list(children.running):
                    child.process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    # Each child ends what runs within `drain`; the margin is for saying so and leaving.
    killed = children.stop(drain + _LEAVING_SECONDS)
    done.set()
    watcher.join()
    print(f"stopped{'; killed ' + ', '.join(killed) if killed else ''}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = parse_config(sys.argv[1:] if argv is None else argv)
    check_port(config.host, config.http_port, "--http-port")
    check_port(config.host, config.grpc_port, "--grpc-port")
    if config.etcd is None:
        check_port("127.0.0.1", config.etcd_port, "--etcd-port")
    stop, urgent = threading.Event(), threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        (urgent if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        serve(config, stop, urgent)
    except BrokenPipeError:
        return leave_stdout()
    return 0
