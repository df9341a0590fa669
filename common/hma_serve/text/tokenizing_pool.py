"""Tokenizing that never holds up the event loop.

A text of 220 KB costs 80 to 180 ms of a core. `Tokenizer.encode` releases the interpreter lock while it works, so
threads are enough: the longest hold-up of the loop measured beside such a text is about 1 ms, a thread hop costs less
than a process hop, and the vocabulary is in memory once. Short texts are tokenized in place.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from hma_serve.core.errors import ResourceExhausted
from hma_serve.text.tokenizer import Tokenizer

_RETRY_AFTER = 1.0


class TokenizingPool:
    """Encodes texts for one event loop; bounded.

    Threads start with the first long text. A cancelled caller gives its place back at once; a text that a thread has
    begun is finished and dropped.

    Args:
        tokenizer: Shared by all threads.
        threads: Texts that are encoded at the same time.
        max_waiting: Long texts that may wait for a thread.
        inline_chars: Texts up to this length are encoded on the loop (about 1 µs a character).
    """

    def __init__(
        self, tokenizer: Tokenizer, *, threads: int = 2, max_waiting: int = 64, inline_chars: int = 2000
    ) -> None:
        self._tokenizer = tokenizer
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._limit = threads + max_waiting
        self._inline_chars = inline_chars
        self._pending = 0

    @property
    def pending(self) -> int:
        """Long texts that wait or are being encoded."""
        return self._pending

    async def encode(self, text: str) -> list[int]:
        """Token ids of `text`, as `Tokenizer.encode`.

        Raises:
            InvalidArgument: The text is not valid Unicode.
            ResourceExhausted: Too many long texts wait already.
        """
        if len(text) <= self._inline_chars:
            return self._tokenizer.encode(text)
        if self._pending >= self._limit:
            raise ResourceExhausted("too many long prompts wait to be tokenized", retry_after=_RETRY_AFTER)
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._tokenizer.encode, text)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Drops what waits; does not wait for what is being encoded."""
        self._executor.shutdown(wait=False, cancel_futures=True)
