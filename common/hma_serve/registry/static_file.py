"""A fleet written down in a file, for a few machines without etcd: the store's reading half.

The file is a JSON list of instance records as `records.encode_record` writes them. It is read again when it changes
(replace it by a rename, so that nobody reads half of it); what changed reaches watches like any other event. While it
is missing or broken the store does not answer, which leaves routers with the last fleet that they knew.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from hma_serve.core.errors import InvalidArgument, Unavailable
from hma_serve.registry.memory import MemoryStore, MemoryWatch
from hma_serve.registry.records import PREFIX, decode_record, record_key
from hma_serve.registry.store import Batch, Entry, Listing

MAX_FILE_BYTES = 16 * 1024 * 1024


class StaticFileStore:
    """`ReadableStore` on a file.

    Args:
        path: The JSON file.
        poll: Seconds between looks at it while somebody watches.
    """

    def __init__(self, path: Path, *, poll: float = 1.0) -> None:
        self._path = path
        self._memory = MemoryStore(pulse=poll)
        self._lock = threading.Lock()
        self._signature: tuple[int, int, int] | None = None

    def check(self, timeout: float) -> None:
        """See `ReadableStore`."""
        self.refresh()

    def get(self, key: str, timeout: float) -> Entry | None:
        """See `ReadableStore`."""
        self.refresh()
        return self._memory.get(key, timeout)

    def list(self, prefix: str, timeout: float) -> Listing:
        """See `ReadableStore`."""
        self.refresh()
        return self._memory.list(prefix, timeout)

    def watch(self, prefix: str, start_revision: int) -> StaticFileWatch:
        """See `ReadableStore`."""
        return StaticFileWatch(self, self._memory.watch(prefix, start_revision))

    def close(self) -> None:
        """See `ReadableStore`."""
        self._memory.close()

    def refresh(self) -> None:
        """Reads the file if it has changed.

        Raises:
            Unavailable: It cannot be read or is no JSON list; the last good content stays in force.
        """
        with self._lock:
            try:
                found = self._path.stat()
                signature = (found.st_mtime_ns, found.st_size, found.st_ino)
                if signature == self._signature:
                    return
                wanted = _parse(self._path, found.st_size)
            except OSError as error:
                raise Unavailable(f"cannot read the fleet from {self._path}: {error.strerror}") from error
            except (ValueError, RecursionError) as error:
                raise Unavailable(f"{self._path} is no JSON list of instance records: {error}") from error
            self._apply(wanted)
            self._signature = signature

    def _apply(self, wanted: dict[str, bytes]) -> None:
        present = {entry.key: entry.value for entry in self._memory.list(PREFIX, 0).entries}
        for key in present.keys() - wanted.keys():
            self._memory.delete(key)
        for key in sorted(wanted):
            if present.get(key) != wanted[key]:
                self._memory.put(key, wanted[key])


class StaticFileWatch:
    """`WatchStream` of a `StaticFileStore`: looks at the file whenever the store behind it gives a sign of life."""

    def __init__(self, store: StaticFileStore, inner: MemoryWatch) -> None:
        self._store, self._inner = store, inner

    def __iter__(self) -> Iterator[Batch]:
        """See `WatchStream`."""
        for batch in self._inner:
            self._store.refresh()
            yield batch

    def close(self) -> None:
        """See `WatchStream`."""
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(path: Path, size: int) -> dict[str, bytes]:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MAX_FILE_BYTES}")
    items = json.loads(path.read_bytes())
    if not isinstance(items, list):
        raise ValueError("it is no list")  # noqa: TRY004  (of the file's content, which is no argument)
    return dict(_named(index, json.dumps(item).encode()) for index, item in enumerate(items))


def _named(index: int, value: bytes) -> tuple[str, bytes]:
    try:
        return record_key(decode_record(value)), value
    except InvalidArgument:
        # Watchers skip and count it, as they do with a broken record from any other store.
        return f"{PREFIX}broken/{index}", value
