"""Qwen3's own tokenizer: the published facts, and incremental text over all of Unicode."""

from __future__ import annotations

import functools
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve.text import Tokenizer
from support.qwen3 import qwen3_definition

IM_END, END_OF_TEXT = 151645, 151643


@functools.cache
def qwen3() -> Tokenizer:
    return Tokenizer(qwen3_definition())


def test_the_facts() -> None:
    tokenizer = qwen3()
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]  # no token of its own in front
    assert tokenizer.size == 151_669
    assert tokenizer.encode("<|im_end|><|endoftext|>") == [IM_END, END_OF_TEXT]
    assert {IM_END, END_OF_TEXT} <= tokenizer.special_ids
    assert tokenizer.decode([9707, IM_END]) == "Hello"
    assert tokenizer.decode([9707, IM_END], skip_special=False) == "Hello<|im_end|>"
    assert tokenizer.token_bytes(IM_END) == b"<|im_end|>"
    assert tokenizer.token_bytes(200_000) == b""


def pieces(ids: list[int], cuts: list[int], *, skip_special: bool = True) -> list[str]:
    """The text as it would be streamed, with `ids` cut at some places."""
    detokenizer = qwen3().detokenizer(skip_special=skip_special)
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    shown = [detokenizer.push_all(ids[start:end]) for start, end in itertools.pairwise(edges)]
    return [*shown, detokenizer.finish()]


cut_places = st.lists(st.integers(0, 200))


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60), cut_places)
def test_streamed_text_is_the_one_shot_text_and_splits_no_character(text: str, cuts: list[int]) -> None:
    text = text.replace("\ufffd", "?")
    normal = qwen3().decode(ids := qwen3().encode(text), skip_special=False)
    streamed = pieces(ids, cuts, skip_special=False)
    assert "".join(streamed) == normal
    assert "\ufffd" not in normal
    assert streamed[-1] == ""


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 151_700), max_size=60), cut_places, st.booleans())
def test_any_tokens_in_any_split_give_the_one_shot_text(ids: list[int], cuts: list[int], skip: bool) -> None:
    assert "".join(pieces(ids, cuts, skip_special=skip)) == qwen3().decode(ids, skip_special=skip)


def test_every_character_survives_token_by_token() -> None:
    """All of Unicode; Qwen3 normalises to NFC, so it is compared with what the same tokens say in one go."""
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    tokenizer = qwen3()
    for start in range(0, len(points), 1 << 15):
        batch = "\n".join(map(chr, points[start : start + (1 << 15)]))
        ids = tokenizer.encode(batch)
        detokenizer = tokenizer.detokenizer(skip_special=False)
        streamed = [detokenizer.push(token_id) for token_id in ids]
        assert "".join(streamed) == tokenizer.decode(ids, skip_special=False)
        # A character that had been cut would have been replaced.
        assert sum(piece.count("\ufffd") for piece in streamed) == batch.count("\ufffd")
        assert detokenizer.finish() == ""
