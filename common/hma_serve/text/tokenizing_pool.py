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

_SECONDS_PER_CHAR = 1e-6
_LEAST_RETRY = 1.0
# What a message or a value costs beside its characters, as characters.
_VALUE_CHARS = 20
# Of a conversation that are counted: counting is work on the loop, about a millisecond for each 17,000 in small values.
_COUNTED_CHARS = 1 << 20


class TokenizingPool:
    """Encodes texts for one event loop; bounded.

    Threads start with the first long text. A cancelled caller gives its place back at once; a text that a thread has
    begun is finished and dropped.

    Args:
        tokenizer: Shared by all threads.
        template: For conversations; None: the model has none.
        threads: Texts that are encoded at the same time.
        max_pending_chars: Of long texts that wait or are being encoded, together; one alone may be of any length. What
            bounds them is memory: how long they wait is for those to say who place requests.
        inline_chars: Texts up to this length are encoded on the loop (about 1 µs a character).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        threads: int = 2,
        max_pending_chars: int = 1 << 26,
        inline_chars: int = 2000,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._threads = threads
        self._limit = max_pending_chars
        self._inline_chars = inline_chars
        self._pending_chars = 0

    @property
    def pending_chars(self) -> int:
        """Of long texts that wait or are being encoded."""
        return self._pending_chars

    async def encode(self, text: str) -> list[int]:
        """Token ids of `text`, as `Tokenizer.encode`.

        Raises:
            InvalidArgument: The text is not valid Unicode.
            ResourceExhausted: Too much text waits already.
        """
        return await self._run(len(text), lambda: self._tokenizer.encode(text))

    async def encode_conversation(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation, rendered with the model's template.

        Raises:
            InvalidArgument: There is no template, it refuses the conversation, or the text is not valid Unicode.
            ResourceExhausted: Too much text waits already.
        """
        template = self._template
        if template is None:
            raise InvalidArgument(
                "the model has no chat template; send the whole prompt as text to /v1/completions", field="messages"
            )
        size = _size((conversation.messages, conversation.tools))
        return await self._run(size, lambda: self._tokenizer.encode(template.render(conversation), add_special=False))

    async def _run(self, chars: int, work: Callable[[], T]) -> T:
        """In place if it is short, else in a thread."""
        if chars <= self._inline_chars:
            return work()
        if self._pending_chars and self._pending_chars + chars > self._limit:
            takes = self._pending_chars * _SECONDS_PER_CHAR / self._threads
            raise ResourceExhausted("too many long prompts wait to be tokenized", retry_after=max(takes, _LEAST_RETRY))
        self._pending_chars += chars
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._pending_chars -= chars

    def close(self) -> None:
        """Drops what waits; does not wait for what is being encoded."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _size(value: object) -> int:
    """About how many characters a value has; stops counting above `_COUNTED_CHARS`."""
    size, left = 0, [value]
    while left and size <= _COUNTED_CHARS:
        found = left.pop()
        size += _VALUE_CHARS
        if isinstance(found, str):
            size += len(found)
        elif isinstance(found, Mapping):
            left += found.values()
        elif isinstance(found, Sequence):
            left += found
    return size
