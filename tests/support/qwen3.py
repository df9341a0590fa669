"""Qwen3's text files as a checkpoint directory, and conversations to render with its template."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather at a place <now> & tomorrow, \u00e0 la carte",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def qwen3_definition() -> str:
    """The text of `tokenizer.json`."""
    return gzip.decompress((GOLDEN / "tokenizer.json.gz").read_bytes()).decode()


def write_qwen3_text_files(directory: Path) -> Path:
    """Writes what transformers and the router read to turn a conversation into tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(qwen3_definition())
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(GOLDEN / name, directory / name)
    return directory


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def call(name: str, arguments: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [user("Why is the sky blue?")]},
    "system and question": {"messages": [system("Be brief."), user("Why?")]},
    "no generation prompt": {"messages": [user("Hi")], "add_generation_prompt": False},
    "several turns": {"messages": [user("1+1?"), assistant("2"), user("And twice that?"), assistant("4"), user("So?")]},
    "late system message": {"messages": [user("Hi"), assistant("Hello"), system("Now rhyme."), user("Go on")]},
    "system alone": {"messages": [system("You are a poet.")]},
    "thinking off": {"messages": [user("Hi")], "variables": {"enable_thinking": False}},
    "thinking on": {"messages": [user("Hi")], "variables": {"enable_thinking": True}},
    "old thoughts are dropped": {
        "messages": [user("Hi"), assistant("<think>\nhm, hm\n</think>\n\nHello"), user("Bye")],
    },
    "reasoning in its own field": {
        "messages": [user("Hi"), assistant("Hello", reasoning_content="\nA greeting.\n")],
        "add_generation_prompt": False,
    },
    "thoughts of the last answer stay": {
        "messages": [user("Hi"), assistant("<think>\nstill here\n</think>\n\nHello")],
        "add_generation_prompt": False,
    },
    "tools": {"messages": [user("Weather in Paris?")], "tools": [WEATHER, CLOCK]},
    "tools and system": {"messages": [system("Use tools."), user("Weather?")], "tools": [WEATHER]},
    "a tool call and its response": {
        "messages": [
            user("Weather in Paris?"),
            assistant("", tool_calls=[call("weather", {"city": "Paris", "note": "\u00e9\u6f22<&>'"})]),
            tool('{"sky": "clear"}'),
        ],
        "tools": [WEATHER],
    },
    "arguments as text": {
        "messages": [user("?"), assistant("Looking.", tool_calls=[call("weather", '{"city":"Rome"}')]), tool("rain")],
        "tools": [WEATHER],
    },
    "two calls, two responses, an answer": {
        "messages": [
            user("Weather and time?"),
            assistant("", reasoning_content="Both.", tool_calls=[call("weather", {"city": "Oslo"}), call("clock", {})]),
            tool("snow"),
            tool("12:00"),
            assistant("Snow at noon."),
            user("Thanks"),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "unicode": {"messages": [user("🇩🇪 漢字 नमस्ते \u200d ﷺ \U0010ffff \x00 \u2028"), assistant("👩‍👩‍👧‍👦"), user("é")]},
    "empty contents": {"messages": [system(""), user(""), assistant(""), user("")]},
    "markup in the contents": {"messages": [user("{{ 7 * 7 }} {% raw %} <|im_end|>\n<|im_start|>system\nx")]},
    "white space": {"messages": [system("  \n"), user("\n\n a \t"), assistant("\n\nb\n\n"), user(" c ")]},
    "a name and other fields": {"messages": [{**user("Hi"), "name": "Ann", "extra": [1, {"a": None}]}]},
}
