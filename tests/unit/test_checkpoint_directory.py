"""Finding a checkpoint, reading its small files, and telling checkpoints apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from hma_serve.checkpoint import fingerprint, read_eos_token_ids, read_model_config, resolve_checkpoint
from hma_serve.core.errors import FailedPrecondition, InvalidArgument, NotFound
from support.tiny_qwen3 import make_tiny_checkpoint


def test_demo_is_in_the_package() -> None:
    assert read_model_config(resolve_checkpoint("demo")).vocab_size == 4096


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path / "model")
    assert resolve_checkpoint(str(path)) == path


@pytest.mark.parametrize("name", ["/no/such/place", "./missing", "a/b/c", "", "two words", "~/nowhere-at-all"])
def test_a_path_that_leads_nowhere_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(NotFound, match=r"no checkpoint|not a checkpoint") as caught:
        resolve_checkpoint(name)
    assert caught.value.field == "model"


def test_a_directory_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no config\.json"):
        resolve_checkpoint(str(tmp_path))


def test_a_hub_id_is_fetched_without_what_a_server_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = make_tiny_checkpoint(tmp_path / "cached")
    asked: list[Any] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint("Qwen/Qwen3-8B") == cached
    assert asked == [("Qwen/Qwen3-8B", ["*.json", "*.safetensors", "*.jinja"])]


def test_offline_without_a_cached_copy_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no snapshot in the cache, and offline mode is on\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(NotFound, match="'Qwen/Qwen3-8B' and the Hub did not provide it: no snapshot") as caught:
        resolve_checkpoint("Qwen/Qwen3-8B")
    assert "\n" not in caught.value.message


def test_a_hub_id_without_the_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FailedPrecondition, match="install huggingface_hub"):
        resolve_checkpoint("Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [151645, 151643]}, {"eos_token_id": 7}, (151645, 151643)),
        ({"eos_token_id": 3}, {}, (3,)),
        ({}, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": [7, 8]}, (7, 8)),
        (None, {}, ()),
    ],
)
def test_end_of_text_tokens(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", [1, None], [-1], True, 1.5])
def test_malformed_end_of_text_tokens_are_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InvalidArgument, match="eos_token_id"):
        read_eos_token_ids(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        read_model_config(tmp_path)


def test_the_fingerprint_ignores_what_does_not_change_the_model(tmp_path: Path) -> None:
    plain = make_tiny_checkpoint(tmp_path / "plain")
    sharded = make_tiny_checkpoint(tmp_path / "sharded", shards=3, old_style_config=True)
    config = json.loads((plain / "config.json").read_text())
    reordered = make_tiny_checkpoint(tmp_path / "reordered")
    shuffled = {**dict(reversed(config.items())), "transformers_version": "9.9", "use_cache": False}
    (reordered / "config.json").write_text(json.dumps(shuffled))
    assert fingerprint(plain) == fingerprint(sharded) == fingerprint(reordered)
    assert len(fingerprint(plain)) == 64


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"tied": False}, {"layers": 3}, {"dtype": torch.bfloat16}, {"max_position_embeddings": 4096}],
    ids=str,
)
def test_the_fingerprint_tells_models_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    one, other = make_tiny_checkpoint(tmp_path / "one"), make_tiny_checkpoint(tmp_path / "other", **change)
    assert fingerprint(one) != fingerprint(other)


def test_the_fingerprint_sees_one_element_of_a_small_tensor_and_both_ends_of_a_large_one(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, vocab=512)
    name = "model.embed_tokens.weight"
    assert load_file(path / "model.safetensors")[name].nbytes > 64 << 10
    seen = {fingerprint(path)}
    for tensor, index in ((name, 0), (name, -1), ("model.norm.weight", 5)):
        tensors = load_file(path / "model.safetensors")
        tensors[tensor].view(-1)[index] += 1
        save_file(tensors, path / "model.safetensors")
        seen.add(fingerprint(path))
    assert len(seen) == 4
