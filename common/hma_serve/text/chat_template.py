"""A checkpoint's chat template: conversations to prompts, exactly as transformers renders them.

The template comes with the checkpoint and never from a client; what a client sends is data for it. Both are untrusted
all the same: the template runs in Jinja's sandbox, and loops, macros and output are stopped at a limit, because the
length of a rendering is in the client's hand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hma_serve.core.errors import FailedPrecondition, InvalidArgument

MAX_SECONDS = 1.0
MAX_CHARS = 4 << 20

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", *_SPECIAL_TOKENS})
_MAX_SHOWN = 300

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_MAX_FILE_BYTES = 64 << 20

_give_up_at: ContextVar[float] = ContextVar("give_up_at")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template turns into a prompt.

    Attributes:
        messages: Objects with at least `role` and `content`.
        tools: JSON schemas of functions that the model may call; None: none, which a template may tell from no tools.
        add_generation_prompt: End with the opening of an answer.
        variables: More variables for the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidArgument("a conversation needs at least one message", field="messages")
        for name in self.variables:
            if name in _RESERVED:
                raise InvalidArgument(f"chat_template_kwargs cannot set {name}", field="chat_template_kwargs")


class _OutOfBounds(Exception):
    """The rendering took too long or became too large."""


class _Stepwise(jinja2.ext.Extension):
    """Looks at the clock in every turn of every loop and in every call of a macro."""

    def tick(self) -> str:
        """Raises when the rendering's time is up; is nothing in the output."""
        if time.monotonic() > _give_up_at.get():
            raise _OutOfBounds
        return ""

    def add_ticks(self, template: nodes.Template) -> nodes.Template:
        """The template with a tick at the head of each body that can run more than once."""
        for repeated in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(repeated, nodes.For | nodes.Macro | nodes.CallBlock)
            tick = self.call_method("tick", lineno=repeated.lineno)
            repeated.body.insert(0, nodes.ExprStmt(tick, lineno=repeated.lineno))
        return template


class _GenerationMark(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  the base class has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with what templates may use, as transformers has it."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Stepwise, _GenerationMark, jinja2.ext.loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        stepwise = self.extensions[_Stepwise.identifier]
        assert isinstance(stepwise, _Stepwise)
        return stepwise.add_ticks(super()._parse(source, name, filename))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """The local time, without a zone, as transformers gives it."""
    return datetime.now().astimezone().replace(tzinfo=None).strftime(form)


class ChatTemplate:
    """The chat template of one checkpoint; immutable and safe to share between threads.

    Args:
        source: The template.
        tool_source: Another one for conversations with tools.
        special_tokens: Texts of the tokenizer's special tokens by name (`bos_token` ...).
        max_seconds: Longest time that one rendering may take.
        max_chars: Longest prompt that it may give.

    Raises:
        FailedPrecondition: A template is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        max_seconds: float = MAX_SECONDS,
        max_chars: int = MAX_CHARS,
    ) -> None:
        environment = _Environment()
        try:
            self._template = environment.from_string(source)
            self._tool_template = self._template if tool_source is None else environment.from_string(tool_source)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise FailedPrecondition(f"the model's chat template cannot be used: {exc}", field="--model") from exc
        self._sources = source + (tool_source or "")
        self._special_tokens = dict(special_tokens)
        self._max_seconds = max_seconds
        self._max_chars = max_chars

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate | None:
        """Reads a checkpoint's `chat_template.jinja`, or `chat_template` in its `tokenizer_config.json`; BLOCKING.

        Returns:
            The template, or None if the checkpoint has none.

        Raises:
            FailedPrecondition: It has one that cannot be used.
        """
        config = _read_config(directory / _CONFIG)
        templates = _named_templates(config.get("chat_template"))
        path = directory / _FILE
        if path.is_file():
            templates = {"default": _read_text(path)}
        if "default" not in templates:
            return None
        tokens = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
        return cls(
            templates["default"],
            tool_source=templates.get("tool_use"),
            special_tokens={name: text for name, text in tokens.items() if text is not None},
        )

    def names_role(self, role: str) -> bool:
        """Whether the template's source has the role as a text of its own, and so does something with it."""
        return f"'{role}'" in self._sources or f'"{role}"' in self._sources

    def render(self, conversation: Conversation) -> str:
        """The prompt of a conversation; pure Python, at most `max_seconds`.

        Raises:
            InvalidArgument: The template refuses the conversation, cannot handle it, or makes too much of it.
        """
        template = self._template if conversation.tools is None else self._tool_template
        token = _give_up_at.set(time.monotonic() + self._max_seconds)
        try:
            return self._collect(template, conversation)
        except _OutOfBounds:
            raise InvalidArgument(
                f"the conversation takes more than {self._max_seconds:g} s or {self._max_chars} characters to render; "
                "send a shorter one",
                field="messages",
            ) from None
        except UnicodeEncodeError as exc:
            raise InvalidArgument(
                "the conversation has a lone surrogate and is not valid Unicode", field="messages"
            ) from exc
        except (jinja2.TemplateError, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as exc:
            reason = str(exc)[:_MAX_SHOWN] or type(exc).__name__
            raise InvalidArgument(
                f"the model's chat template refuses the conversation: {reason}", field="messages"
            ) from exc
        except RecursionError as exc:
            raise InvalidArgument("the conversation is nested too deeply", field="messages") from exc
        finally:
            _give_up_at.reset(token)

    def _collect(self, template: jinja2.Template, conversation: Conversation) -> str:
        pieces, room = [], self._max_chars
        for piece in template.generate(
            {
                **self._special_tokens,
                **conversation.variables,
                "messages": conversation.messages,
                "tools": conversation.tools,
                "documents": None,
                "add_generation_prompt": conversation.add_generation_prompt,
            }
        ):
            room -= len(piece)
            if room < 0:
                raise _OutOfBounds
            pieces.append(piece)
        prompt = "".join(pieces)
        prompt.encode()  # a lone surrogate is a ValueError, which no tokenizer has to meet
        return prompt


def _named_templates(value: object) -> dict[str, str]:
    """`chat_template` of a tokenizer's configuration: one template, or a list of named ones."""
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return {}
    named = [entry for entry in value if isinstance(entry, dict)]
    return {
        entry["name"]: entry["template"]
        for entry in named
        if isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }


def _token_text(value: object) -> str | None:
    """A special token of the configuration: a text, or an object that has it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except (ValueError, RecursionError) as exc:
        raise FailedPrecondition(f"{path} is not JSON: {exc}", field="--model") from exc
    return config if isinstance(config, dict) else {}


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise FailedPrecondition(f"{path} has more than {_MAX_FILE_BYTES} bytes", field="--model")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise FailedPrecondition(f"{path} is not UTF-8", field="--model") from exc
