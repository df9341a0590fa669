"""Structured output as bodies ask for it."""

from typing import Any

import pytest

from hma_serve.core.errors import InvalidArgument
from hma_serve.core.request import Structure
from hma_serve.router.http.structure_body import read_structure

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structure.json_object()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA},
                }
            },
            Structure.json_schema(SCHEMA),
        ),
        ({"guided_json": SCHEMA}, Structure.json_schema(SCHEMA)),
        ({"guided_json": '{"type": "string"}'}, Structure.json_schema('{"type": "string"}')),
        ({"guided_regex": "a+"}, Structure.regex("a+")),
        ({"guided_choice": ["a", "b"]}, Structure.choice(["a", "b"])),
        ({"structured_outputs": {"json": SCHEMA}}, Structure.json_schema(SCHEMA)),
        ({"structured_outputs": {"json_object": True, "regex": None}}, Structure.json_object()),
        ({"structured_outputs": {"regex": "a+", "disable_any_whitespace": True}}, Structure.regex("a+")),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "text"}}, Structure.choice(["a"])),
    ],
)
def test_every_way_to_ask(body: dict[str, Any], wanted: Structure | None) -> None:
    assert read_structure(body) == wanted


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "response_format"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "\ud800"}, "guided_regex"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_structure(body)
    assert caught.value.field == field
