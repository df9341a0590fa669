"""The body of `/v1/completions` as a `CompletionRequest`.

Only types and shapes are checked here; ranges are checked where the values are born, and what depends on the model in
`completion`. Fields that are not known are ignored, because clients send many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import MAX_TOKEN_ID, SamplingParams, Slo, StopConditions
from hma_serve.router.completion import CompletionRequest, Prompt
from hma_serve.router.http import fields

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class CompletionBody:
    """A parsed body.

    Attributes:
        request: What to compute.
        stream: Answer with server-sent events.
        include_usage: Stream: a last chunk with the usage and no choices.
        continuous_usage: Stream: usage so far in every chunk.
        return_token_ids: Give token ids beside the text, and those of the prompt.
        echo: Begin the text with the prompt.
    """

    request: CompletionRequest
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    echo: bool


def read_completion_body(body: Mapping[str, Any], *, slo: Slo, client_request_id: str) -> CompletionBody:
    """Reads a JSON object.

    Args:
        body: The object.
        slo: Objectives from the headers.
        client_request_id: From the headers.

    Raises:
        InvalidArgument: A field has the wrong type or shape.
    """
    stream = fields.boolean(body, "stream")
    options = fields.obj(body, "stream_options")
    if options and not stream:
        raise InvalidArgument("stream_options needs stream=true", field="stream_options")
    sampling = _sampling(body)
    echo = fields.boolean(body, "echo")
    _refuse_unsupported(body, echo=echo, logprobs=sampling.logprobs)
    request = CompletionRequest(
        prompts=_prompts(body),
        model=fields.text(body, "model"),
        sampling=sampling,
        stop=_stop(body),
        default_max_tokens=DEFAULT_MAX_TOKENS,
        n=_positive(body, "n", 1),
        slo=slo,
        client_request_id=client_request_id,
    )
    return CompletionBody(
        request=request,
        stream=stream,
        include_usage=fields.boolean(options, "include_usage"),
        continuous_usage=fields.boolean(options, "continuous_usage_stats"),
        return_token_ids=fields.boolean(body, "return_token_ids"),
        echo=echo,
    )


def _prompts(body: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """A string, a list of token ids, or a list of either of these."""
    value = body.get("prompt")
    if isinstance(value, str):
        return (fields.checked_text(value, "prompt"),)
    if not isinstance(value, list):
        raise InvalidArgument("prompt must be a string, a list of token ids, or a list of these", field="prompt")
    if not value:
        raise InvalidArgument("prompt must not be empty", field="prompt")
    if fields.is_integer(value[0]):
        return (_token_ids(value),)
    return tuple(_one_of_many(item) for item in value)


def _one_of_many(item: object) -> Prompt:
    if isinstance(item, str):
        return fields.checked_text(item, "prompt")
    if isinstance(item, list):
        return _token_ids(item)
    raise InvalidArgument("every prompt in the list must be a string or a list of token ids", field="prompt")


def _token_ids(value: list[Any]) -> tuple[int, ...]:
    # Prompts have tens of thousands of ids: look at the set of types, not at each value.
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN_ID):
        raise InvalidArgument("token ids must be non-negative integers", field="prompt")
    return tuple(value)


def _sampling(body: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=fields.number(body, "temperature", 1.0),
        top_p=fields.number(body, "top_p", 1.0),
        # -1 is vLLM's way to say "off".
        top_k=max(0, top_k) if (top_k := fields.integer(body, "top_k") or 0) >= -1 else top_k,
        min_p=fields.number(body, "min_p", 0.0),
        repetition_penalty=fields.number(body, "repetition_penalty", 1.0),
        presence_penalty=fields.number(body, "presence_penalty", 0.0),
        frequency_penalty=fields.number(body, "frequency_penalty", 0.0),
        logit_bias=_logit_bias(body),
        seed=fields.integer(body, "seed"),
        logprobs=fields.integer(body, "logprobs"),
    )


def _logit_bias(body: Mapping[str, Any]) -> Mapping[int, float]:
    biases = fields.obj(body, "logit_bias")
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in biases):
        raise InvalidArgument("the keys of logit_bias must be token ids", field="logit_bias")
    return MappingProxyType({int(key): fields.number(biases, key, 0.0) for key in biases})


def _stop(body: Mapping[str, Any]) -> StopConditions:
    token_ids = body.get("stop_token_ids") or []
    if not isinstance(token_ids, list) or not all(map(fields.is_integer, token_ids)):
        raise InvalidArgument("stop_token_ids must be a list of integers", field="stop_token_ids")
    max_tokens = fields.integer(body, "max_tokens")
    return StopConditions(
        max_tokens=fields.integer(body, "max_completion_tokens") if max_tokens is None else max_tokens,
        min_tokens=fields.integer(body, "min_tokens") or 0,
        ignore_eos=fields.boolean(body, "ignore_eos"),
        stop_token_ids=tuple(token_ids),
        stop_strings=_stop_strings(body),
        include_stop=fields.boolean(body, "include_stop_str_in_output"),
    )


def _stop_strings(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise InvalidArgument("stop must be a string or a list of strings", field="stop")
    return tuple(fields.checked_text(item, "stop") for item in strings)


def _positive(body: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.integer(body, name)
    if value is None:
        return default
    if value < 1:
        raise InvalidArgument(f"{name} must be at least 1", field=name)
    return value


def _refuse_unsupported(body: Mapping[str, Any], *, echo: bool, logprobs: int | None) -> None:
    """What would change the answer must not be ignored silently."""
    if echo and logprobs is not None:
        raise InvalidArgument(
            "logprobs of the prompt are not supported: echo and logprobs exclude each other", field="echo"
        )
    if body.get("suffix"):
        raise InvalidArgument("suffix is not supported", field="suffix")
    best_of = fields.integer(body, "best_of")
    if best_of is not None and best_of != _positive(body, "n", 1):
        raise InvalidArgument("best_of must equal n", field="best_of")
