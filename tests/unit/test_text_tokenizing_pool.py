"""Long texts are tokenized off the loop, boundedly."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from hma_serve.core.errors import InvalidArgument, ResourceExhausted
from hma_serve.text import Tokenizer, TokenizingPool
from hma_serve.text.tokenizing_pool import _size
from support.fake_workers import byte_tokenizer_json

LIMIT = 10
SHORT, LONG = "x" * LIMIT, "x" * (LIMIT + 1)


class GatedTokenizer(Tokenizer):
    """Encodes when the gate is open, and notes the thread."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer_json())
        self.gate = threading.Event()
        self.threads: list[int] = []

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        self.threads.append(threading.get_ident())
        if len(text) > LIMIT:
            assert self.gate.wait(10)
        return super().encode(text, add_special=add_special)


@pytest.fixture
def tokenizer() -> GatedTokenizer:
    return GatedTokenizer()


@pytest.fixture
async def pool(tokenizer: GatedTokenizer) -> AsyncIterator[TokenizingPool]:
    pool = TokenizingPool(tokenizer, threads=1, max_pending_chars=2 * len(LONG), inline_chars=LIMIT)
    yield pool
    tokenizer.gate.set()
    pool.close()


async def test_short_texts_stay_on_the_loop(pool: TokenizingPool, tokenizer: GatedTokenizer) -> None:
    assert await pool.encode(SHORT) == tokenizer.encode(SHORT)
    assert set(tokenizer.threads) == {threading.get_ident()}


async def test_long_texts_leave_the_loop_free(pool: TokenizingPool, tokenizer: GatedTokenizer) -> None:
    task = asyncio.create_task(pool.encode(LONG))
    await asyncio.sleep(0)
    assert await pool.encode(SHORT)  # answered while the long one waits for the gate
    assert not task.done()
    assert pool.pending_chars == len(LONG)
    tokenizer.gate.set()
    assert await task == tokenizer.encode(LONG)
    assert pool.pending_chars == 0
    assert len(set(tokenizer.threads)) == 2


async def test_too_many_long_texts_are_refused(pool: TokenizingPool, tokenizer: GatedTokenizer) -> None:
    tasks = [asyncio.create_task(pool.encode(LONG)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as raised:
        await pool.encode(LONG)
    assert raised.value.retry_after is not None
    assert await pool.encode(SHORT)
    tokenizer.gate.set()
    assert len(await asyncio.gather(*tasks)) == 2
    assert await pool.encode(LONG)


async def test_a_text_alone_may_be_of_any_length(pool: TokenizingPool, tokenizer: GatedTokenizer) -> None:
    tokenizer.gate.set()
    assert len(await pool.encode(10 * LONG)) == len(tokenizer.encode(10 * LONG))


def test_small_values_without_end_are_not_counted_to_their_end() -> None:
    assert 1 << 20 < _size([[0] * 1_000_000]) < (1 << 20) + 100
    assert _size(["x" * 5_000_000]) > 5_000_000


async def test_a_cancelled_caller_gives_its_place_back(pool: TokenizingPool, tokenizer: GatedTokenizer) -> None:
    tasks = [asyncio.create_task(pool.encode(LONG)) for _ in range(2)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert pool.pending_chars == 0
    tokenizer.gate.set()
    assert await pool.encode(LONG)


async def test_errors_come_through(pool: TokenizingPool, tokenizer: GatedTokenizer) -> None:
    tokenizer.gate.set()
    with pytest.raises(InvalidArgument, match="surrogate"):
        await pool.encode(LONG + "\udfff")
