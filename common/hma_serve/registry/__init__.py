"""Who is in the fleet: workers register under a lease, routers list and watch.

`Session` keeps one worker registered; `Watcher` follows all of them; both run on a `Store`: etcd, memory, or for
reading only a static file. The store makes single attempts, the two loops own retry and time.
"""

from hma_serve.registry.endpoints import Tls
from hma_serve.registry.etcd_store import EtcdStore
from hma_serve.registry.fleet import FleetSnapshot
from hma_serve.registry.memory import MemoryStore
from hma_serve.registry.opening import open_readable_store, open_store
from hma_serve.registry.records import PREFIX, decode_record, encode_record, record_key
from hma_serve.registry.registrar import SessionState
from hma_serve.registry.session import Session, SessionStatus
from hma_serve.registry.static_file import StaticFileStore
from hma_serve.registry.store import ReadableStore, Store
from hma_serve.registry.watcher import Watcher

__all__ = [
    "PREFIX",
    "EtcdStore",
    "FleetSnapshot",
    "MemoryStore",
    "ReadableStore",
    "Session",
    "SessionState",
    "SessionStatus",
    "StaticFileStore",
    "Store",
    "Tls",
    "Watcher",
    "decode_record",
    "encode_record",
    "open_readable_store",
    "open_store",
    "record_key",
]
