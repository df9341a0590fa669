"""Models of a real shape without their weights, for trying out hardware and measuring.

`random:SHAPE` stands wherever a checkpoint may: a directory is made for this process that holds a configuration, a
tokenizer, and one number in place of the weights. Every process that names the same shape has the same weights, because
they are a function of that number (`hma_serve.model`), so decode and prefill workers fit together.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from hma_serve.checkpoint.read_config import read_json
from hma_serve.core.errors import InvalidArgument, NotFound

PREFIX = "random:"
"""Marks a shape where a checkpoint's name is expected."""

_SEED_FILE = "random_weights.json"
_FIELD = "--random-weights"
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_DEMO = Path(__file__).parent / "demo"

# hidden, intermediate, layers, query heads, tied head; of Qwen's published configurations.
_QWEN3 = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, True),
    "qwen3-4b": (2560, 9728, 36, 32, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
    "qwen3-14b": (5120, 17408, 40, 40, False),
    "qwen3-32b": (5120, 25600, 64, 64, False),
}


def random_name(shape: str) -> str:
    """What a model of random weights is called: the shape's name, or the last component of its path."""
    name, _ = _parsed(shape)
    if name in _QWEN3:
        return name
    path = Path(name).expanduser().resolve()
    return path.parent.name if path.is_file() else path.name


def read_random_seed(directory: Path) -> int | None:
    """The number that a checkpoint's weights are made of; None: it has real ones."""
    path = directory / _SEED_FILE
    if not path.is_file():
        return None
    seed = read_json(path).get("seed")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InvalidArgument(f"{path}: seed must be an integer of 32 bits, got {seed!r}")
    return seed


@functools.cache
def random_checkpoint(shape: str) -> Path:
    """Makes the directory, which lives as long as this process; BLOCKING.

    Args:
        shape: A name such as `qwen3-8b`, a config.json or its directory; `@SEED` may follow.

    Raises:
        NotFound: There is no such shape.
    """
    name, seed = _parsed(shape)
    config, texts = _source(name)
    holder = tempfile.mkdtemp(prefix="hma-serve-random-")
    atexit.register(shutil.rmtree, holder, ignore_errors=True)
    directory = Path(holder) / random_name(shape)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / _SEED_FILE).write_text(json.dumps({"seed": seed}))
    # A shape has no texts of its own; the demo's serve to type a prompt.
    for file in _TEXT_FILES:
        if (texts / file).is_file():
            shutil.copyfile(texts / file, directory / file)
    return directory


def _parsed(shape: str) -> tuple[str, int]:
    name, mark, seed = shape.rpartition("@")
    if not mark or not (seed.isascii() and seed.isdigit()):
        return shape, 0
    if int(seed) >= 2**32:
        raise InvalidArgument(f"the seed of {shape!r} must be below 2^32", field=_FIELD)
    return name, int(seed)


def _source(name: str) -> tuple[dict[str, object], Path]:
    """A configuration, and where texts that go with it lie."""
    if name in _QWEN3:
        return _qwen3(*_QWEN3[name]), _DEMO
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(_QWEN3)
        raise NotFound(f"there is no shape {name!r}: give one of {known}, or the path of a config.json", field=_FIELD)
    return read_json(path), path.parent if (path.parent / "tokenizer.json").is_file() else _DEMO


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
