"""Memory of prompts on a machine: shared out before anything is loaded, refused with the arithmetic if it lacks."""

from __future__ import annotations

import pytest

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.prefill.capacity import Capacity, decide_capacity
from hma_serve.prefill.config import build_parser, config_of
from hma_serve.prefill.served_model import read_served_model

GB = 10**9
SHAPE = ("--random-weights", "qwen3-0.6b", "--max-running", "8")
WINDOW = 40960
# Of `tt_bfp8`: 28 layers of 8 heads, keys and values of 128 channels in 17 bytes for 16.
PER_TOKEN = 28 * 8 * 2 * 136
# 0.44 billion parameters of layers and 0.16 of the embedding, in float32, and the table of rotations.
WEIGHTS = 2.405 * GB


def decide(available: float, *arguments: str) -> Capacity:
    config = config_of(build_parser().parse_args([*SHAPE, *arguments]))
    return decide_capacity(config, read_served_model(config), int(available))


def test_every_running_prompt_may_be_the_longest_where_memory_allows_it() -> None:
    assert decide(200 * GB) == Capacity(8 * WINDOW, 1 << 30, 1 << 30)
    assert decide(200 * GB, "--max-model-len", "64").kv_tokens == 8 * 64


def test_running_prompts_take_half_of_what_weights_and_workspace_leave() -> None:
    left = 12 * GB
    small = decide(WEIGHTS + left)
    assert small.kv_tokens * PER_TOKEN == pytest.approx(left / 2, rel=0.02)
    assert small.prefix_cache_bytes == small.decoded_bytes == 1 << 30
    smaller = decide(WEIGHTS + 3.5 * GB, "--max-model-len", "4096")
    assert smaller.prefix_cache_bytes == pytest.approx(3.5 * GB / 4, rel=0.1)
    assert smaller.decoded_bytes == pytest.approx(3.5 * GB / 4, rel=0.1)


@pytest.mark.parametrize("available", [6 * GB, 8 * GB, 16 * GB, 64 * GB])
def test_all_of_it_together_never_exceeds_what_is_there(available: int) -> None:
    found = decide(available, "--max-model-len", "8192")
    assert found.decoded_bytes is not None
    taken = found.kv_tokens * PER_TOKEN + found.prefix_cache_bytes + found.decoded_bytes
    assert found.kv_tokens >= 8192
    assert taken <= available - WEIGHTS


@pytest.mark.parametrize(
    "arguments",
    [
        ("--kv-capacity-tokens", "1000000"),
        ("--prefix-cache-bytes", str(40 * GB)),
        ("--prefix-cache-bytes", str(10**22)),
        ("--max-running", "100000000"),
    ],
)
def test_what_flags_ask_for_is_refused_with_the_arithmetic(arguments: tuple[str, str]) -> None:
    with pytest.raises(FailedPrecondition, match=r"does not fit: weights 2\.4 GB \+ KV .* of 20\.0 GB available"):
        decide(20 * GB, *arguments)


def test_one_longest_prompt_must_fit() -> None:
    with pytest.raises(FailedPrecondition, match="lower --max-model-len"):
        decide(WEIGHTS + 1 * GB)
    assert decide(WEIGHTS + 1 * GB, "--max-model-len", "1024").kv_tokens >= 1024


def test_flags_are_taken_at_their_word() -> None:
    asked = ("--kv-capacity-tokens", "65536", "--prefix-cache-bytes", "12345")
    assert decide(40 * GB, *asked) == Capacity(65536, 12345, 1 << 30)


def test_another_device_has_memory_of_its_own() -> None:
    cuda = ("--device", "cuda", "--profile", "bf16")
    assert decide(2 * GB, *cuda) == Capacity(8 * WINDOW, GB // 2, None)
    with pytest.raises(InvalidArgument, match=r"prefix cache of 3\.0 GB does not fit the 2\.0 GB"):
        decide(2 * GB, *cuda, "--prefix-cache-bytes", str(3 * GB))
