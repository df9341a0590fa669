"""The part of a stream that looks at what has arrived, equal for both kinds of client."""

from __future__ import annotations

from hma_serve.client._completion import Completion, FinishReason, Transcript, Usage
from hma_serve.core.errors import Cancelled, FailedPrecondition


class StreamProgress:
    """What is known of an answer while it arrives and after."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._claimed = False

    @property
    def request_id(self) -> str:
        """The server's name for the request; empty before it was accepted."""
        return self._transcript.request_id

    @property
    def model(self) -> str:
        """The model that answers; empty before the request was accepted."""
        return self._transcript.model

    @property
    def text(self) -> str:
        """Text of the first completion, so far as it has arrived."""
        return self._transcript.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first completion, so far as they have arrived."""
        return self._transcript.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended; None before it has."""
        return self._transcript.finish_reason

    @property
    def usage(self) -> Usage | None:
        """Tokens that the request took; None before its end."""
        return self._transcript.usage

    def _claim(self) -> None:
        """A stream is one request: reading it again would have to ask again."""
        if self._claimed:
            raise FailedPrecondition("a stream can be read once; ask again for another answer")
        self._claimed = True

    def _whole(self) -> Completion:
        """The answer of a stream that was read before."""
        if not self._transcript.complete:
            raise Cancelled("the stream was left before its end, so there is no whole answer")
        return self._transcript.completion()
