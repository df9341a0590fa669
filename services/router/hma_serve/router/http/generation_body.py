"""What the bodies of both generating endpoints have in common, as a `CompletionRequest`.

Only types and shapes are checked here; ranges are checked where the values are born, and what depends on the model in
`completion`. Fields that are not known are ignored, because clients send many; those that would change the answer are
refused instead (`unsupported`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import SamplingParams, Slo, StopConditions, Structure
from hma_serve.router.completion import CompletionRequest, Prompt
from hma_serve.router.http import fields
from hma_serve.router.http.structure_body import read_structure, structure_field
from hma_serve.router.http.unsupported import IN_GENERATION, refuse_unsupported


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request says outside of its body.

    Attributes:
        request_id: For logs and traces.
        slo: Objectives.
    """

    request_id: str
    slo: Slo


@dataclass(frozen=True, slots=True)
class GenerationBody:
    """A parsed body.

    Attributes:
        request: What to compute.
        stream: Answer with server-sent events.
        include_usage: Stream: a last chunk with the usage and no choices.
        continuous_usage: Stream: usage so far in every chunk.
        return_token_ids: Give token ids beside the text, and those of the prompt.
        echo: Begin the text with the prompt, or with the message that it continues.
    """

    request: CompletionRequest
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    echo: bool


def read_generation_body(
    body: Mapping[str, Any],
    caller: Caller,
    prompts: tuple[Prompt, ...],
    *,
    logprobs: int | None,
    default_max_tokens: int | None,
    calls: Structure | None = None,
) -> GenerationBody:
    """Reads the common fields.

    Args:
        body: The object.
        caller: Whose it is.
        prompts: As the endpoint has read them.
        logprobs: Alternatives to report per token, as the endpoint has read it.
        default_max_tokens: Length when the body names none; None: up to the window.
        calls: The calls that the output must be, as the endpoint has read them.

    Raises:
        InvalidArgument: A field has the wrong type or shape, or asks for what is not supported.
    """
    refuse_unsupported(body, IN_GENERATION)
    stream = fields.boolean(body, "stream")
    options = fields.obj(body, "stream_options")
    if options and not stream:
        raise InvalidArgument("stream_options needs stream=true", field="stream_options")
    request = CompletionRequest(
        prompts=prompts,
        model=fields.text(body, "model"),
        sampling=_sampling(body, logprobs, calls),
        stop=_stop(body),
        default_max_tokens=default_max_tokens,
        n=_n(body),
        slo=caller.slo,
        client_request_id=caller.request_id,
    )
    return GenerationBody(
        request=request,
        stream=stream,
        include_usage=fields.boolean(options, "include_usage"),
        continuous_usage=fields.boolean(options, "continuous_usage_stats"),
        return_token_ids=fields.boolean(body, "return_token_ids"),
        echo=fields.boolean(body, "echo"),
    )


def _sampling(body: Mapping[str, Any], logprobs: int | None, calls: Structure | None) -> SamplingParams:
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
        logprobs=logprobs,
        structure=_structure(body, calls),
    )


def _structure(body: Mapping[str, Any], calls: Structure | None) -> Structure | None:
    structure = read_structure(body)
    if calls is None or structure is None:
        return calls or structure
    raise InvalidArgument(f"tool_choice and {structure_field(body)} exclude each other", field="tool_choice")


def _logit_bias(body: Mapping[str, Any]) -> Mapping[int, float]:
    biases = fields.obj(body, "logit_bias")
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in biases):
        raise InvalidArgument("the keys of logit_bias must be token ids", field="logit_bias")
    try:
        return MappingProxyType({int(key): fields.number(biases, key, 0.0) for key in biases})
    except InvalidArgument as exc:
        raise InvalidArgument(f"in logit_bias, {exc.message}", field="logit_bias") from exc


def _stop(body: Mapping[str, Any]) -> StopConditions:
    token_ids = body.get("stop_token_ids") or []
    if not isinstance(token_ids, list) or not all(map(fields.is_integer, token_ids)):
        raise InvalidArgument("stop_token_ids must be a list of integers", field="stop_token_ids")
    # The older name is the one that OpenAI deprecates.
    max_tokens = fields.integer(body, "max_completion_tokens")
    return StopConditions(
        max_tokens=fields.integer(body, "max_tokens") if max_tokens is None else max_tokens,
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


def _n(body: Mapping[str, Any]) -> int:
    n = fields.integer(body, "n")
    if n is None:
        n = 1
    if n < 1:
        raise InvalidArgument("n must be at least 1", field="n")
    if fields.integer(body, "best_of", n) != n:
        raise InvalidArgument("best_of must equal n: ask for n completions and choose among them", field="best_of")
    return n
