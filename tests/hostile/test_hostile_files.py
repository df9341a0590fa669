"""Every rule of the format has a file that breaks it; readers refuse each with that rule, and with little memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hostile.fuzz import fuzz
from hostile.targets import FILES, TARGETS

from hma_serve import kvblock
from hma_serve.cli.kv_capture import read_capture
from hma_serve.kvblock import errors

CAPTURES = sorted(FILES.glob("*.kv"))
RULES = {
    kind.rule for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, kvblock.KvFormatError)
}
BETWEEN_PAIRS = {"incompatible"}  # of no file by itself


def test_every_rule_has_a_file() -> None:
    assert {path.name.split(".")[0] for path in CAPTURES} == RULES - {""} - BETWEEN_PAIRS


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)
def test_a_reader_refuses_it_with_that_rule(path: Path) -> None:
    rule = path.name.split(".")[0]
    with pytest.raises(kvblock.KvFormatError) as refused:
        _receive(path.read_bytes())
    assert refused.value.rule == rule
    assert refused.value.code in ("data_loss", "failed_precondition")
    assert refused.value.field
    assert len(refused.value.message) < 400
    assert read_capture(path.read_bytes()).problems[0].rule == rule


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)
def test_a_refusal_takes_little_memory(path: Path) -> None:
    data = path.read_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(kvblock.KvFormatError):
            _receive(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_refused_or_right(name: str) -> None:
    outcomes = fuzz(name, 400 if name.startswith("payload") else 3000, seed=1)
    assert len(outcomes) > 1 or name in ("capture", "index")


def test_the_fuzzer_runs_with_its_memory_capped() -> None:
    program = Path(__file__).parent / "fuzz.py"
    done = subprocess.run(
        [sys.executable, str(program), "--inputs", "300", "manifest", "block"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["manifest", "block"]


def test_the_fuzzer_notices_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(data: bytes) -> None:
        _ = data[40]

    monkeypatch.setitem(TARGETS, "offer", fragile)
    with pytest.raises(AssertionError, match="IndexError"):
        fuzz("offer", 2000, seed=0)


def _receive(data: bytes) -> None:
    """As a receiver does: the first refusal ends it."""
    reader = None
    for _, frame in kvblock.split_frames(data):
        header, payload = kvblock.decode_frame(frame)
        if header.HasField("open"):
            plan = kvblock.validate_manifest(header.open.manifest)
            reader = kvblock.StreamReader(plan, header.open.ticket, header.open.epoch)
        elif header.HasField("block"):
            assert reader is not None
            reader.validate(header.block, payload)
        else:
            assert reader is not None
            reader.finish(header.end)
