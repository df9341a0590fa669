"""Large buffers are kept between messages instead of being mapped and unmapped for each."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from hma_serve.decode import main as decode_main
from hma_serve.prefill import main as prefill_main

_FAULTS = """
import resource, sys
from hma_serve.rpc import tune_allocator
if sys.argv[1] == "tuned" and not tune_allocator():
    print("-1"); sys.exit()
def touch():
    for _ in range(20):
        bytearray(b"x" * (4 << 20))
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults of 40 buffers of 4 MiB, after as many before."""
    done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


def test_a_tuned_process_does_not_fault_its_buffers_in_again() -> None:
    tuned, plain = faults("tuned"), faults("plain")
    if tuned < 0:
        pytest.skip("the C library is not glibc")
    assert tuned * 10 < plain


@pytest.mark.parametrize("module", [prefill_main, decode_main], ids=["prefill", "decode"])
def test_both_ends_of_a_stream_tune_theirs_before_work(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    async def work(*_: object) -> None:
        done.append("work")

    monkeypatch.setattr(module, "setup_logging", lambda *_: None)
    monkeypatch.setattr(module, "tune_allocator", lambda: done.append("tune"))
    monkeypatch.setattr(module, "run_worker", work)
    assert module.main(["--model", "demo", "--etcd", "none"]) == 0
    assert done == ["tune", "work"]
