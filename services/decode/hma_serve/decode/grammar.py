"""Structured output: from what a request asks for to which tokens may come next.

Compiling and mask computation happen in a few threads of their own (the library lets go of the interpreter lock), so a
step waits for neither: a request is admitted once its grammar is compiled, and the mask for a sequence's next token is
computed while the forward pass for that token runs.

What a client can make this cost is bounded: the description's size, the library's own limits on symbols, automaton
states and work per mask, the seconds that a compilation may take, the number that wait, and the grammars that are kept.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import torch

from hma_serve.core.call_format import CLOSING, OPENING, SEPARATOR, THOUGHTS, THOUGHTS_END
from hma_serve.core.errors import HmaError, InvalidArgument, NotFound, ResourceExhausted
from hma_serve.core.request import Structure, StructureKind

COMPILE_SECONDS = 10.0
"""After which a request is told that its grammar is too much."""

_RETRY_AFTER = 1.0
_THREADS = 2
_KEPT = 128
_FIELD = "structure"
_TOKENIZER = "tokenizer.json"
# Room to lay a document out, but no room to fill the whole answer with blanks.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \t\n\r]{0,16}"}
# A mark like <tool_call>: one token of some vocabularies.
_MARK = re.compile("(</?[a-z_]+>)")
# The line and the column of a generated grammar.
_PLACE = re.compile(r"^at (\d+)\(\d+\): ")


class Grammar:
    """The output of one sequence so far, and what may follow: the engine's `Guide`.

    Args:
        matcher: At its start; not shared.
        vocab: Tokens of the model.
        threads: Where masks are computed.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._words = (vocab + 31) // 32
        self._threads = threads
        self._mask: Future[torch.Tensor] = Future()
        self._failure: HmaError | None = None

    @property
    def failure(self) -> HmaError | None:
        """See `Guide`: the grammar has become too complex at this text."""
        return self._failure

    def begin(self, output: Sequence[int]) -> None:
        """Takes what an earlier attempt has emitted, and computes the first mask.

        Raises:
            InvalidArgument: That output does not follow the grammar.
        """
        if output and not self._matcher.consume_tokens(list(output)):
            raise InvalidArgument("the tokens that were emitted before do not follow the structure", field=_FIELD)
        self._mask = self._threads.submit(self._compute)

    def allowed(self) -> torch.Tensor:
        """See `Guide`: int32 [ceil(vocab / 32)], one bit a token, the lowest first."""
        try:
            return self._mask.result()
        except HmaError as exc:
            self._failure = exc
            return torch.full((self._words,), -1, dtype=torch.int32)

    def take(self, token: int) -> bool:
        """Takes a drawn token; whether the text is complete and nothing may follow.

        Raises:
            InvalidArgument: The grammar has become too complex at this text.
        """
        if not self._matcher.consume_token(token):
            raise self._lost()
        if self._matcher.is_stopped():
            return True
        self._mask = self._threads.submit(self._compute)
        return False

    def _compute(self) -> torch.Tensor:
        mask = np.zeros(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise self._lost()
        return torch.from_numpy(mask)

    def _lost(self) -> HmaError:
        reason = _first_line(self._matcher.get_error()) or "a token that it does not allow was drawn"
        return InvalidArgument(f"the structure cannot be followed any further: {reason}", field=_FIELD)


class GrammarQueue:
    """Requests that wait until their grammars are compiled; bounded in number and time.

    Args:
        compiler: Compiles.
        limit: Requests at most.
    """

    def __init__(self, compiler: GrammarCompiler, limit: int) -> None:
        self._compiler = compiler
        self._limit = limit
        self._waiting: dict[int, tuple[Future[llguidance.LLMatcher], float]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, number: int, structure: Structure, now: float) -> None:
        """Lets a request wait.

        Raises:
            ResourceExhausted: Too many do.
        """
        if len(self._waiting) >= self._limit:
            raise ResourceExhausted("too many grammars are being compiled", retry_after=_RETRY_AFTER)
        self._waiting[number] = (self._compiler.compile(structure), now + COMPILE_SECONDS)

    def drop(self, number: int) -> None:
        """Forgets a request; idempotent."""
        self._waiting.pop(number, None)

    def take_ready(self, now: float) -> list[tuple[int, Grammar | HmaError]]:
        """The requests that need not wait any more, each with its grammar or the reason why there is none."""
        ready: list[tuple[int, Grammar | HmaError]] = []
        for number, (compiled, until) in list(self._waiting.items()):
            if compiled.done():
                ready.append((number, self._outcome(compiled)))
            elif now >= until:
                ready.append((number, _too_slow()))
            else:
                continue
            del self._waiting[number]
        return ready

    def _outcome(self, compiled: Future[llguidance.LLMatcher]) -> Grammar | HmaError:
        error = compiled.exception()
        if error is None:
            return self._compiler.grammar(compiled.result())
        if isinstance(error, HmaError):
            return error
        raise error


def _too_slow() -> HmaError:
    return InvalidArgument(
        f"the structure could not be compiled within {COMPILE_SECONDS:g} s; ask for a simpler one", field=_FIELD
    )


class GrammarCompiler:
    """Compiles structures for one model, and keeps the last ones.

    Args:
        checkpoint: Its directory; `tokenizer.json` is read when the first structure comes.
        vocab: Tokens of the model.
        eos: Tokens that end a text.
    """

    def __init__(self, checkpoint: Path, vocab: int, eos: Sequence[int]) -> None:
        self._checkpoint = checkpoint
        self._vocab = vocab
        self._eos = list(eos)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._compiled: OrderedDict[Structure, Future[llguidance.LLMatcher]] = OrderedDict()

    def compile(self, structure: Structure) -> Future[llguidance.LLMatcher]:
        """Begins to compile, or finds what was compiled before; the future raises InvalidArgument with the reason."""
        known = self._compiled.get(structure)
        if known is None:
            known = self._compiled[structure] = self._threads.submit(self._compile, structure)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(structure)
        return known

    def grammar(self, compiled: llguidance.LLMatcher) -> Grammar:
        """For one sequence."""
        return Grammar(compiled.deep_copy(), self._vocab, self._threads)

    def close(self) -> None:
        """Begins nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        try:
            definition = (self._checkpoint / _TOKENIZER).read_text(encoding="utf-8")
        except OSError as exc:
            raise NotFound(f"{self._checkpoint} has no {_TOKENIZER}, which structured output needs") from exc
        return llguidance.LLTokenizer(definition, n_vocab=self._vocab, eos_token=self._eos or None)

    def _compile(self, structure: Structure) -> llguidance.LLMatcher:
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, _definition(structure, self._tokenizer), log_level=0)
            error = matcher.get_error()
        except (ValueError, RecursionError) as exc:
            error = str(exc)
        if error:
            raise InvalidArgument(
                f"{_culprit(structure, error)} cannot be followed: {_first_line(error)}", field=_FIELD
            )
        return matcher


def _definition(structure: Structure, tokenizer: llguidance.LLTokenizer) -> str:
    """The library's own description."""
    compile_ = llguidance.LLMatcher
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return compile_.grammar_from_json_schema(structure.texts[0], defaults=_JSON_OPTIONS)
        case StructureKind.JSON_OBJECT:
            return compile_.grammar_from_json_schema('{"type": "object"}', defaults=_JSON_OPTIONS)
        case StructureKind.REGEX:
            return compile_.grammar_from_regex(structure.texts[0])
        case StructureKind.CHOICE:
            texts = " | ".join(_literal(text, tokenizer) for text in structure.texts)
            return compile_.grammar_from_lark(f"start: {texts}")
        case StructureKind.TOOL_CALL:
            return compile_.grammar_from_lark(_calls("call", structure.texts, tokenizer))
        case StructureKind.TOOL_CALLS:
            more = _literal(SEPARATOR, tokenizer)
            return compile_.grammar_from_lark(_calls(f"call ({more} call)*", structure.texts, tokenizer))


def _calls(start: str, functions: Sequence[str], tokenizer: llguidance.LLTokenizer) -> str:
    """Calls in Lark, after thoughts where the model has tokens for them: one that would think first still may."""
    opening, closing = _literal(f"{OPENING}\n", tokenizer), _literal(f"\n{CLOSING}", tokenizer)
    rules = {f"function{position}": _call(function) for position, function in enumerate(functions)}
    rules["call"] = f"{opening} ({' | '.join(rules)}) {closing}"
    if _is_mark(THOUGHTS, tokenizer) and _is_mark(THOUGHTS_END, tokenizer):
        start = f"thoughts? {start}"
        rules["thoughts"] = rf"{THOUGHTS} /(.|\n)*/ {THOUGHTS_END} /\n*/"
    # The functions are the first lines, by whose numbers `_culprit` finds them.
    return "\n".join(f"{name}: {rule}" for name, rule in (rules | {"start": start}).items())


def _call(function: str) -> str:
    """The object between a call's marks: its schema stands alone, so that references into itself hold."""
    described = json.loads(function)
    # A schema that says no type accepts more than objects.
    schema = {**(described.get("parameters") or {}), "type": "object", "x-guidance": _JSON_OPTIONS}
    head = f'{{"name": {json.dumps(described["name"], ensure_ascii=False)}, "arguments": '
    return f'{json.dumps(head, ensure_ascii=False)} %json {json.dumps(schema)} "}}"'


def _literal(text: str, tokenizer: llguidance.LLTokenizer) -> str:
    """A text in Lark. Where the model has one token for a mark, the library takes it for that token alone."""
    parts = filter(None, _MARK.split(text))
    # A string of Lark is a string of JSON.
    return " ".join(part if _is_mark(part, tokenizer) else json.dumps(part, ensure_ascii=False) for part in parts)


def _is_mark(text: str, tokenizer: llguidance.LLTokenizer) -> bool:
    if not _MARK.fullmatch(text):
        return False
    tokens = tokenizer.tokenize_str(text)
    return len(tokens) == 1 and tokenizer.is_special_token(tokens[0])


def _culprit(structure: Structure, error: str) -> str:
    """What an error is about: of several functions the one in whose line of the grammar the library found it."""
    place = _PLACE.match(error)
    if place and structure.kind in (StructureKind.TOOL_CALL, StructureKind.TOOL_CALLS):
        for function in structure.texts[int(place[1]) - 1 :][:1]:
            return f"the function {json.loads(function)['name'][:64]!r}"
    return f"the {structure.kind}"


def _first_line(error: str) -> str:
    """What a client can use: the library's messages go on with excerpts of generated grammars, and may begin there."""
    lines = [line.strip() for line in _PLACE.sub("", error.strip()).splitlines()]
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (causes or lines or [""])[0][:500]
