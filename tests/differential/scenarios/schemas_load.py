"""Section 2: loading of messages that are accepted, and of messages that are rejected."""

import json

from cdumay_result import Result
from recorder import call, case, describe, emit, main, show

from kser.schemas import Message, MessageSchema

UUID = "11111111-1111-4111-8111-111111111111"


class Special(Message):
    """A subclass of Message, like the one of kser-crypto."""


def payload(**fields) -> dict:
    """Return a valid message as a mapping, with the given fields instead of the default ones."""
    return {"uuid": UUID, "entrypoint": "shop.Order", **fields}


def loads(label: str, **fields) -> None:
    """Load a message with the given fields and print it."""
    call(label, Message.loads, json.dumps(payload(**fields)))


@case("2.load.subclass")
def loading_gives_the_class_it_was_called_on() -> None:
    loaded = Special.loads(json.dumps(payload()))
    show("type", type(loaded))
    show("vars", vars(loaded))


@case("2.load.round-trip")
def what_was_dumped_loads_to_the_same() -> None:
    source = Message(UUID, "shop.Order", {"a": [1, {"b": None}]}, Result(uuid="r", retcode=2, stderr="x"), {"m": 1})
    again = Message.loads(source.dumps())
    show("same text", again.dumps() == source.dumps())
    call("message", again.dumps)


