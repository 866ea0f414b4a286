"""Tests of the wire format. Behaviour page, section 2."""

from __future__ import annotations

import json
import uuid
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from kser.schemas import Base, BaseSchema, Message, MessageSchema, dump_result
from tests.support import UUID

WIRE = (
    '{"uuid": "1", "entrypoint": "shop.Pay", "params": {"caf\\u00e9": [1, null]},'
    ' "result": {"uuid": "1", "retcode": 0, "stdout": "", "stderr": "", "retval": {}}, "metadata": {}}'
)


class SchemaMessage(Message):
    """Message that is read and written with a schema, never on the fast path."""

    MARSHMALLOW_SCHEMA = MessageSchema()


#: Runs a test on the fast path and with a schema.
DIRECT_AND_SCHEMA = pytest.mark.parametrize("cls", [Message, SchemaMessage])


def load(cls: type[Message], data: Any) -> Message:
    return cls.loads(json.dumps(data))


def data_with_result(**fields: Any) -> dict[str, Any]:
    return {"uuid": "1", "entrypoint": "shop.Pay", "result": {"uuid": "2", **fields}}


# -- writing -----------------------------------------------------------------------------------------------------------


@DIRECT_AND_SCHEMA
def test_serialised_message_equals_the_published_one(cls: type[Message]) -> None:
    assert cls("1", "shop.Pay", {"café": [1, None]}).dumps() == WIRE


@DIRECT_AND_SCHEMA
def test_loaded_message_is_written_unchanged(cls: type[Message]) -> None:
    assert cls.loads(WIRE).dumps() == WIRE
    assert cls.loads(WIRE.encode("utf-16")).dumps() == WIRE


@DIRECT_AND_SCHEMA
def test_nan_surrogates_and_non_text_keys_are_written_as_json_does(cls: type[Message]) -> None:
    text = cls("1", "x", {"n": float("nan"), 1: "\ud800", None: "\U0001f600"}).dumps()
    assert '{"n": NaN, "1": "\\ud800", "null": "\\ud83d\\ude00"}' in text


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize("value", [datetime(2020, 1, 1), uuid.UUID(int=1), Decimal(1), {1}, b"x", object()])
def test_value_that_is_not_json_is_a_type_error(cls: type[Message], value: Any) -> None:
    kmsg = cls("1", "x", {"value": value})
    assert kmsg.dump()["params"]["value"] is value
    with pytest.raises(TypeError, match=f"Object of type {type(value).__name__} is not JSON serializable"):
        kmsg.dumps()


@DIRECT_AND_SCHEMA
def test_dump_copies_one_level_deep(cls: type[Message]) -> None:
    inner: list[Any] = []
    kmsg = cls("1", "x", {"inner": inner}, Result(retval={"inner": inner}), {"inner": inner})
    data = kmsg.dump()
    for copy, original in (
        (data["params"], kmsg.params),
        (data["metadata"], kmsg.metadata),
        (data["result"]["retval"], kmsg.result.retval),
    ):
        assert copy == original
        assert copy is not original
        assert copy["inner"] is inner


@pytest.mark.parametrize(
    ("field", "value", "dumped"),
    [
        ("retcode", "12", 12),
        ("retcode", 1.9, 1),
        ("retcode", None, None),
        ("stdout", 5, "5"),
        ("stdout", b"abc", "abc"),
        ("stdout", None, None),
        ("uuid", 12, "12"),
    ],
)
def test_values_of_other_types_are_converted(field: str, value: Any, dumped: Any) -> None:
    result = Result()
    setattr(result, field, value)
    assert Message("1", "x", result=result).dump()["result"][field] == dumped
    assert dump_result(result)[field] == dumped


def test_non_numeric_return_code_cannot_be_dumped() -> None:
    with pytest.raises(ValueError, match="abc"):
        Message("1", "x", result=Result(retcode="abc")).dump()


