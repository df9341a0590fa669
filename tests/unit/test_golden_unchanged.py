"""Golden files never change: every file that is listed has its hash, and every file of the KV format is listed."""

from __future__ import annotations

import hashlib

from support.kv_streams import GOLDEN

FOLDERS = ("descriptors", "kv_vectors", "kvblock", "semantics", "tenstorrent")
LISTED = dict(line.split("  ", 1)[::-1] for line in (GOLDEN / "SHA256SUMS").read_text().splitlines())


def test_nothing_has_changed() -> None:
    changed = [
        name for name, digest in LISTED.items() if hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() != digest
    ]
    assert changed == []


def test_everything_is_listed() -> None:
    files = {
        str(path.relative_to(GOLDEN))
        for folder in FOLDERS
        for path in (GOLDEN / folder).rglob("*")
        if path.is_file() and path.name != "README.md"
    }
    assert files == set(LISTED)