@case("2.load.encodings")
def bytes_in_every_unicode_encoding_are_accepted() -> None:
    text = json.dumps(payload(params={"é": "ü"}), ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        call(encoding, Message.loads, text.encode(encoding))
    call("bytearray", Message.loads, bytearray(text.encode()))
    call("str", Message.loads, text)


@case("2.load.unknown-keys")
def unknown_keys_are_ignored() -> None:
    loads("top level", other=1, UUID=2)
    loads("result", result={"uuid": "r", "other": 1, "retcode": 3})


@case("2.load.duplicate-keys", "2.load.whitespace")
def of_duplicate_keys_the_last_one_counts() -> None:
    call("duplicate", Message.loads, '{"uuid": "a", "entrypoint": "b", "uuid": "c", "params": {"x": 1, "x": 2}}')
    call("whitespace", Message.loads, f" \n\t{json.dumps(payload())}\r\n ")


@case("2.load.absent")
def absent_params_and_metadata_are_empty() -> None:
    loaded = Message.loads(json.dumps(payload()))
    show("params", loaded.params)
    show("metadata", loaded.metadata)


@case("2.load.result-blank")
def an_absent_null_or_empty_result_is_blank() -> None:
    for label, fields in (("absent", {}), ("null", {"result": None}), ("empty", {"result": {}})):
        loads(label, **fields)


@case("2.load.result-without-uuid")
def a_result_without_uuid_gets_one() -> None:
    loads("without uuid", result={"retcode": 1, "stderr": "bad"})
    loads("only unknown keys", result={"other": 1})


@case("2.load.retcode")
def retcodes_are_coerced() -> None:
    for value in ("12", 2.7, -1, 0, "-3", " 4 ", 1e3, True, "abc", "1.5", "", [], {}, 2**70):
        loads(repr(value), result={"uuid": "r", "retcode": value})


@case("2.load.empty-strings")
def empty_strings_are_accepted() -> None:
    call("uuid", Message.loads, '{"uuid": "", "entrypoint": "e"}')
    call("entrypoint", Message.loads, '{"uuid": "u", "entrypoint": ""}')


@case("2.load.odd-values")
def odd_values_are_accepted() -> None:
    call("nan", Message.loads, '{"uuid": "u", "entrypoint": "e", "params": {"a": NaN, "b": -Infinity}}')
    call("surrogate", Message.loads, '{"uuid": "u", "entrypoint": "\\ud800", "params": {"a": "\\udc00"}}')
    call("zero", Message.loads, '{"uuid": "u\\u0000", "entrypoint": "e", "params": {"\\u0000": 1}}')
    call(
        "numbers",
        Message.loads,
        '{"uuid": "u", "entrypoint": "e", "params": {"a": 1e999, "b": -0, "c": 12345678901234567890}}',
    )


@case("2.load.not-json")
def what_is_not_json_is_refused_by_the_parser() -> None:
    for text in (
        "",
        " ",
        "{",
        "nonsense",
        json.dumps(payload()) + "x",
        "{'uuid': 1}",
        "\ufeff" + json.dumps(payload()),
    ):
        call(repr(text), Message.loads, text)
    call("bytes", Message.loads, b"")
    call("nul", Message.loads, b"\x00\x00")


@case("2.load.undecodable")
def undecodable_bytes_are_refused_by_the_codec() -> None:
    for raw in (b"\xff", b'{"uuid": "\xe9"}', b"\x80abc", b"\xfe\xff\xd8\x00"):
        call(repr(raw), Message.loads, raw)


@case("2.load.not-text")
def what_is_no_text_is_refused_as_such() -> None:
    for value in (None, {}, 5, [], payload()):
        call(type(value).__name__, Message.loads, value)


def refused(label: str, **fields) -> None:
    """Load a message that is rejected, and print the whole error."""
    try:
        Message.loads(json.dumps(payload(**fields)))
    except Exception as error:
        emit(f"{label} !! {describe(error)}")
        emit(f"    args {error.args!r} context {type(error.__context__).__module__}.{type(error.__context__).__name__}")
    else:
        emit(f"{label} accepted")


@case("2.load.invalid", "2.load.text-missing")
def a_missing_field_is_refused() -> None:
    call("nothing", Message.loads, "{}")
    call("uuid", Message.loads, '{"entrypoint": "e"}')
    call("entrypoint", Message.loads, '{"uuid": "u"}')
    refused("context", uuid=5)


@case("2.load.text-null")
def null_is_refused() -> None:
    for name in ("uuid", "entrypoint", "params", "metadata"):
        refused(name, **{name: None})


@case("2.load.text-null-result")
def null_inside_the_result() -> None:
    for name in ("uuid", "retcode", "stdout", "stderr", "retval"):
        loads(name, result={"uuid": "r", name: None})


@case("2.load.text-string")
def what_must_be_a_string() -> None:
    for value in (5, True, [], {}, 1.5):
        refused(repr(value), uuid=value, entrypoint=value)
        refused(f"result {value!r}", result={"uuid": value, "stdout": value, "stderr": value})


@case("2.load.text-mapping")
def what_must_be_a_mapping() -> None:
    for value in (5, "x", [], True):
        refused(repr(value), params=value, metadata=value)
        refused(f"result {value!r}", result={"retval": value})


@case("2.load.text-result")
def a_result_must_be_an_object() -> None:
    for value in (5, "x", [], False, 0, ""):
        refused(repr(value), result=value)


@case("2.load.text-retcode")
def a_bad_retcode_is_refused() -> None:
    refused("text", result={"retcode": "abc"})
    refused("bool", result={"retcode": False})


@case("2.load.text-top-level")
def the_top_level_must_be_an_object() -> None:
    for text in ("[]", "5", '"text"', "null", "true", "NaN", "[{}]"):
        call(text, Message.loads, text)


@case("2.load.all-errors", "2.load.error-order")
def all_errors_are_collected_in_the_order_of_the_fields() -> None:
    wrong = {"metadata": 1, "result": {"stderr": 1, "retcode": "x", "retval": 1, "uuid": 2}, "params": 3}
    call("all", Message.loads, json.dumps(wrong | {"entrypoint": 4}))
    call("reordered", Message.loads, json.dumps(dict(reversed(wrong.items()))))


@case("2.schema.load")
def the_schema_itself_gives_plain_dictionaries() -> None:
    call("bare", MessageSchema().load, payload())
    call("with result", MessageSchema().load, payload(result={"retcode": "3"}, metadata={"a": 1}))
    call("empty result", MessageSchema().load, payload(result={}))
    call("refused", MessageSchema().load, payload(uuid=None))


@case("2.schema.dump")
def the_schema_itself_dumps_objects_and_mappings() -> None:
    call("message", MessageSchema().dumps, Message(UUID, "e", {"a": 1}))
    call("mapping", MessageSchema().dump, payload(other=1))
    call("nothing", MessageSchema().dump, {})


if __name__ == "__main__":
    main()
