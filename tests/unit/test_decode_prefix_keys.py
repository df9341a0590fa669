"""Keys of prompt pages: equal exactly as far as everything that decides the pages' bytes is."""

from typing import Any

import pytest

from hma_serve.decode.prefix_keys import prefix_keys
from hma_serve.kvblock import codec
from hma_serve.v1 import decode_pb2, kv_block_pb2

TOKENS = list(range(128))


def offer(**changed: Any) -> decode_pb2.KvOffer:
    said: dict[str, Any] = {
        "model_fingerprint": "f" * 64,
        "k_codec": codec("tt_bfp8_b").spec(),
        "v_codec": codec("tt_bfp8_b").spec(),
        "rope": kv_block_pb2.KvRope(pairing=kv_block_pb2.KV_ROPE_PAIRING_HALF_SPLIT, theta=1e4),
        "profile": "tt_bfp8",
    }
    return decode_pb2.KvOffer(**(said | changed))


def test_a_prefix_has_the_keys_of_the_whole() -> None:
    whole = prefix_keys(offer(), "tenant", TOKENS)
    assert len(whole) == len(set(whole)) == 4
    assert prefix_keys(offer(), "tenant", TOKENS[:64]) == whole[:2]
    assert prefix_keys(offer(), "tenant", []) == []


@pytest.mark.parametrize("place", [0, 31, 32, 70, 127])
def test_a_token_changes_its_own_group_and_all_behind(place: int) -> None:
    other = TOKENS.copy()
    other[place] += 1000
    same = [a == b for a, b in zip(prefix_keys(offer(), "", TOKENS), prefix_keys(offer(), "", other), strict=True)]
    assert same == [group < place // 32 for group in range(4)]


@pytest.mark.parametrize(
    "changed",
    [
        {"model_fingerprint": "e" * 64},
        {"k_codec": codec("fp8_e4m3fn.tensor").spec()},
        {"v_codec": codec("mxfp8_e4m3").spec()},
        {"rope": kv_block_pb2.KvRope(pairing=kv_block_pb2.KV_ROPE_PAIRING_INTERLEAVED, theta=1e4)},
        {"profile": "other"},
    ],
)
def test_whatever_decides_the_bytes_decides_the_key(changed: dict[str, Any]) -> None:
    assert not set(prefix_keys(offer(), "", TOKENS)) & set(prefix_keys(offer(**changed), "", TOKENS))


def test_tenants_share_nothing() -> None:
    assert not set(prefix_keys(offer(), "a", TOKENS)) & set(prefix_keys(offer(), "b", TOKENS))
    # Parts cannot lend bytes to one another.
    left, right = offer(profile="ab"), offer(profile="a")
    assert not set(prefix_keys(left, "c", TOKENS)) & set(prefix_keys(right, "bc", TOKENS))


def test_who_produced_the_bytes_does_not_matter() -> None:
    assert prefix_keys(offer(producer_instance="one"), "", TOKENS) == prefix_keys(
        offer(producer_instance="two"), "", TOKENS
    )
