"""The calls of tools in an answer's text, in the form of Qwen3's chat template and the Hermes models (`call_format`).

The newline before a call belongs to it: text and calls, rendered again by the template, give what the model wrote.
Marks within the call's strings are part of them. Elsewhere in a call an opening one begins anew. Whatever is no such
object, or never closes, stays text, and so do thoughts, at the very beginning alone.

The result depends on the text alone, not on how it was cut. Held back are the possible beginning of a mark, and a call
while it may become one: parts of one completion, whose length is bounded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from hma_serve.core.call_format import CLOSING, OPENING, SEPARATOR, THOUGHTS, THOUGHTS_END
from hma_serve.core.errors import InvalidArgument
from hma_serve.router.http import fields
from hma_serve.router.http.strict_json import loads_object


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call.

    Attributes:
        name: Of the function, as the model has it: it need not be one that was offered.
        arguments: A JSON object.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What one piece of text led to.

    Attributes:
        text: Text that is now certain to be outside of calls.
        calls: Calls that are now complete.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()


class _Marks:
    """The marks of which one may come next."""

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._most = max(map(len, marks)) - 1
        self.search = re.compile("|".join(map(re.escape, marks))).search

    def begun(self, text: str) -> int:
        """How many characters at the end of a text without marks may be the beginning of one."""
        lengths = range(min(len(text), self._most), 0, -1)
        return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in self._marks)), 0)


_IN_THOUGHTS = _Marks(THOUGHTS_END)
_IN_TEXT = _Marks(SEPARATOR + OPENING, OPENING)
_IN_CALL = _Marks(SEPARATOR + OPENING, OPENING, CLOSING)


class _Strings:
    """Which strings of a JSON text are open, wherever it is cut."""

    _signs = re.compile(r'(?s)\\.?|["\x00-\x1f]')

    def __init__(self) -> None:
        self.open = False
        self._escape = ""

    def go_on(self, text: str) -> bool:
        """Reads more; False: a string has a character, such as the end of a line, that none can have."""
        sign = ""
        for sign in self._signs.findall(self._escape + text):
            if sign == '"':
                self.open = not self.open
            elif self.open and sign[-1] < " ":
                return False
        self._escape = sign if sign == "\\" else ""
        return True


class ToolCallParser:
    """Finds the calls in one completion's text."""

    def __init__(self) -> None:
        self._awaited: _Marks | None = None
        self._held = ""
        self._call: list[str] = []
        self._blank = False
        self._strings = _Strings()
        self._text: list[str] = []
        self._calls: list[ToolCall] = []

    def push(self, piece: str) -> Parsed:
        """Takes the next piece of text; returns what is certain now."""
        text, self._held = self._held + piece, ""
        if self._awaited is None:
            if len(text) < len(THOUGHTS) and THOUGHTS.startswith(text):
                self._held = text
                return Parsed("")
            self._awaited = _IN_THOUGHTS if text.startswith(THOUGHTS) else _IN_TEXT
        start = 0
        while (found := self._awaited.search(text, start)) is not None:
            self._take(text[start : found.start()])
            self._take_mark(found.group())
            start = found.end()
        end = len(text) - self._awaited.begun(text[start:])
        self._take(text[start:end])
        self._held = text[end:]
        return self._certain()

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        self._give_up()
        self._text.append(self._held)
        self._held = ""
        return self._certain().text

    def _take(self, text: str) -> None:
        if self._awaited is not _IN_CALL:
            self._text.append(text)
            return
        self._call.append(text)
        if self._blank and (begun := text.lstrip()):
            self._blank = False
            # A text that only mentions the mark is not held up.
            if begun[0] != "{":
                self._give_up()
                return
        if not self._strings.go_on(text):
            self._give_up()

    def _take_mark(self, mark: str) -> None:
        # No string has the end of a line, so none has the separator.
        if self._awaited is _IN_CALL and self._strings.open and not mark.startswith(SEPARATOR):
            self._take(mark)
        elif mark.endswith(OPENING):
            self._give_up()
            self._call, self._blank, self._strings, self._awaited = [mark], True, _Strings(), _IN_CALL
        elif self._awaited is _IN_CALL and (call := _read("".join(self._call[1:]))) is not None:
            self._calls.append(call)
            self._call, self._awaited = [], _IN_TEXT
        else:
            self._give_up()
            self._text.append(mark)

    def _give_up(self) -> None:
        """What looked like a call is text, and text goes on."""
        self._text += self._call
        self._call, self._awaited = [], _IN_TEXT

    def _certain(self) -> Parsed:
        certain = Parsed("".join(self._text), tuple(self._calls))
        self._text, self._calls = [], []
        return certain


def _read(block: str) -> ToolCall | None:
    """What stands between the marks, if it is a call."""
    try:
        found = loads_object(block.encode())
        name, arguments = fields.text(found, "name"), fields.obj(found, "arguments")
        # JSON of the model's may have numbers beyond all floats and halves of characters.
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        return ToolCall(name, fields.checked_text(written, "arguments")) if name else None
    except (InvalidArgument, ValueError, RecursionError):
        return None
