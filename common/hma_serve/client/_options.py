"""What a request may ask for, and its way into a message.

Kinds are checked here, and limits already, by the same values that the server checks them with (`core.request`), so
that a wrong value costs no round trip. What was not asked for stays absent, and the server decides.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NotRequired, SupportsIndex, TypedDict

from google.protobuf import json_format

from hma_serve.client import _kinds as kinds
from hma_serve.client._channels import MAX_MESSAGE_BYTES
from hma_serve.core.errors import InvalidArgument, PayloadTooLarge
from hma_serve.core.request import MAX_TOKEN_ID, SamplingParams, Slo, StopConditions, Structure
from hma_serve.v1 import common_pb2, inference_pb2

MAX_COMPLETIONS = 32
MAX_PRIORITY = 2**31 - 1


class Message(TypedDict):
    """One turn of a conversation.

    Attributes:
        role: `"system"`, `"user"`, `"assistant"`, or what else the model's template knows.
        content: What was said; an assistant may have said nothing.
        name: Who said it, where the template cares.
    """

    role: str
    content: str
    name: NotRequired[str]


class Options(TypedDict, total=False):
    """Keyword arguments of `generate` and `chat`; None is the same as leaving one out.

    Attributes:
        model: Id of the model; not needed where only one is served.
        max_tokens: End after so many tokens; without it, when the context window is full.
        min_tokens: Not before so many tokens.
        stop: A text, or up to 16, that end the completion when they appear.
        stop_token_ids: Tokens that end it.
        include_stop: Keep the matched stop string in the text.
        ignore_eos: Go on past the end-of-sequence token.
        temperature: 0 is greedy; the server's default is 1.
        top_p: Draw from the smallest set of tokens that has this much probability; in (0, 1].
        top_k: Draw from the k likeliest tokens.
        min_p: Leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: Above 1 discourages tokens that occurred in prompt or completion.
        presence_penalty: Above 0 discourages tokens that were generated, once.
        frequency_penalty: The same for each occurrence.
        logit_bias: Added to the logits of single tokens.
        seed: The same seed gives the same tokens.
        logprobs: Report the chosen token's log probability and those of so many alternatives, 0 to 20.
        n: Number of completions, 1 to 32.
        slo: Objectives for the time to the first token and between tokens.
        priority: Higher runs earlier.
        request_id: Your name for the request, for the server's logs and traces.
        timeout: Seconds that the whole request may take, retries included; default: the client's.
    """

    model: str | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None
    structure: Structure | None
    n: int | None
    slo: Slo | None
    priority: int | None
    request_id: str | None
    timeout: float | None


_TAKES = {
    "model": kinds.TEXT,
    "max_tokens": kinds.INTEGER,
    "min_tokens": kinds.INTEGER,
    "stop": kinds.TEXTS,
    "stop_token_ids": kinds.TOKENS,
    "include_stop": kinds.FLAG,
    "ignore_eos": kinds.FLAG,
    "temperature": kinds.NUMBER,
    "top_p": kinds.NUMBER,
    "top_k": kinds.INTEGER,
    "min_p": kinds.NUMBER,
    "repetition_penalty": kinds.NUMBER,
    "presence_penalty": kinds.NUMBER,
    "frequency_penalty": kinds.NUMBER,
    "logit_bias": kinds.BIASES,
    "seed": kinds.INTEGER,
    "logprobs": kinds.INTEGER,
    "structure": kinds.STRUCTURE,
    "n": kinds.INTEGER,
    "slo": kinds.SLO,
    "priority": kinds.INTEGER,
    "request_id": kinds.TEXT,
}
_SAMPLING = frozenset(field.name for field in fields(SamplingParams))
_STOPPING = frozenset(field.name for field in fields(StopConditions)) - {"stop_strings"} | {"stop"}
_OF_TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "tool_calls", "tool_call_id"})
# Where absent is not the same as zero on the wire.
_OPTIONAL_SAMPLING = ("temperature", "top_p", "repetition_penalty")


def text_or_tokens(prompt: str | Sequence[int], options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """The message that asks to continue a prompt.

    Raises:
        InvalidArgument: A value is of another kind or out of its range.
        PayloadTooLarge: The prompt does not fit a message.
        TypeError: There is no such option.
    """
    kinds.PROMPT.check("prompt", prompt)
    if not len(prompt):
        raise InvalidArgument("the prompt is empty", field="prompt")
    with _texts_checked():
        request = _request(options)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(_token_ids(prompt))
    return _fitting(request)


def conversation(
    messages: Iterable[Message], template_kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> inference_pb2.GenerateRequest:
    """The message that asks for the next turn of a conversation; raises like `text_or_tokens`."""
    kinds.MESSAGES.check("messages", messages)
    with _texts_checked():
        request = _request(options)
        for position, message in enumerate(messages):
            request.chat.messages.append(_message(message, f"messages[{position}]"))
    if not request.chat.messages:
        raise InvalidArgument("a conversation needs at least one message", field="messages")
    if template_kwargs is not None:
        kinds.NAMED.check("template_kwargs", template_kwargs)
        try:
            json_format.ParseDict(dict(template_kwargs), request.chat.template_kwargs)
        except (json_format.ParseError, TypeError) as exc:
            raise InvalidArgument("template_kwargs takes what JSON can say, by name", field="template_kwargs") from exc
    return _fitting(request)


def _message(message: Mapping[str, Any], where: str) -> inference_pb2.ChatMessage:
    kinds.MESSAGE.check(where, message)
    unknown = message.keys() - {"role", "content", "name"}
    if unknown:
        name = min(unknown, key=str)
        raise InvalidArgument(f"a message has no {name!r}{_elsewhere(name)}", field=where)
    said = {name: value for name, value in message.items() if value is not None}
    if said.get("role") == "assistant":
        said.setdefault("content", "")
    for name in ("role", "content"):
        if name not in said:
            raise InvalidArgument(f"{where} has no {name}", field=f"{where}.{name}")
    for name, value in said.items():
        kinds.TEXT.check(f"{where}.{name}", value)
    return inference_pb2.ChatMessage(**said)


def _elsewhere(name: object) -> str:
    """Where to find what this API does not have."""
    return ": tools are for HTTP alone (/v1/chat/completions)" if name in _OF_TOOLS else ""


@contextlib.contextmanager
def _texts_checked() -> Iterator[None]:
    """Protobuf carries Unicode only; half of a surrogate pair is none."""
    try:
        yield
    except UnicodeEncodeError as exc:
        raise InvalidArgument(f"a text holds half of a surrogate pair at position {exc.start}", field="prompt") from exc


def _request(options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    unknown = options.keys() - _TAKES.keys()
    if unknown:
        name = min(unknown)
        raise TypeError(f"there is no option {name!r}{_elsewhere(name)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        _TAKES[name].check(name, value)
    n, priority = given.get("n", 1), given.get("priority", 0)
    if not 1 <= n <= MAX_COMPLETIONS:
        raise InvalidArgument(f"n must be between 1 and {MAX_COMPLETIONS}, not {n}", field="n")
    if abs(priority) > MAX_PRIORITY:
        raise InvalidArgument(f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}", field="priority")
    slo: Slo = given.get("slo", Slo())
    return inference_pb2.GenerateRequest(
        model=given.get("model", ""),
        sampling=_sampling({name: given[name] for name in _SAMPLING & given.keys()}),
        stop=_stopping({name: given[name] for name in _STOPPING & given.keys()}),
        slo=slo.to_proto(),
        priority=priority,
        client_request_id=given.get("request_id", ""),
        n=n,
    )


def _sampling(given: dict[str, Any]) -> common_pb2.SamplingParams:
    message = SamplingParams(**given).to_proto()
    for name in _OPTIONAL_SAMPLING:
        if name not in given:
            message.ClearField(name)  # type: ignore[arg-type]  # the stub wants literals
    return message


def _stopping(given: dict[str, Any]) -> common_pb2.StopConditions:
    stop: str | Sequence[str] = given.pop("stop", ())
    given["stop_strings"] = (stop,) if isinstance(stop, str) else tuple(stop)
    given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
    return StopConditions(**given).to_proto()


def _token_ids(prompt: Iterable[SupportsIndex]) -> list[int]:
    """Plain integers, out of numpy's as well."""
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError as exc:
        raise InvalidArgument("a prompt is a text or a sequence of token ids", field="prompt") from exc
    if min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        raise InvalidArgument("a token id is between 0 and 2^32-1", field="prompt")
    return ids


def _fitting(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    size = request.ByteSize()
    if size > MAX_MESSAGE_BYTES:
        raise PayloadTooLarge(
            f"the prompt takes {size:,} bytes, and a request may take {MAX_MESSAGE_BYTES:,}", field="prompt"
        )
    return request
