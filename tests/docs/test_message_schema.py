"""Tests of the JSON schema of messages: it declares the fields of the code, and accepts the same messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cdumay_result import Result

from kser import Message, schemas
from tests.docs.harness import DOCS

SCHEMA = json.loads((DOCS / "message.schema.json").read_text())
#: The Python type of each JSON type.
JSON_TYPES = {"string": str, "integer": int, "object": dict, "null": type(None)}
#: The keywords of the schema; the check below implements no others.
KEYWORDS = {"$schema", "title", "description", "type", "required", "properties"}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Return whether a JSON schema, which may contain only :data:`KEYWORDS`, accepts ``value``."""
    assert set(schema) <= KEYWORDS
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not isinstance(value, tuple(JSON_TYPES[name] for name in types)):
        return False
    if not isinstance(value, dict):
        return True
    properties = schema.get("properties", {})
    return set(schema.get("required", ())) <= set(value) and all(
        accepts(properties[key], value[key]) for key in properties if key in value
    )


@pytest.mark.parametrize(
    ("schema", "declaration"), [(SCHEMA, schemas.MESSAGE), (SCHEMA["properties"]["result"], schemas.RESULT)]
)
def test_json_schema_declares_the_same_fields_as_the_code(schema: dict[str, Any], declaration: Any) -> None:
    kinds = {str: "string", int: "integer", dict: "object", Result: "object"}
    expected = {
        field.name: [kinds[field.kind], "null"] if field.nullable else kinds[field.kind] for field in declaration
    }
    assert {name: part["type"] for name, part in schema["properties"].items()} == expected
    assert list(schema["properties"]) == [field.name for field in declaration]
    assert schema.get("required", []) == [field.name for field in declaration if field.required]


MINIMAL = {"uuid": "1", "entrypoint": "e"}


@pytest.mark.parametrize(
    "data",
    [
        MINIMAL,
        {**MINIMAL, "unknown": 1},
        {**MINIMAL, "params": {"a": [1]}, "metadata": {}, "result": None},
        {**MINIMAL, "result": {"uuid": None, "retcode": None, "stdout": None, "stderr": None, "retval": None}},
        {**MINIMAL, "result": {"retcode": 500, "stderr": "x", "retval": {"error": {}}, "unknown": 1}},
        {"uuid": "1"},
        {"entrypoint": "e"},
        {**MINIMAL, "uuid": None},
        {**MINIMAL, "uuid": 1},
        {**MINIMAL, "params": None},
        {**MINIMAL, "params": []},
        {**MINIMAL, "metadata": None},
        {**MINIMAL, "result": []},
        {**MINIMAL, "result": {"retcode": True}},
        {**MINIMAL, "result": {"retcode": "x"}},
        {**MINIMAL, "result": {"stdout": 1}},
        {**MINIMAL, "result": {"retval": []}},
        [],
    ],
)
def test_json_schema_and_code_accept_the_same_messages(data: Any) -> None:
    try:
        written = json.loads(Message.loads(json.dumps(data)).dumps())
    except Exception:
        assert not accepts(SCHEMA, data)
    else:
        assert accepts(SCHEMA, data)
        assert accepts(SCHEMA, written)
