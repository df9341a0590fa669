"""What the fronts of all workers share: from the command line's place to the last drained request.

A service brings its own RPCs, its engine and its gauges; registration, readiness, draining, `hma_serve.v1.Worker` and
the order in which a process begins and ends are here, once.
"""

from hma_serve.worker.drain import Drain, DrainResult
from hma_serve.worker.front import WorkerFront
from hma_serve.worker.help_text import DefaultsHelpFormatter
from hma_serve.worker.host import available_memory, default_threads
from hma_serve.worker.lifecycle import Worker, run_worker
from hma_serve.worker.load import WatchedLoad
from hma_serve.worker.place import (
    MOST_THREADS,
    PlaceConfig,
    add_etcd_tls_argument,
    add_place_arguments,
    add_tls_argument,
    advertised_address,
    etcd_tls,
    registry_of,
    require_at_least,
    require_at_most,
)
from hma_serve.worker.servicer import WorkerServicer

__all__ = [
    "MOST_THREADS",
    "DefaultsHelpFormatter",
    "Drain",
    "DrainResult",
    "PlaceConfig",
    "WatchedLoad",
    "Worker",
    "WorkerFront",
    "WorkerServicer",
    "add_etcd_tls_argument",
    "add_place_arguments",
    "add_tls_argument",
    "advertised_address",
    "available_memory",
    "default_threads",
    "etcd_tls",
    "registry_of",
    "require_at_least",
    "require_at_most",
    "run_worker",
]
