"""Tokenizing, and rendering of conversations, that never hold up the event loop.

A text of 220 KB costs 80 to 180 ms of a core. `Tokenizer.encode` releases the interpreter lock while it works, so
threads are enough: the longest hold-up of the loop measured beside such a text is about 1 ms, a thread hop costs less
than a process hop, and the vocabulary is in memory once. A conversation is rendered in pure Python, about 40 µs a
message, by the same threads. What is short is done in place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hma_serve.core.errors import InvalidArgument, ResourceExhausted
from hma_serve.text.chat_template import ChatTemplate, Conversation
from hma_serve.text.tokenizer import Tokenizer

T = TypeVar("T")

_RETRY_AFTER = 1.0
# What a message or a value costs beside its characters, as characters.
_VALUE_CHARS = 20


class TokenizingPool:
    """Encodes texts for one event loop; bounded.

    Threads start with the first long text. A cancelled caller gives its place back at once; a text that a thread has
    begun is finished and dropped.

    Args:
        tokenizer: Shared by all threads.
        template: For conversations; None: the model has none.
        threads: Texts that are encoded at the same time.
        max_waiting: Long texts that may wait for a thread.
        inline_chars: Texts up to this length are encoded on the loop (about 1 µs a character).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        threads: int = 2,
        max_waiting: int = 64,
        inline_chars: int = 2000,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
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
        return await self._run(len(text), lambda: self._tokenizer.encode(text))

    async def encode_conversation(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation, rendered with the model's template.

        Raises:
            InvalidArgument: There is no template, it refuses the conversation, or the text is not valid Unicode.
            ResourceExhausted: Too many long texts wait already.
        """
        template = self._template
        if template is None:
            raise InvalidArgument(
                "the model has no chat template; send the whole prompt as text to /v1/completions", field="messages"
            )
        size = _size((conversation.messages, conversation.tools), self._inline_chars)
        return await self._run(size, lambda: self._tokenizer.encode(template.render(conversation), add_special=False))

    async def _run(self, chars: int, work: Callable[[], T]) -> T:
        """In place if it is short, else in a thread."""
        if chars <= self._inline_chars:
            return work()
        if self._pending >= self._limit:
            raise ResourceExhausted("too many long prompts wait to be tokenized", retry_after=_RETRY_AFTER)
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Drops what waits; does not wait for what is being encoded."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _size(value: object, enough: int) -> int:
    """About how many characters a value has; stops counting above `enough`."""
    size, left = 0, [value]
    while left and size <= enough:
        found = left.pop()
        size += _VALUE_CHARS
        if isinstance(found, str):
            size += len(found)
        elif isinstance(found, Mapping):
            left += found.values()
        elif isinstance(found, Sequence):
            left += found
    return size
