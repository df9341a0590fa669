"""Lazy loading: what is read when, what is reported, and how wrong or damaged files are named."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hma_serve.checkpoint import read_model_config
from hma_serve.core.errors import DataLoss, FailedPrecondition, HmaError, InvalidArgument, NotFound
from hma_serve.model import LazyWeights, Transformer, open_weights, tensor_shapes
from support.tiny_qwen3 import make_tiny_checkpoint

GATE = "model.layers.1.mlp.gate_proj.weight"


def opened(path: Path, **options: object) -> LazyWeights:
    return open_weights(path, read_model_config(path), dtype=torch.float32, **options)  # type: ignore[arg-type]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_once_and_progress_ends_at_the_total(tmp_path: Path, shards: int) -> None:
    path = make_tiny_checkpoint(tmp_path, shards=shards, tied=False)
    config = read_model_config(path)
    seen: list[tuple[int, int]] = []
    with opened(path, progress=lambda done, total: seen.append((done, total))) as weights:
        assert seen == []
        Transformer(config, weights)
    assert len(seen) == len(tensor_shapes(config))
    assert seen == sorted(seen)
    assert seen[-1] == (config.parameter_count * 4, config.parameter_count * 4)


def test_shards_are_opened_for_the_device_when_their_first_tensor_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_checkpoint(tmp_path, shards=4, tied=False)
    opens: list[tuple[str, str]] = []
    reads: list[str] = []

    class Recorded:
        """A file of which only the asked tensors are read; there is no such device here."""

        def __init__(self, file: Path, *, framework: str, device: str) -> None:
            opens.append((file.name, device))
            self._file = safe_open(file, framework=framework, device="cpu")

        def get_tensor(self, name: str) -> torch.Tensor:
            reads.append(name)
            tensor: torch.Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
            return tensor

    monkeypatch.setattr("hma_serve.model.weights.safe_open", Recorded)
    with open_weights(path, read_model_config(path), device="cuda:1", dtype=torch.bfloat16) as weights:
        names = list(weights)
        assert opens == []
        for count, name in enumerate(names[:4], start=1):
            assert weights[name].dtype == torch.bfloat16
            assert len(opens) == len(dict(opens)) == count
        assert reads == names[:4]
        for name in names[4:]:
            weights[name]
    assert sorted(opens) == [(f"model-{shard:05}-of-00004.safetensors", "cuda:1") for shard in (1, 2, 3, 4)]
    assert reads == names


def test_tensors_come_in_the_asked_dtype_and_outlive_the_files(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    with open_weights(path, read_model_config(path), dtype=torch.float32) as weights:
        gate = weights[GATE]
    assert gate.dtype == torch.float32
    assert torch.equal(gate, load_file(path / "model.safetensors")[GATE].float())


def test_the_head_is_read_only_where_it_is_needed(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, tied=False)
    assert set(opened(path)) - set(opened(path, with_head=False)) == {"model.norm.weight", "lm_head.weight"}


def test_a_tied_checkpoint_may_store_its_head_again(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in opened(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"missing {GATE}"),
        (lambda t: t.update({"model.layers.2.extra.weight": torch.ones(1)}), "unexpected model.layers.2.extra.weight"),
        (lambda t: t.update({GATE: t[GATE].T.contiguous()}), r"gate_proj.weight is \[48, 80\], not \[80, 48\]"),
        (lambda t: t.update({GATE: torch.ones(80, 48, dtype=torch.int8)}), "holds I8"),
    ],
    ids=["missing", "unexpected", "misshapen", "integers"],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    path = make_tiny_checkpoint(tmp_path)
    rewrite(path, change)
    with pytest.raises(FailedPrecondition, match=message):
        opened(path)


def test_a_long_list_of_missing_tensors_is_cut(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path)
    save_file({"model.norm.weight": torch.ones(48)}, path / "model.safetensors")
    with pytest.raises(FailedPrecondition, match="and 18 more"):
        opened(path)


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def _truncate_in_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(200)


def _garble_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] = 0xFF
    path.write_bytes(content)


def _claim_a_huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _write_header(header: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", len(header)) + header)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is truncated: .* ends at byte"),
        (_truncate_in_header, "truncated or not a safetensors file"),
        (_garble_header, "header is damaged"),
        (_claim_a_huge_header, "truncated or not a safetensors file"),
        (lambda path: path.write_text(""), "truncated or not a safetensors file"),
        (_write_header(b"[1]"), "not an object"),
        (_write_header(b'{"a": 5}'), "entry for a is damaged"),
        (_write_header(b'{"a": {"dtype": "F7", "shape": [], "data_offsets": [0, 0]}}'), "entry for a is damaged"),
        (_write_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'), "contradicts itself"),
        (_write_header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}'), "contradicts itself"),
    ],
)
def test_damaged_files_are_refused_from_their_headers(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = make_tiny_checkpoint(tmp_path)
    damage(path / "model.safetensors")
    with pytest.raises(DataLoss, match=message):
        opened(path)


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', InvalidArgument, "not a plain file name"),
        ('{"weight_map": {"a": 5}}', InvalidArgument, "not a plain file name"),
        ('{"weight_map": []}', InvalidArgument, "weight_map must be"),
        ('{"weight_map": {"a": "gone.safetensors"}}', NotFound, "gone.safetensors"),
        ("{", InvalidArgument, "not valid JSON"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: str, kind: type[HmaError], message: str) -> None:
    path = make_tiny_checkpoint(tmp_path)
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(kind, match=message):
        opened(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, shards=2)
    first, second = sorted(path.glob("model-*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(InvalidArgument, match="is in both"):
        opened(path)


def test_a_directory_without_weights_says_so(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(NotFound, match="has no weights"):
        opened(path)