@pytest.mark.parametrize("params", ["text", [1], 5])
def test_params_that_are_no_mapping_cannot_be_dumped(params: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Message("1", "x", params).dump()


def test_deleted_attributes_are_left_out() -> None:
    kmsg = Message("1", "x", {"a": 1})
    del kmsg.params, kmsg.result, kmsg.metadata
    assert kmsg.dump() == {"uuid": "1", "entrypoint": "x", "params": {}}


def test_non_text_uuid_is_converted() -> None:
    assert Message(12, "x").dump()["uuid"] == "12"  # type: ignore[arg-type]


def test_dumps_share_no_default() -> None:
    one, two = Base("1", "x"), Base("1", "x")
    del one.params, two.params
    one.dump()["params"]["a"] = 1
    assert two.dump()["params"] == {}


@pytest.mark.parametrize("result", [None, 0, ""])
def test_missing_result_is_dumped_as_an_empty_dict(result: Any) -> None:
    assert dump_result(result) == {}


# -- objects -----------------------------------------------------------------------------------------------------------


def test_base_message_has_no_result() -> None:
    base = Base("1", "shop.Pay", {"a": 1})
    assert base.dumps() == '{"uuid": "1", "entrypoint": "shop.Pay", "params": {"a": 1}}'
    assert str(base) == str(base.dump())
    assert isinstance(Base.MARSHMALLOW_SCHEMA, BaseSchema)
    assert isinstance(Message.MARSHMALLOW_SCHEMA, MessageSchema)


def test_attributes_are_exactly_the_names_of_the_constructor() -> None:
    assert list(vars(Message("1", "x"))) == ["uuid", "entrypoint", "params", "result", "metadata"]


def test_message_is_rebuilt_from_its_attributes() -> None:
    kmsg = Message("1", "x", {"a": 1}, Result(stdout="s"), {"m": 1})
    assert SchemaMessage(**vars(kmsg)).dumps() == kmsg.dumps()


def test_truthy_arguments_are_stored_and_falsy_ones_become_fresh() -> None:
    params, metadata, result = {"a": 1}, {"m": 1}, Result()
    kmsg = Message("1", "x", params, result, metadata)
    assert (kmsg.params is params, kmsg.metadata is metadata, kmsg.result is result) == (True,) * 3
    empty: dict[str, Any] = {}
    assert Message("1", "x", empty).params is not empty


@pytest.mark.parametrize("result", [None, {}, [], False])
def test_falsy_result_becomes_a_blank_one_with_the_message_uuid(result: Any) -> None:
    blank = Message("1", "x", result=result).result
    assert (blank.uuid, blank.retcode, blank.retval) == ("1", 0, {})


def test_result_may_be_given_as_a_dict() -> None:
    result = Message("1", "x", result={"uuid": "2", "stdout": "s"}).result
    assert (result.uuid, result.stdout) == ("2", "s")


def test_result_without_a_uuid_gets_the_message_uuid() -> None:
    """C15"""
    assert Message("1", "x", result={"stdout": "s"}).result.uuid == "1"
    assert Message.loads('{"uuid": "1", "entrypoint": "x", "result": {"stdout": "s"}}').result.uuid == "1"
    assert Message.loads('{"uuid": "1", "entrypoint": "x", "result": {"uuid": null, "stdout": "s"}}').result.uuid == "1"


@pytest.mark.parametrize("result", [{"unknown": 1}, 5])
def test_invalid_result_is_a_type_error(result: Any) -> None:
    with pytest.raises(TypeError):
        Message("1", "x", result=result)


def test_repr_and_str_show_the_message() -> None:
    kmsg = Message("1", "shop.Pay", result=Result(stdout="paid"))
    assert repr(kmsg) == "Message<uuid='1', entrypoint='shop.Pay', result=paid>"
    assert str(kmsg) == str(kmsg.dump())


def test_messages_are_equal_only_to_themselves() -> None:
    assert Message("1", "x") != Message("1", "x")


# -- reading -----------------------------------------------------------------------------------------------------------


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_bytes_are_decoded_as_json_decodes_them(cls: type[Message], encoding: str) -> None:
    assert cls.loads(WIRE.encode(encoding)).entrypoint == "shop.Pay"
    assert cls.loads(bytearray(WIRE.encode(encoding))).entrypoint == "shop.Pay"


@DIRECT_AND_SCHEMA
def test_minimal_message_is_completed(cls: type[Message]) -> None:
    kmsg = load(cls, {"uuid": "1", "entrypoint": "x"})
    assert type(kmsg) is cls
    assert (kmsg.params, kmsg.metadata, kmsg.result.uuid) == ({}, {}, "1")


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize("result", [None, {}])
def test_empty_result_becomes_a_blank_one_with_the_message_uuid(cls: type[Message], result: Any) -> None:
    assert load(cls, {"uuid": "1", "entrypoint": "x", "result": result}).result.uuid == "1"


@DIRECT_AND_SCHEMA
def test_unknown_and_duplicate_keys_are_accepted(cls: type[Message]) -> None:
    kmsg = cls.loads(' {"uuid": "0", "uuid": "1", "entrypoint": "x", "new": 1, "result": {"uuid": "2", "new": 1}} \n')
    assert (kmsg.uuid, kmsg.result.uuid) == ("1", "2")


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize(("written", "loaded"), [("12", 12), (2.7, 2)])
def test_return_codes_are_converted(cls: type[Message], written: Any, loaded: int) -> None:
    assert load(cls, data_with_result(retcode=written)).result.retcode == loaded


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize("field", ["uuid", "retcode", "stdout", "stderr", "retval"])
def test_null_is_accepted_in_every_field_of_a_result(cls: type[Message], field: str) -> None:
    """C14: every text that kser writes can be read."""
    result = load(cls, data_with_result(**{field: None})).result
    assert getattr(result, field) == getattr(Result(uuid="1"), field)


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize("data", ["", "{", "{} x", "\ufeff{}", "NULL"])
def test_text_that_is_not_json_is_a_value_error(cls: type[Message], data: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        cls.loads(data)


@DIRECT_AND_SCHEMA
def test_bytes_that_are_no_text_are_a_unicode_error(cls: type[Message]) -> None:
    with pytest.raises(UnicodeDecodeError):
        cls.loads(b'{"uuid": "\xff"}')


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize("data", [None, {}, 5])
def test_input_that_is_neither_text_nor_bytes_is_a_type_error(cls: type[Message], data: Any) -> None:
    with pytest.raises(TypeError, match="must be str, bytes or bytearray"):
        cls.loads(data)


MISSING = ["Missing data for required field."]
NULL = ["Field may not be null."]
NO_TEXT = ["Not a valid string."]
NO_MAPPING = ["Not a valid mapping type."]


@DIRECT_AND_SCHEMA
@pytest.mark.parametrize(
    ("data", "extra"),
    [
        ({}, {"uuid": MISSING, "entrypoint": MISSING}),
        ({"uuid": None, "entrypoint": None}, {"uuid": NULL, "entrypoint": NULL}),
        ({"uuid": 1, "entrypoint": []}, {"uuid": NO_TEXT, "entrypoint": NO_TEXT}),
        (
            {"uuid": "1", "entrypoint": "x", "params": 1, "metadata": "m"},
            {"params": NO_MAPPING, "metadata": NO_MAPPING},
        ),
        ({"uuid": "1", "entrypoint": "x", "params": None, "metadata": None}, {"params": NULL, "metadata": NULL}),
        ({"uuid": "1", "entrypoint": "x", "result": 5}, {"result": {"_schema": ["Invalid input type."]}}),
        (data_with_result(retcode="abc"), {"result": {"retcode": ["Not a valid integer."]}}),
        (data_with_result(retcode=True), {"result": {"retcode": ["Not a valid integer."]}}),
        (data_with_result(stdout=1, retval=[]), {"result": {"stdout": NO_TEXT, "retval": NO_MAPPING}}),
        ([], {"_schema": ["Invalid input type."]}),
        (None, {"_schema": ["Invalid input type."]}),
    ],
)
def test_json_that_is_no_message_is_rejected_with_the_reasons(
    cls: type[Message], data: Any, extra: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as caught:
        load(cls, data)
    error = caught.value
    assert (error.message, error.code, error.msgid) == ("Failed to load message", 400, "ERR-04413")
    assert error.extra == extra
    assert error.stack


def test_empty_uuid_and_entrypoint_are_accepted() -> None:
    kmsg = load(Message, {"uuid": "", "entrypoint": ""})
    assert (kmsg.uuid, kmsg.entrypoint) == ("", "")
    assert kmsg.result.uuid


def test_schema_load_returns_a_plain_dict() -> None:
    data = MessageSchema().load({"uuid": "1", "entrypoint": "x", "new": 1})
    assert data == {"uuid": "1", "entrypoint": "x", "result": None}


# -- fast path and schema ----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
MAPPING = st.dictionaries(st.text(max_size=3), JSON, max_size=2)
TEXT = st.text(max_size=3)
RESULTS = st.fixed_dictionaries(
    {},
    optional={
        "uuid": TEXT.filter(bool) | JSON.filter(lambda value: value != ""),
        "retcode": st.integers(-9, 999) | JSON,
        "stdout": TEXT | JSON,
        "stderr": TEXT | JSON,
        "retval": MAPPING | JSON,
        "new": JSON,
    },
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "uuid": st.just(UUID) | JSON.filter(lambda value: value != ""),
        "entrypoint": TEXT | JSON,
        "params": MAPPING | JSON,
        "result": RESULTS | JSON,
        "metadata": MAPPING | JSON,
        "new": JSON,
    },
)


def outcome(cls: type[Message], text: str) -> Any:
    """Return the written forms of the loaded message, or the error."""
    try:
        kmsg = cls.loads(text)
        return [kmsg.dumps(), kmsg.dump(), dump_result(kmsg.result)]
    except (ValidationError, TypeError, ValueError) as error:
        return type(error), str(error), getattr(error, "extra", None)


@settings(database=None, deadline=None, max_examples=300, print_blob=True)
@given(MESSAGES | JSON)
def test_fast_path_and_schema_give_the_same_result(data: Any) -> None:
    """Design page, "Speed"."""
    text = json.dumps(data)
    assert outcome(Message, text) == outcome(SchemaMessage, text)
