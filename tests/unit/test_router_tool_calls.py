"""Calls are found wherever the text is cut; whatever is none stays text, to the last character."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hma_serve.router.http.tool_calls import ToolCall, ToolCallParser
from hma_serve.text import ChatTemplate, Conversation, Tokenizer
from support.qwen3 import GOLDEN, assistant, call, qwen3_definition, tool, user

OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
OSLO_CALL = ToolCall("weather", '{"city": "Oslo"}')
CLOCK_CALL = ToolCall("clock", "{}")


def parsed(*pieces: str) -> tuple[str, list[ToolCall]]:
    """All text and all calls."""
    parser = ToolCallParser()
    found = [parser.push(piece) for piece in pieces]
    text = "".join(each.text for each in found) + parser.finish()
    return text, [call for each in found for call in each.calls]


def reference(text: str) -> tuple[str, list[ToolCall]]:
    """The same by looking at the whole text."""
    calls: list[ToolCall] = []

    def without(block: re.Match[str]) -> str:
        try:
            found = json.loads(block[1] if block[2] else "")
            call = ToolCall(found["name"], json.dumps(found.get("arguments", {})))
        except (ValueError, KeyError):
            return block[0]
        if not call.name:
            return block[0]
        calls.append(call)
        return ""

    thoughts = re.match("(?s:<think>.*?(</think>|$))?", text)
    assert thoughts is not None
    return thoughts[0] + BLOCK.sub(without, text[thoughts.end() :]), calls


# A call as far as it may be one: strings are taken whole, with the marks in them, and have no ends of lines.
STRING = r'"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*+'
OUTSIDE = r'(?!\n?<tool_call>|</tool_call>)(?:\\[\\"]|[^"])'
BLANKS = r"(?:(?!\n<tool_call>)\s)*+"
CALL = rf'{BLANKS}(?:{{(?:{STRING}"|{OUTSIDE})*+(?:{STRING})?+)?+'
BLOCK = re.compile(f"\n?<tool_call>({CALL})(</tool_call>)?")
MARKUP = (OSLO, CLOCK, "<tool_call>", "</tool_call>", "<think>", "</think>", "\n", " ", "<tool", "_call>", "</", "a")
BLOCKS = ('{"name": "f", "arguments": {}}', '{"name": "f", "argum', 'ents": {}}', '{"n": 1}', "{}", "[]", "x", '"', "}")
STRINGS = ('{"name": "', '", "arguments": {"a": "', '"}}', "\\", '\\"', "\t", '"<tool_call>"', '"</tool_call>"')
texts = st.lists(st.sampled_from(MARKUP + BLOCKS + STRINGS), max_size=12).map("".join)
# Calls whose names and arguments are made of the same.
signs = st.lists(st.sampled_from(MARKUP + BLOCKS + STRINGS), max_size=3).map("".join)
calls_of_signs = st.builds(
    lambda name, value: f"<tool_call>{json.dumps({'name': f'f{name}', 'arguments': {'a': value}})}</tool_call>",
    signs,
    signs,
)


@settings(deadline=None, max_examples=500)
@given(texts | st.lists(calls_of_signs | texts, max_size=3).map("".join), st.data())
def test_any_split_gives_the_same_result(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(*pieces) == parsed(text) == parsed(*text) == reference(text)


@settings(deadline=None)
@given(st.lists(st.sampled_from(("\n", "<", "<tool", "tool_call", "a", "</think>", "{")), max_size=12).map("".join))
def test_text_is_held_up_only_by_what_may_be_the_beginning_of_a_mark(text: str) -> None:
    parser = ToolCallParser()
    shown, seen = parser.push("A").text, "A"
    for character in text:
        shown += parser.push(character).text
        seen += character
        begun = max(n for n in range(12) for mark in ("\n<tool_call>", "<tool_call>") if seen.endswith(mark[:n]))
        assert shown == seen[: len(seen) - begun]


plain = st.text().filter(lambda text: "<" not in text)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)
made_calls = st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True), st.dictionaries(plain, json_values))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate((GOLDEN / "chat_template.jinja").read_text())


@settings(deadline=None)
@given(plain, st.lists(made_calls, min_size=1, max_size=3))
def test_what_qwen3s_template_writes_is_read_back(
    template: ChatTemplate, content: str, made: list[tuple[str, dict[str, Any]]]
) -> None:
    """An answer that a client sends back becomes the text that the model wrote."""
    calls = [call(name, arguments) for name, arguments in made]
    prompt = template.render(Conversation([user("?"), assistant(content, tool_calls=calls), tool("!")], tools=[{}]))
    written = prompt.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
    text, found = parsed(written)
    assert text == content
    assert [(each.name, json.loads(each.arguments)) for each in found] == made
    sent_back = [call(each.name, each.arguments) for each in found]
    assert prompt == template.render(
        Conversation([user("?"), assistant(text, tool_calls=sent_back), tool("!")], tools=[{}])
    )


def test_qwen3s_tokens_for_the_marks_have_their_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(qwen3_definition())
    ids = tokenizer.encode(f"Let me look.\n{OSLO}\n{CLOCK}", add_special=False)
    detokenizer = tokenizer.detokenizer()
    assert len([token for token in ids if "tool_call" in tokenizer.decode((token,))]) == 4
    assert parsed(*map(detokenizer.push, ids)) == ("Let me look.", [OSLO_CALL, CLOCK_CALL])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call at all", "no call at all", []),
        ("", "", []),
        (OSLO, "", [OSLO_CALL]),
        (f"{OSLO}\n{CLOCK}", "", [OSLO_CALL, CLOCK_CALL]),
        (f"{OSLO}{OSLO}", "", [OSLO_CALL, OSLO_CALL]),
        (f"Look:\n{OSLO}\nand\n{CLOCK}\n", "Look:\nand\n", [OSLO_CALL, CLOCK_CALL]),
        (f"<think>\nhm\n</think>\n\n{OSLO}", "<think>\nhm\n</think>\n", [OSLO_CALL]),
        (f"<think>{OSLO}</think>{CLOCK}", f"<think>{OSLO}</think>", [CLOCK_CALL]),
        (f"<think>{OSLO}", f"<think>{OSLO}", []),
        (f"Write <think>.\n{OSLO}", "Write <think>.", [OSLO_CALL]),
        (f"<tool_call>{OSLO}", "<tool_call>", [OSLO_CALL]),
        (f'<tool_call>\n{{"name": "a", {OSLO}', '<tool_call>\n{"name": "a", ', [OSLO_CALL]),
        (f"</tool_call>{OSLO}</tool_call>", "</tool_call></tool_call>", [OSLO_CALL]),
    ],
)
def test_calls_and_the_text_around_them(text: str, content: str, calls: list[ToolCall]) -> None:
    assert parsed(text) == parsed(*text) == (content, calls)


@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"arguments":{"a":[1,{"b":"c"}]},"name":"f"}', '{"a": [1, {"b": "c"}]}'),
        ('{"name": "f", "arguments": {"a": "\\u00e9\\n\U0001f30a"}}', '{"a": "é\\n\U0001f30a"}'),
        ('{"name": "f", "arguments": {"a": 123456789012345678901234567890}}', '{"a": 123456789012345678901234567890}'),
    ],
)
def test_arguments_are_a_json_object(block: str, arguments: str) -> None:
    assert parsed(f"<tool_call>{block}</tool_call>") == ("", [ToolCall("f", arguments)])


@pytest.mark.parametrize(
    "block",
    [
        "",
        "\n",
        "f()",
        "{}",
        "[]",
        "null",
        '"name"',
        '{"name": ""}',
        '{"name": null}',
        '{"name": 7}',
        '{"name": ["f"]}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "\\ud800"}',
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"name": "f", "arguments": {"a": "b}}',
        '{"name": "f", "arguments": {}}, {"name": "g"}',
        '{"name": "f", "arguments": {"a": "b\n"}}',
        '{"name": "f", "arguments": {"a": "b\\\n"}}',
        '{"name": "f", "arguments": {"a": "<tool_call>}',
        '{"name": "f", "arguments": \\"{"a": "b"}}',
        "{'name': 'f'}",
    ],
    ids=str.__len__,
)
def test_what_is_no_call_stays_text(block: str) -> None:
    text = f"a\n<tool_call>{block}</tool_call>b"
    assert parsed(text) == (text, [])
    # No string of JSON goes on to the next line, so one that does not end costs no more.
    assert parsed(f"{text}\n{OSLO}") == (text, [OSLO_CALL])


@pytest.mark.parametrize("name", ["f", '" </tool_call> !', "\\", '<tool_call>"'])
@pytest.mark.parametrize(
    "value", ["</tool_call>", "<tool_call>", '"</tool_call>', "\\", f"\n{OSLO}\n", "\\\n</tool_call>"]
)
def test_marks_in_strings_are_part_of_the_call(name: str, value: str) -> None:
    block = json.dumps({"name": name, "arguments": {"a": value, value: [value]}})
    arguments = json.dumps({"a": value, value: [value]})
    text = f"a\n<tool_call>{block}</tool_call>b"
    assert parsed(text) == parsed(*text) == ("ab", [ToolCall(name, arguments)])
    assert parsed(f"{text}{OSLO}") == ("ab", [ToolCall(name, arguments), OSLO_CALL])


def test_a_string_that_goes_on_to_the_next_line_ends_the_wait() -> None:
    parser = ToolCallParser()
    assert parser.push('<tool_call>{"name": "</tool_call>').text == ""
    assert parser.push("\n!").text == '<tool_call>{"name": "</tool_call>\n!'


def test_many_marks_in_a_string_take_no_longer_than_other_text() -> None:
    value = "</tool_call><tool_call>" * 50_000
    written = json.dumps({"name": "f", "arguments": {"a": value}})
    pieces = re.findall("(?s).{1,4}", f"<tool_call>{written}</tool_call>")
    assert parsed(*pieces) == ("", [ToolCall("f", json.dumps({"a": value}))])


def test_a_call_that_never_closes_comes_as_text_at_the_end() -> None:
    parser = ToolCallParser()
    assert parser.push(f"a\n{OSLO[:-1]}").text == "a"
    assert parser.finish() == f"\n{OSLO[:-1]}"
    assert parser.finish() == ""


def test_a_text_that_mentions_the_mark_is_not_held_up() -> None:
    parser = ToolCallParser()
    assert [parser.push(piece).text for piece in ("a <tool_call> ", "\n", "tag", " is")] == [
        "a ",
        "",
        "<tool_call> \ntag",
        " is",
    ]
