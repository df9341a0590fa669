"""`hma-serve kv calibrate`: runs prompts through a prefill profile and writes the table of K offsets for it.

The rule is the format's (docs/kv-block-format.md, section 4.2): per layer, KV head and channel the mean over keys after
qk-norm and RoPE, as float64, rounded to BF16. While it calibrates, the profile carries keys as float32, because a codec
that needs offsets blurs the very mean that is sought; everything else is the profile's own arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hma_serve.checkpoint import fingerprint, read_model_config, resolve_checkpoint
from hma_serve.core.errors import InvalidArgument
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import Codec, OffsetCalibration, OffsetTable, codec
from hma_serve.prefill.accelerators import Accelerator, AcceleratorSpec, KvStore, Segment, open_accelerator
from hma_serve.prefill.kv_layout import ROLES
from hma_serve.prefill.profiles import Profile, find_profile
from hma_serve.text import Tokenizer

CHUNK_TOKENS = 512
_EXACT = "f32"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration found.

    Attributes:
        table: The offsets.
        tokens: Keys of each head that the means are over.
        error_before: Of keys packed as they are: root mean square over the last prompt.
        error_after: The same with the offsets subtracted before packing.
    """

    table: OffsetTable
    tokens: int
    error_before: float
    error_after: float


def run(args: argparse.Namespace) -> str:
    """Calibrates, writes the file and returns what to tell the user; BLOCKING.

    Raises:
        HmaError: The model, the profile, the text or the output cannot be used; the message says why.
    """
    if args.output != "-" and not Path(args.output).parent.is_dir():
        # Before the work, which takes minutes for a large model.
        raise InvalidArgument(f"there is no directory {Path(args.output).parent} to write to", field="--output")
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    checkpoint = resolve_checkpoint(args.model)
    model, profile = read_model_config(checkpoint), find_profile(args.profile, args.profiles)
    profile.check(model)
    prompts = list(_prompts(Tokenizer.from_directory(checkpoint).encode(_text(args.text)), model, args))
    exact = dataclasses.replace(profile, k_codec=_EXACT)
    accelerator = open_accelerator(args.device, AcceleratorSpec(checkpoint, model, exact))
    found = calibrate(accelerator, model, profile, prompts)
    data = found.table.to_bytes(model_fingerprint=fingerprint(checkpoint), profile=profile.name)
    _write(args.output, data)
    largest = max(float(np.abs(vector).max()) for vector in found.table.vectors.values())
    return (
        f"{len(found.table.vectors)} vectors from {found.tokens} tokens of {len(prompts)} prompts, largest "
        f"{largest:g}\n"
        f"error of keys in {profile.k_codec} (RMS, last prompt): {found.error_before:.4g} without, "
        f"{found.error_after:.4g} with the offsets\n"
        f"hash {found.table.digest()}"
    )


def calibrate(
    accelerator: Accelerator, model: ModelConfig, profile: Profile, prompts: Sequence[Sequence[int]]
) -> Calibrated:
    """Means of the keys of all prompts.

    Args:
        accelerator: Follows `profile`, but carries keys as float32.
        model: Its model.
        profile: Whose K codec the errors are measured with.
        prompts: Token ids, whole groups of 32 each.
    """
    means, last = OffsetCalibration(), list[NDArray[np.float32]]()
    for prompt in prompts:
        store = _prefilled(accelerator, model, prompt)
        last = [_keys(store, model, layer, len(prompt)) for layer in range(model.num_layers)]
        for layer, keys in enumerate(last):
            means.add(layer, keys)
    table, packer = means.table(), codec(profile.k_codec)
    offsets = table.array(model.num_layers, model.num_kv_heads, model.head_dim)
    return Calibrated(
        table,
        sum(map(len, prompts)),
        _rms([_error(packer, keys) for keys in last]),
        _rms([_error(packer, keys - offset[:, None]) for keys, offset in zip(last, offsets, strict=True)]),
    )


def _prefilled(accelerator: Accelerator, model: ModelConfig, prompt: Sequence[int]) -> KvStore:
    store = accelerator.new_store(len(prompt))
    for start in range(0, len(prompt), CHUNK_TOKENS):
        chunk = prompt[start : start + CHUNK_TOKENS]
        hidden = accelerator.embed(chunk)
        for layer in range(model.num_layers):
            hidden = accelerator.run_layer(layer, hidden, [Segment(start, len(chunk), store)])
    return store


def _keys(store: KvStore, model: ModelConfig, layer: int, tokens: int) -> NDArray[np.float32]:
    """float32 [kv heads, tokens, D] of one layer."""
    exact, heads, groups = codec(_EXACT), model.num_kv_heads, tokens // GROUP_TOKENS
    packed = np.empty((heads, groups, exact.group_bytes(model.head_dim)), dtype=np.uint8)
    copying = store.copy_out(layer, ROLES[0], slice(0, heads), slice(0, groups), packed)
    if copying is not None:
        copying.wait()
    return exact.decode(packed, heads, tokens, model.head_dim)


def _error(packer: Codec, keys: NDArray[np.float32]) -> float:
    """Mean square of what packing does to keys."""
    decoded = packer.decode(np.ascontiguousarray(packer.encode(keys)), *keys.shape)
    return float(np.square(decoded - keys, dtype=np.float64).mean())


def _rms(squares: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(squares)))


def _prompts(ids: Sequence[int], model: ModelConfig, args: argparse.Namespace) -> Iterator[list[int]]:
    """The text cut into prompts of the asked length, whole groups each; a rest shorter than a group is left out."""
    if args.tokens % GROUP_TOKENS or not 0 < args.tokens <= model.max_position_embeddings:
        raise InvalidArgument(
            f"--tokens must be a multiple of {GROUP_TOKENS} up to the model's window of "
            f"{model.max_position_embeddings}, not {args.tokens}",
            field="--tokens",
        )
    if len(ids) < GROUP_TOKENS:
        raise InvalidArgument(f"the text has {len(ids)} tokens; {GROUP_TOKENS} are the least", field="--text")
    for start in range(0, min(len(ids), args.tokens * args.prompts), args.tokens):
        part = list(ids[start : start + args.tokens])
        whole = part[: len(part) // GROUP_TOKENS * GROUP_TOKENS]
        if whole:
            yield whole


def _text(files: Sequence[Path]) -> str:
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"the text is not UTF-8: {exc}", field="--text") from exc


def _write(output: str, data: bytes) -> None:
    """To a file, whole or not at all; `-` is stdout."""
    if output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = Path(output)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
