"""`hma-serve kv`: in pipes and on files, with exit statuses that scripts can rely on, and the golden set it writes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from hma_serve import kvblock
from hma_serve.cli import kv
from hma_serve.cli.kv_capture import MAX_PROBLEMS
from hma_serve.cli.kv_vectors import golden_values
from hma_serve.v1.kv_transfer_pb2 import PushOpen
from support import plain_producer
from support.kv_streams import GOLDEN

VECTORS = GOLDEN / "kv_vectors"
FILES = sorted(path.relative_to(VECTORS) for path in VECTORS.rglob("*") if path.is_file())
ENTRIES = json.loads((VECTORS / "vectors.json").read_text())["vectors"]


class _Std(io.TextIOWrapper):
    def __init__(self, data: bytes = b"") -> None:
        super().__init__(io.BytesIO(data))

    def written(self) -> bytes:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


def run(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], stdin: bytes = b"") -> tuple[int, bytes]:
    out = _Std()
    monkeypatch.setattr(sys, "stdin", _Std(stdin))
    monkeypatch.setattr(sys, "stdout", out)
    status = kv.main(arguments)
    return status, out.written()


def test_the_golden_set_is_written_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out = run(monkeypatch, ["vectors", str(tmp_path / "new")])
    assert status == 0
    assert out.startswith(str(len(FILES)).encode())
    assert (
        sorted(path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*") if path.is_file()) == FILES
    )
    for file in FILES:
        assert (tmp_path / "new" / file).read_bytes() == (VECTORS / file).read_bytes(), file


def test_the_golden_set_has_every_codec() -> None:
    assert {entry["codec"] for entry in ENTRIES} == set(kvblock.codec_names())
    assert golden_values().astype("<f4").tobytes() == (VECTORS / "values.f32.bin").read_bytes()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['codec']}-{entry['rounding']}")
def test_encode_and_decode_in_a_pipe(entry: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ["--codec", entry["codec"], "--rows", "64", "--cols", "64"]
    values = (VECTORS / "values.f32.bin").read_bytes()
    status, payload = run(monkeypatch, ["encode", *shape, "--rounding", entry["rounding"]], values)
    assert (status, payload) == (0, (VECTORS / entry["payload"]).read_bytes())
    status, decoded = run(monkeypatch, ["decode", *shape], payload)
    assert (status, decoded) == (0, (VECTORS / entry["decoded"]).read_bytes())


def test_heads_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((2, 32, 32)).astype("<f4")
    shape = ["--codec", "tt_bfp8_b", "--rows", "32", "--cols", "32"]
    status, payload = run(monkeypatch, ["encode", *shape, "--heads", "2"], values.tobytes())
    single = [run(monkeypatch, ["encode", *shape], head.tobytes())[1] for head in values]
    assert (status, payload) == (0, b"".join(single))


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "said"),
    [
        (["decode", "--codec", "bf16", "--rows", "32", "--cols", "1"], bytes(63), 1, "63 bytes, not the 64"),
        (["decode", "--codec", "bf16", "--rows", "32", "--cols", "1"], bytes(65), 1, "more bytes"),
        (["decode", "--codec", "bf16", "--rows", "32", "--cols", "1"], b"\xff" * 64, 1, "banned_code"),
        (["encode", "--codec", "bf16", "--rows", "32", "--cols", "1"], b"\xff" * 128, 1, "Inf and NaN"),
        (["encode", "--codec", "fp7", "--rows", "32", "--cols", "1"], b"", 2, "tt_bfp8_b"),
        (["encode", "--codec", "bf16", "--rows", "31", "--cols", "1"], b"", 2, "multiple of 32"),
        (["encode", "--codec", "nvfp4", "--rows", "32", "--cols", "48"], b"", 2, "multiple of 32"),
        (
            ["encode", "--codec", "int8", "--rows", "32", "--cols", "1", "--rounding", "truncate"],
            bytes(128),
            2,
            "rounds",
        ),
        (["encode", "--codec", "bf16", "--rows", "960000000000", "--cols", "64"], b"", 2, "are the most at once"),
        (["decode", "--codec", "bf16", "--rows", "32000000", "--cols", "64"], b"", 1, "0 bytes, not the"),
        (["inspect", "/nonexistent"], b"", 2, "/nonexistent: No such file"),
        (["inspect", "no\x1b[31m\udcff"], b"", 2, r"no\x1b[31m\udcff: No such file"),
        (["calibrate", "--model", "demo", "--profile", "no", "--text", "no", "-o", "o"], b"", 2, "unknown profile"),
        (["calibrate", "--model", "/no", "--profile", "f32", "--text", "no", "-o", "o"], b"", 2, "no checkpoint"),
        (["calibrate", "--model", "demo", "--profile", "f32", "--text", "/no", "-o", "o"], b"", 2, "/no: No such file"),
        (
            ["calibrate", "--model", "demo", "--profile", "f32", "--text", "/no", "-o", "/nonexistent/o"],
            b"",
            2,
            "there is no directory /nonexistent",
        ),
        (["verify", str(GOLDEN / "text")], b"", 2, "neither captures"),
    ],
)
def test_exit_statuses(
    arguments: list[str],
    stdin: bytes,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, arguments, stdin) == (status, b"")
    assert said in capsys.readouterr().err


def test_inspect(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = VECTORS / "streams" / "mixed_layers.kv"
    status, table = run(monkeypatch, ["inspect", str(stream)])
    assert status == 0
    assert "nvfp4" in table.decode()
    assert table.decode().endswith("right\n")
    status, out = run(monkeypatch, ["inspect", "-", "--json"], stream.read_bytes())
    shown = json.loads(out)
    assert status == 0
    assert shown["frames"] == 8
    assert shown["problems"] == []
    assert [block["layer"] for block in shown["blocks"]] == [0, 0, 2, 2, 1, 1]
    assert {block["verdict"] for block in shown["blocks"]} == {"right"}
    assert shown["manifest"]["layer_groups"][0]["layers"] == [0, 2]
    offsets = json.loads(run(monkeypatch, ["inspect", str(VECTORS / "streams" / "k_offsets.kv"), "--json"])[1])
    assert offsets["manifest"]["k_offsets"] == [{}, {"head": 1}]


def test_a_bare_frame_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    status, table = run(monkeypatch, ["inspect", str(GOLDEN / "kvblock" / "frame_open.bin")])
    assert status == 1
    assert "tt_bfp8_b" in table.decode()
    assert "no end frame" in table.decode()


def test_verify_accepts_the_golden_set(monkeypatch: pytest.MonkeyPatch) -> None:
    status, out = run(monkeypatch, ["verify", str(VECTORS)])
    assert status == 0
    assert out.decode().count(": right: ") == 3
    assert f"{len(ENTRIES)} payloads, 0 wrong" in out.decode()


def test_verify_says_what_is_wrong_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((VECTORS / "streams" / "uniform.kv").read_bytes())
    starts = [at for at, _ in kvblock.split_frames(bytes(data))]
    data[starts[2] + 500] ^= 1  # in the payload of the second block
    data[starts[4] + 900] ^= 1
    (tmp_path / "bad.kv").write_bytes(data)
    status, out = run(monkeypatch, ["verify", str(tmp_path)])
    assert status == 1
    lines = out.decode().splitlines()
    assert [line.split(": ")[1:3] for line in lines] == [
        [f"frame 2 at byte {starts[2]}", "checksum_mismatch"],
        [f"frame 4 at byte {starts[4]}", "checksum_mismatch"],
        [f"frame 5 at byte {starts[5]}", "incomplete_coverage"],
    ]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda payload: payload[:-1], "truncated_payload"),
        (lambda payload: payload + b"\0", "trailing_bytes"),
        (lambda payload: b"\xff" + payload[1:], "banned_code"),
        (lambda payload: payload[1088:] + payload[:1088], "meaning"),  # tiles in another order
    ],
)
def test_verify_judges_a_producers_payloads(
    damage: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(damage)
    shutil.copytree(VECTORS, tmp_path / "set")
    payload = tmp_path / "set" / "payloads" / "tt_bfp8_b.nearest_even.bin"
    payload.write_bytes(damage(payload.read_bytes()))
    status, out = run(monkeypatch, ["verify", str(tmp_path / "set")])
    assert status == 1
    wrong = [line for line in out.decode().splitlines() if "payloads/" in line]
    assert len(wrong) == 1
    assert wrong[0].startswith(f"payloads/tt_bfp8_b.nearest_even.bin: {said}")


def test_a_producer_that_was_written_from_the_document_alone_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Path(plain_producer.__file__)
    imported = re.findall(r"^(?:from|import) (\w+)", program.read_text(), re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names
    subprocess.run([sys.executable, "-I", "-S", str(program), str(tmp_path)], check=True)
    status, out = run(monkeypatch, ["verify", str(tmp_path)])
    assert status == 0, out
    assert out.decode().count(": right: 6 frames, 4 blocks") == 2
    assert "2 payloads, 0 wrong" in out.decode()


def test_another_rounding_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(VECTORS, tmp_path / "set")
    payloads = tmp_path / "set" / "payloads"
    shutil.copy(payloads / "tt_bfp4_b.truncate.bin", payloads / "tt_bfp4_b.nearest_even.bin")
    assert run(monkeypatch, ["verify", str(tmp_path / "set")])[0] == 0


ENTRY: dict[str, object] = {"codec": "f32", "heads": 1, "tokens": 32, "head_dim": 1, "payload": "p"}
ODD_ENTRIES: list[tuple[dict[str, object], str]] = [
    ({"heads": float("nan")}, "not a positive whole number"),
    ({"tokens": float("inf")}, "not a positive whole number"),
    ({"heads": -1, "tokens": -32}, "not a positive whole number"),
    ({"heads": True}, "not a positive whole number"),
    ({"tokens": 16, "head_dim": 2}, "not whole groups of 32"),
    ({"tokens": 64}, "there are 32 values"),
    ({"payload": "../v"}, "lies outside of the folder"),
    ({"payload": "/dev/zero"}, "lies outside of the folder"),
    ({"payload": "pipe"}, "not a regular file"),
    ({"payload": "\udcff"}, "\\\\udcff"),
    ({"codec": "fp7"}, "fp7"),
    ({"codec": "int4", "head_dim": 1}, "multiple of 32"),
]
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("", "not an index"),
        ("[]", "not an index"),
        ("{}", "'vectors' is missing"),
        (DEEP, "nested too deeply"),
        ('{"values": "v", "vectors": []}', "lists no vectors"),
        ('{"values": "v", "vectors": {"a": 1}}', "lists no vectors"),
        ('{"values": 1, "vectors": [1]}', "1 is not the name of a file"),
        ('{"values": "\\u0000", "vectors": [1]}', "null"),
        ('{"values": "gone", "vectors": [1]}', "gone: No such file"),
        ('{"values": "nan", "vectors": [1]}', "Inf or NaN"),
        ('{"values": "pipe", "vectors": [1]}', "not a regular file"),
        ('{"values": "v", "vectors": [1, null, []]}', "not an object"),
        *((json.dumps({"values": "v", "vectors": [{**ENTRY, **change}]}), said) for change, said in ODD_ENTRIES),
    ],
    ids=lambda text: text[:60],
)
def test_a_bad_index_is_reported(index: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "vectors.json").write_text(index)
    for name in ("v", "p", "../v"):
        (folder / name).write_bytes(bytes(128))
    (folder / "nan").write_bytes(b"\xff" * 128)
    os.mkfifo(folder / "pipe")
    status, out = run(monkeypatch, ["verify", str(folder)])
    assert status == 1
    assert re.search(said, out.decode())
    assert b"vectors.json: " in out


def test_values_that_a_codec_cannot_carry_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v").write_bytes(np.full(32, 3.4e38, "<f4").tobytes())
    (tmp_path / "p").write_bytes(bytes(64))
    index = {"values": "v", "vectors": [ENTRY | {"codec": "bf16"}]}
    (tmp_path / "vectors.json").write_text(json.dumps(index))
    status, out = run(monkeypatch, ["verify", str(tmp_path)])
    assert status == 1
    assert b"too large for bfloat16" in out


def test_what_strangers_wrote_does_not_reach_the_terminal_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = (VECTORS / "streams" / "uniform.kv").read_bytes()
    frames = [bytes(frame) for _, frame in kvblock.split_frames(stream)]
    header, _ = kvblock.decode_frame(frames[0])
    header.open.manifest.producer.vendor = "\x1b[2Jmine\nright"
    file = tmp_path / "a\nb.kv"
    file.write_bytes(b"".join(kvblock.join_frames([kvblock.encode_frame(header), *frames[1:]])))
    status, out = run(monkeypatch, ["inspect", str(file)])
    assert status == 0
    assert b"\x1b" not in out
    assert rb"\x1b[2Jmine\nright" in out
    assert run(monkeypatch, ["verify", str(tmp_path)])[1].startswith(rb"a\nb.kv: right")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda opened: setattr(opened, "ticket", b"short"), "ticket of 5 bytes"),
        (lambda opened: opened.ClearField("transports"), "TRANSPORT_GRPC"),
        (lambda opened: setattr(opened.manifest, "model_fingerprint", "abc"), "lower-case hex"),
    ],
)
def test_what_writers_must_not_send_is_reported_although_readers_take_it(
    change: Callable[[PushOpen], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = (VECTORS / "streams" / "uniform.kv").read_bytes()
    frames = [bytes(frame) for _, frame in kvblock.split_frames(stream)]
    header, _ = kvblock.decode_frame(frames[0])
    change(header.open)
    frames[0] = kvblock.encode_frame(header)
    (tmp_path / "f.kv").write_bytes(b"".join(kvblock.join_frames(frames)))
    status, out = run(monkeypatch, ["verify", str(tmp_path)])
    assert status == 1
    assert out.decode().splitlines()[0].split(": ")[2] == "form"
    assert said in out.decode()


def test_a_frame_in_another_form_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = (VECTORS / "streams" / "uniform.kv").read_bytes()
    frames = [bytes(frame) for _, frame in kvblock.split_frames(stream)]
    header, payload = kvblock.decode_frame(frames[1])
    head = kvblock.encode_frame(header)
    frames[1] = frames[1][len(head) :] + head  # the payload first: protobuf reads it, the copy-free path does not
    frames[-1] += b"\x12\x01x"
    status, out = run(monkeypatch, ["verify", "-"], b"".join(kvblock.join_frames(frames)))
    assert status == 1
    assert [line.split(": ")[2] for line in out.decode().splitlines()] == ["form", "form"]
    assert kvblock.decode_frame(frames[1]) == (header, payload)


def test_a_capture_full_of_faults_ends_with_a_word_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    status, out = run(monkeypatch, ["verify", "-"], b"\x02\x0a\x00" * 500)
    assert status == 1
    assert len(out.splitlines()) == MAX_PROBLEMS + 1
    assert out.decode().endswith("nothing after this was looked at\n")


def test_pipes_of_processes_and_a_reader_that_goes_away() -> None:
    program = f"{sys.executable} -m hma_serve.cli.kv"
    values = VECTORS / "values.f32.bin"
    shape = "--codec mxfp4 --rows 64 --cols 64"
    done = subprocess.run(
        ["bash", "-c", f"{program} encode {shape} < {values} | {program} decode {shape}"],
        capture_output=True,
        check=True,
    )
    assert done.stdout == (VECTORS / "decoded" / "mxfp4.nearest_even.f32.bin").read_bytes()
    gone = subprocess.run(
        ["bash", "-c", f"{program} inspect {VECTORS}/streams/uniform.kv | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert gone.stdout.strip() in ("0", "141")
    assert gone.stderr == ""


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("decode --codec bf16 --rows 32 --cols 64 <&-", 2, "stdin is closed"),
        ("verify - <&-", 2, "stdin is closed"),
        ("verify {vectors} >&-", 2, "stdout is closed"),
        ("verify {vectors} >/dev/full", 2, "No space left on device"),
        ("verify {vectors} >/dev/full 2>&-", 2, ""),
        ("encode --codec f32 --rows 64 --cols 64 < {vectors}/values.f32.bin >/dev/full", 2, "No space left on device"),
        ("encode --codec bf16 --rows 1e3 --cols 1", 2, "not a positive whole number"),
        ("encode --codec bf16 --rows 320000 --cols 64 < /dev/zero | head -c 1 >&-; exit ${{PIPESTATUS[0]}}", 1, "more"),
    ],
)
def test_closed_and_full_streams(command: str, status: int, said: str) -> None:
    line = f"{sys.executable} -m hma_serve.cli.kv {command.format(vectors=VECTORS)}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
