"""What comes back: the pieces of a stream, and the whole that they add up to.

`Transcript` reads a stream's events in order and holds the only copy of what has arrived. It does no I/O, so the
blocking and the asyncio stream share it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hma_serve.core.errors import Internal
from hma_serve.v1 import common_pb2, inference_pb2

FinishReason = Literal["stop", "length", "cancelled", "unknown"]
"""Why a completion ended: end of sequence or a stop condition, a length limit, cancelled by the server, or a reason
that this version does not know."""

_REASONS: dict[int, FinishReason] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class TokenAlternative:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Probabilities at one position.

    Attributes:
        chosen: The token that was emitted.
        top: The likeliest tokens, likeliest first; as many as `logprobs` asked for.
    """

    chosen: TokenAlternative
    top: tuple[TokenAlternative, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a completion.

    Attributes:
        text: The new text. Empty while a character is incomplete or a stop string may be forming, so text and tokens
            of one delta need not belong together; over the whole stream they do.
        token_ids: The new tokens.
        index: Which of the `n` completions grew.
        logprobs: One entry per token, if `logprobs` was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took.

    Attributes:
        prompt_tokens: Tokens of the prompt, counted once.
        completion_tokens: Tokens generated, over all completions.
        cached_tokens: Prompt tokens whose computation a prefix cache saved.
        migrations: Times that a completion went on on another decode worker because its own was lost.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    migrations: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completions together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` completions, whole.

    Attributes:
        index: Its number, from 0.
        text: All of its text.
        token_ids: All of its tokens.
        finish_reason: Why it ended.
        stop_match: The stop string or token that ended it; empty if none did.
        logprobs: One entry per token, if they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_match: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer.

    Attributes:
        request_id: The server's name for the request; its logs and traces use it.
        model: The model that answered.
        choices: The completions, in order; one unless `n` asked for more.
        usage: Tokens taken.
    """

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first completion."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.choices[0].finish_reason


@dataclass(slots=True)
class _Growing:
    """One completion that is still arriving."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: inference_pb2.GenerateResponse.Finished | None = None


def carries_answer(response: inference_pb2.GenerateResponse) -> bool:
    """Whether some of the answer has arrived with this event: from then on a retry would repeat or change it."""
    return response.WhichOneof("event") in ("delta", "finished")


class Transcript:
    """Everything that a stream has delivered so far.

    Args:
        n: Number of completions that were asked for.
    """

    def __init__(self, n: int) -> None:
        self._growing = [_Growing() for _ in range(n)]
        self.request_id = ""
        self.model = ""

    @property
    def complete(self) -> bool:
        """Whether every completion has ended."""
        return all(one.finished for one in self._growing)

    @property
    def text(self) -> str:
        """Text of the first completion so far."""
        return "".join(self._growing[0].text)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first completion so far."""
        return tuple(self._growing[0].token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended; None before it has."""
        finished = self._growing[0].finished
        return None if finished is None else _REASONS.get(finished.reason, "unknown")

    @property
    def usage(self) -> Usage | None:
        """Tokens taken; None before every completion has ended."""
        ended = [one.finished.usage for one in self._growing if one.finished is not None]
        if len(ended) < len(self._growing):
            return None
        return Usage(
            prompt_tokens=ended[0].prompt_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in ended),
            cached_tokens=ended[0].cached_tokens,
            migrations=sum(usage.migrations for usage in ended),
        )

    def receive(self, response: inference_pb2.GenerateResponse) -> Delta | None:
        """Takes the next event; returns what it adds to the answer, if anything.

        Raises:
            Internal: The event contradicts what was asked or what came before.
        """
        kind = response.WhichOneof("event")
        if kind == "started":
            self.request_id, self.model = response.started.request_id, response.started.model
        elif kind == "delta":
            return self._grow(response.delta)
        elif kind == "finished":
            self._open(response.finished.index).finished = response.finished
        return None  # also for events of newer versions

    def end(self) -> None:
        """Checks, at the end of the stream, that it is whole; raises Internal."""
        if not self.complete:
            raise Internal("the server ended the stream before the completion had ended")

    def completion(self) -> Completion:
        """The whole answer; only when `complete`."""
        usage = self.usage
        assert usage is not None
        return Completion(
            self.request_id, self.model, tuple(map(_choice, range(len(self._growing)), self._growing)), usage
        )

    def _grow(self, message: inference_pb2.GenerateResponse.TextDelta) -> Delta | None:
        growing = self._open(message.index)
        delta = Delta(
            text=message.text,
            token_ids=tuple(message.token_ids),
            index=message.index,
            logprobs=tuple(map(_logprobs, message.logprobs)),
        )
        growing.text.append(delta.text)
        growing.token_ids.extend(delta.token_ids)
        growing.logprobs.extend(delta.logprobs)
        return delta if delta.text or delta.token_ids else None

    def _open(self, index: int) -> _Growing:
        if index >= len(self._growing) or self._growing[index].finished is not None:
            raise Internal(f"the server sent more of completion {index}, which was not asked for or has ended")
        return self._growing[index]


def _logprobs(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple(TokenAlternative(one.token_id, one.logprob) for one in message.top)
    return TokenLogprobs(TokenAlternative(message.chosen.token_id, message.chosen.logprob), top)


def _choice(index: int, growing: _Growing) -> Choice:
    assert growing.finished is not None
    return Choice(
        index=index,
        text="".join(growing.text),
        token_ids=tuple(growing.token_ids),
        finish_reason=_REASONS.get(growing.finished.reason, "unknown"),
        stop_match=growing.finished.stop_match,
        logprobs=tuple(growing.logprobs),
    )
