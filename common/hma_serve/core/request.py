"""What a client may ask for, validated once where the value is born.

HTTP, gRPC and the decode engine all build these, so a limit is stated here and nowhere else. Each dataclass converts
from and to its message in `hma_serve.v1`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, SupportsFloat

from hma_serve.core.errors import InvalidArgument
from hma_serve.v1 import common_pb2

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKENS = 256
MAX_STRUCTURE_BYTES = 256 << 10
MAX_CHOICES = 4096
MAX_TOKEN_ID = 2**32 - 1
MAX_SEED = 2**64 - 1
MIN_OBJECTIVE_SECONDS = 1e-6


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidArgument(
            f"{name} must be between {_exact(low)} and {_exact(high)}, not {_exact(value)}", field=name
        )


def _exact(value: float) -> str:
    """Whole numbers with all their digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


class StructureKind(StrEnum):
    """How a structure is described."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    TOOL_CALL = "tool_call"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Structure:
    """A form that the output is held to while it is drawn; make one with its named constructors.

    Whether a schema or an expression can be followed is found by decode, which compiles it.

    Attributes:
        kind: What the texts are.
        texts: The schema, the expression, the choices, or the functions that may be called.
    """

    kind: StructureKind
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in self.texts):
            raise InvalidArgument(f"a {self.kind} is made of texts", field="structure")
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in self.texts)
        if size > MAX_STRUCTURE_BYTES:
            raise InvalidArgument(
                f"the {self.kind} takes {size:,} bytes, and may take {MAX_STRUCTURE_BYTES:,}", field="structure"
            )
        if self.kind is StructureKind.JSON_SCHEMA:
            _check_schema(self.texts[0])
        elif self.kind is StructureKind.REGEX and not self.texts[0]:
            raise InvalidArgument("the regex is empty", field="structure")
        elif self.kind is StructureKind.CHOICE and not (0 < len(self.texts) <= MAX_CHOICES and all(self.texts)):
            raise InvalidArgument(f"a choice takes 1 to {MAX_CHOICES} texts, none empty", field="structure")
        elif self.kind in (StructureKind.TOOL_CALL, StructureKind.TOOL_CALLS):
            _check_functions(self.texts)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Structure:
        """A JSON document that a schema accepts; the schema as an object or as its text."""
        if isinstance(schema, str):
            return cls(StructureKind.JSON_SCHEMA, (schema,))
        return cls(StructureKind.JSON_SCHEMA, (_json_text(schema),))

    @classmethod
    def json_object(cls) -> Structure:
        """Any JSON object."""
        return cls(StructureKind.JSON_OBJECT)

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """A text that matches from its first to its last character."""
        return cls(StructureKind.REGEX, (pattern,))

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Structure:
        """One of some texts."""
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise InvalidArgument("a choice is made of several texts", field="structure")
        return cls(StructureKind.CHOICE, tuple(texts))

    @classmethod
    def tool_calls(cls, functions: Iterable[Mapping[str, Any]], *, one: bool = False) -> Structure:
        """Calls of functions with a `name` and `parameters`, a schema of an object; `one`: exactly one."""
        kind = StructureKind.TOOL_CALL if one else StructureKind.TOOL_CALLS
        return cls(kind, tuple(map(_json_text, functions)))

    @classmethod
    def from_proto(cls, message: common_pb2.Structure) -> Structure:
        """Reads and validates the wire form; raises InvalidArgument."""
        match message.WhichOneof("kind"):
            case "json_schema":
                return cls.json_schema(message.json_schema)
            case "json_object" if message.json_object:
                return cls.json_object()
            case "regex":
                return cls.regex(message.regex)
            case "choice":
                return cls.choice(message.choice.texts)
            case "tool_call":
                return cls(StructureKind.TOOL_CALL, tuple(message.tool_call.texts))
            case "tool_calls":
                return cls(StructureKind.TOOL_CALLS, tuple(message.tool_calls.texts))
            case _:
                raise InvalidArgument("a structure must say what it is", field="structure")

    def to_proto(self) -> common_pb2.Structure:
        """The wire form."""
        match self.kind:
            case StructureKind.JSON_SCHEMA:
                return common_pb2.Structure(json_schema=self.texts[0])
            case StructureKind.JSON_OBJECT:
                return common_pb2.Structure(json_object=True)
            case StructureKind.REGEX:
                return common_pb2.Structure(regex=self.texts[0])
            case StructureKind.CHOICE:
                return common_pb2.Structure(choice=common_pb2.Choices(texts=self.texts))
            case StructureKind.TOOL_CALL:
                return common_pb2.Structure(tool_call=common_pb2.Functions(texts=self.texts))
            case StructureKind.TOOL_CALLS:
                return common_pb2.Structure(tool_calls=common_pb2.Functions(texts=self.texts))


def _json_text(value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidArgument(f"the schema cannot be written as JSON: {exc}", field="structure") from exc


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"the JSON schema is not JSON: {exc}", field="structure") from exc
    if not isinstance(schema, dict | bool):
        raise InvalidArgument("a JSON schema is an object", field="structure")


def _check_functions(texts: tuple[str, ...]) -> None:
    if not texts:
        raise InvalidArgument("calls need a function that may be called", field="structure")
    for text in texts:
        try:
            function = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise InvalidArgument(f"the function is not JSON: {exc}", field="structure") from exc
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            raise InvalidArgument("a function has a name", field="structure")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise InvalidArgument(
                f"the parameters of {name[:64]} must be a JSON schema of an object", field="structure"
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; the defaults are OpenAI's.

    Attributes:
        temperature: 0 is greedy.
        top_p: Smallest set of tokens whose probability reaches this; in (0, 1].
        top_k: Keep the k likeliest tokens; 0 is off.
        min_p: Drop tokens below this share of the likeliest one's probability; 0 is off.
        repetition_penalty: Divides (multiplies, if negative) the logits of tokens seen in prompt or output; 1 is off.
        presence_penalty: Subtracted once from the logit of each token that was generated.
        frequency_penalty: Subtracted per occurrence.
        logit_bias: Added to the logits of single tokens.
        seed: The same seed gives the same tokens, whatever else is in the batch.
        logprobs: How many alternatives to report per token; None reports nothing.
        structure: What the output must be; None: anything.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None
    structure: Structure | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidArgument("top_p must be above 0; use temperature=0 for greedy decoding", field="top_p")
        _within("top_k", self.top_k, 0, MAX_TOKEN_ID)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidArgument(f"logit_bias may name at most {MAX_LOGIT_BIAS} tokens", field="logit_bias")
        for token, bias in self.logit_bias.items():
            _within("logit_bias token", token, 0, MAX_TOKEN_ID)
            _within("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            _within("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalises(self) -> bool:
        """Whether what was said before matters."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @classmethod
    def from_proto(cls, message: common_pb2.SamplingParams) -> SamplingParams:
        """Reads and validates the wire form; raises InvalidArgument."""
        return cls(
            temperature=message.temperature if message.HasField("temperature") else 1.0,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            top_k=message.top_k,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            logit_bias=MappingProxyType(dict(message.logit_bias)),
            seed=message.seed if message.HasField("seed") else None,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            structure=Structure.from_proto(message.structure) if message.HasField("structure") else None,
        )

    def to_proto(self) -> common_pb2.SamplingParams:
        """The wire form."""
        return common_pb2.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=dict(self.logit_bias),
            seed=self.seed,
            logprobs=self.logprobs,
            structure=None if self.structure is None else self.structure.to_proto(),
        )


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a completion ends.

    Attributes:
        max_tokens: At most so many tokens; None: until the context window is full.
        min_tokens: End-of-sequence and stop tokens are ignored before so many tokens.
        ignore_eos: Go on past the end-of-sequence token.
        stop_token_ids: Tokens that end the completion and are not part of it.
        stop_strings: Texts that end the completion; matched by the router.
        include_stop: Keep the matched stop string in the text.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and not 1 <= self.max_tokens <= MAX_TOKEN_ID:
            # Every model's window is below what fits the message.
            raise InvalidArgument(
                f"max_tokens must be between 1 and the model's window, not {self.max_tokens}", field="max_tokens"
            )
        _within("min_tokens", self.min_tokens, 0, MAX_TOKEN_ID)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgument("min_tokens must not exceed max_tokens", field="min_tokens")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidArgument(f"at most {MAX_STOP_TOKENS} stop tokens are allowed", field="stop_token_ids")
        for token in self.stop_token_ids:
            _within("stop_token_ids", token, 0, MAX_TOKEN_ID)
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise InvalidArgument(f"at most {MAX_STOP_STRINGS} stop strings are allowed", field="stop")
        for text in self.stop_strings:
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidArgument(
                    f"a stop string must have 1 to {MAX_STOP_STRING_CHARS} characters, not {len(text)}", field="stop"
                )

    @classmethod
    def from_proto(cls, message: common_pb2.StopConditions) -> StopConditions:
        """Reads and validates the wire form; raises InvalidArgument."""
        return cls(
            max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
            min_tokens=message.min_tokens,
            ignore_eos=message.ignore_eos,
            stop_token_ids=tuple(message.stop_token_ids),
            stop_strings=tuple(message.stop_strings),
            include_stop=message.include_stop,
        )

    def to_proto(self) -> common_pb2.StopConditions:
        """The wire form."""
        return common_pb2.StopConditions(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            stop_strings=self.stop_strings,
            include_stop=self.include_stop,
        )


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives of one request; at least a microsecond, so that how far one is missed stays a number.

    Attributes:
        ttft: Time to first token, seconds; None: no objective.
        tpot: Time per output token after the first, seconds; None: no objective.
    """

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft), ("tpot", self.tpot)):
            if value is not None and not (
                isinstance(value, SupportsFloat) and MIN_OBJECTIVE_SECONDS <= value < math.inf
            ):
                raise InvalidArgument(
                    f"the {name} objective must be a number of seconds, {MIN_OBJECTIVE_SECONDS:g} or more",
                    field=f"slo.{name}",
                )

    def or_else(self, other: Slo) -> Slo:
        """With the other's objectives where there is none."""
        return Slo(other.ttft if self.ttft is None else self.ttft, other.tpot if self.tpot is None else self.tpot)

    @classmethod
    def from_proto(cls, message: common_pb2.Slo) -> Slo:
        """Reads and validates the wire form; raises InvalidArgument."""
        return cls(
            ttft=message.ttft_seconds if message.HasField("ttft_seconds") else None,
            tpot=message.tpot_seconds if message.HasField("tpot_seconds") else None,
        )

    def to_proto(self) -> common_pb2.Slo:
        """The wire form."""
        return common_pb2.Slo(ttft_seconds=self.ttft, tpot_seconds=self.tpot)
