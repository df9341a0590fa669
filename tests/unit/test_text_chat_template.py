"""Conversations become prompts exactly as transformers renders them, and within bounds."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.text import ChatTemplate, Conversation, Tokenizer
from support.qwen3 import CONVERSATIONS, user, write_qwen3_text_files


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_text_files(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def reference(qwen3: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(qwen3)


@pytest.fixture(scope="module")
def tokenizer(qwen3: Path) -> Tokenizer:
    return Tokenizer.from_directory(qwen3)


@pytest.fixture(scope="module")
def template(qwen3: Path) -> ChatTemplate:
    found = ChatTemplate.from_directory(qwen3)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_qwen3_conversations_equal_transformers(
    name: str, template: ChatTemplate, tokenizer: Tokenizer, reference: Any
) -> None:
    conversation = dict(CONVERSATIONS[name])
    variables = conversation.pop("variables", {})
    arguments = {"add_generation_prompt": True, **conversation}
    messages = arguments.pop("messages")
    expected = reference.apply_chat_template(messages, tokenize=False, **arguments, **variables)
    rendered = template.render(Conversation(messages, variables=variables, **arguments))
    assert rendered == expected
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments, **variables)
    assert tokenizer.encode(rendered, add_special=False) == ids


def test_at_least_twenty_conversations_are_compared() -> None:
    assert len(CONVERSATIONS) >= 20


# Templates of other families use more of what transformers offers.
SOURCES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ unk_token }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['role'] }}{% endfor %}",
    "macros": "{% macro say(m, n=1) %}{{ n }}{{ m.role }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "blocks are trimmed": "{% if true %}\n  a\n  {% endif %}\n b\n",
    "json": "{{ tools | tojson }} {{ messages | tojson(indent=2) }} {{ {'a': '<é>'} | tojson(sort_keys=true) }}",
    "generation marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "undefined variables": "{{ nothing }}{{ 'yes' if nothing is defined else 'no' }}{{ messages[7] }}",
    "recursion": "{% macro down(n) %}{{ n }}{% if n %}{{ down(n - 1) }}{% endif %}{% endmacro %}{{ down(20) }}",
    "else of a loop": "{% for m in [] %}{{ m }}{% else %}none{% endfor %}",
    "a call block": "{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}x{% endcall %}",
}


@pytest.mark.parametrize("name", SOURCES)
def test_other_templates_equal_transformers(name: str, reference: Any) -> None:
    messages = [user("a <b>"), user("ü")]
    tools = [{"name": "f", "x": "<'>"}]
    expected = reference.apply_chat_template(
        messages, chat_template=SOURCES[name], tools=tools, tokenize=False, add_generation_prompt=True
    )
    template = ChatTemplate(SOURCES[name], special_tokens=reference.special_tokens_map)
    assert template.render(Conversation(messages, tools=tools)) == expected


def test_the_date_is_the_local_one() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y-%m') }}").render(Conversation([user("a")]))
    assert rendered in {day.strftime("%Y-%m") for day in (datetime.now(), datetime.now())}  # noqa: DTZ005


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + none }}", "None"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__ }}{{ x.y }}", "x"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ range(10**9) }}", "ange"),
        ("{% include 'secret' %}", "loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deep"),
    ],
)
def test_what_a_template_cannot_do_is_the_requests_fault(source: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason) as raised:
        ChatTemplate(source).render(Conversation([user("a")]))
    assert raised.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    ],
    ids=["silent loops", "recursion", "output"],
)
def test_time_and_size_are_bounded(source: str) -> None:
    template = ChatTemplate(source, max_seconds=0.05, max_chars=10_000)
    with pytest.raises(InvalidArgument, match="shorter"):
        template.render(Conversation([user("a" * 100)]))


def test_a_lone_surrogate_is_refused(template: ChatTemplate) -> None:
    with pytest.raises(InvalidArgument, match="surrogate"):
        template.render(Conversation([user("\ud800")]))


def test_messages_are_data_and_stay_unchanged(template: ChatTemplate) -> None:
    messages = [user("a"), {"role": "assistant", "content": "b", "tool_calls": []}]
    before = json.dumps(messages)
    template.render(Conversation(messages))
    assert json.dumps(messages) == before


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_what_the_server_sets_cannot_be_overridden(name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Conversation([user("a")], variables={name: "x"})


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one"):
        Conversation([])


def write_config(directory: Path, **config: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_checkpoint_names_its_template_in_several_ways(tmp_path: Path) -> None:
    conversation = Conversation([user("a")])
    assert ChatTemplate.from_directory(tmp_path) is None
    assert ChatTemplate.from_directory(write_config(tmp_path)) is None
    bos = {"content": "<s>", "special": True}
    plain = ChatTemplate.from_directory(write_config(tmp_path, chat_template="{{ bos_token }}c", bos_token=bos))
    assert plain is not None
    assert plain.render(conversation) == "<s>c"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, {"name": "odd"}, 7]
    several = ChatTemplate.from_directory(write_config(tmp_path, chat_template=named))
    assert several is not None
    assert several.render(conversation) == "d"
    assert several.render(Conversation([user("a")], tools=[{}])) == "t"
    assert ChatTemplate.from_directory(write_config(tmp_path, chat_template=named[1:])) is None
    (tmp_path / "chat_template.jinja").write_text("file")
    first = ChatTemplate.from_directory(tmp_path)
    assert first is not None
    assert first.render(conversation) == "file"


def test_a_checkpoints_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(FailedPrecondition, match="chat template"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FailedPrecondition, match="UTF-8"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"tokenizer_config\.json"):
        ChatTemplate.from_directory(tmp_path)
