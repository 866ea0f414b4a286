"""Section 2: construction of messages, and their dumped form."""

import datetime
import decimal
import uuid

from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.schemas import Base, BaseSchema, Message, MessageSchema


def message(**fields) -> Message:
    """Return a message with a readable uuid and the given fields."""
    return Message(**{"uuid": "u-1", "entrypoint": "shop.Order", **fields})


@case("2.schema.base", "2.schema.message")
def the_schemas_declare_their_fields_in_order() -> None:
    for schema in (BaseSchema(), MessageSchema()):
        for name, field in schema.fields.items():
            emit(f"{type(schema).__name__}.{name} {type(field).__name__} required={field.required}")


@case("2.base.class")
def a_base_has_three_attributes() -> None:
    base = Base("u-1", "shop.Order", {"a": 1})
    show("vars", vars(base))
    show("schema", isinstance(Base.MARSHMALLOW_SCHEMA, BaseSchema))
    call("dump", base.dump)
    call("dumps", base.dumps)
    call("str", str, base)
    show("repr", repr(base).split(" at ")[0])


@case("2.base.class", "2.ctor.falsy")
def a_base_without_params_dumps_an_empty_mapping() -> None:
    call("dumps", Base(uuid="u-1", entrypoint="e").dumps)
    call("missing", Base)


@case("2.message.class")
def a_message_has_exactly_its_five_attributes() -> None:
    target = Message("u-1", "shop.Order", {"a": 1}, Result(uuid="r"), {"m": 2})
    show("vars", vars(target))
    show("schema", isinstance(Message.MARSHMALLOW_SCHEMA, MessageSchema))
    show("subclass", issubclass(Message, Base))
    call("missing", Message)


@case("2.message.repr", "2.base.class")
def a_message_shows_its_uuid_entrypoint_and_result() -> None:
    call("repr", repr, message(result=Result(stdout="done")))
    call("failed", repr, message(result=Result(retcode=3, stdout="done", stderr="bad")))
    call("str", str, message(result=Result(uuid="r", stdout="done")))


@case("2.ctor.falsy")
def falsy_params_and_metadata_become_fresh_mappings() -> None:
    for value in (None, {}, [], 0, ""):
        target = message(params=value, metadata=value)
        show(f"params {value!r}", target.params)
        show(f"metadata {value!r}", target.metadata)
    given: dict = {}
    show("fresh", message(params=given).params is given)


@case("2.ctor.identity")
def truthy_params_and_metadata_are_stored_as_they_are() -> None:
    params, metadata = {"a": 1}, [1]
    target = message(params=params, metadata=metadata)
    show("same", (target.params is params, target.metadata is metadata))


@case("2.ctor.result-falsy")
def a_falsy_result_becomes_a_blank_one_with_the_uuid_of_the_message() -> None:
    for value in (None, {}, [], False):
        show(repr(value), message(result=value).result)


@case("2.ctor.result-object")
def a_result_is_stored_as_it_is() -> None:
    result = Result(uuid="r")
    show("same", message(result=result).result is result)


@case("2.ctor.result-mapping")
def a_mapping_is_expanded_into_a_result() -> None:
    show("with uuid", message(result={"uuid": "r", "retcode": 2, "stderr": "bad"}).result)
    call("unknown key", message, result={"other": 1})
    call("not a mapping", message, result=5)


@case("2.ctor.result-without-uuid")
def a_mapping_without_uuid_is_expanded_into_a_result() -> None:
    show("without uuid", message(result={"retcode": 2, "retval": {"a": 1}}).result)


@case("2.ctor.equality")
def messages_are_compared_by_identity() -> None:
    one, two = message(result=Result(uuid="r")), message(result=Result(uuid="r"))
    show("equal", one == two)
    show("itself", one == one)
    show("hashable", len({one, two}))


@case("2.wire.format", "2.wire.key-order")
def the_wire_format_of_a_bare_message() -> None:
    call("bare", message().dumps)
    full = message(params={"b": 1, "a": [None, True, 1.5]}, metadata={"k": "v"})
    full.result = Result(uuid="r", retcode=2, stdout="out", stderr="err", retval={"x": {"y": 1}})
    call("full", full.dumps)
    call("dump", full.dump)


@case("2.wire.escapes", "2.wire.nan", "2.wire.keys")
def the_wire_format_of_odd_values() -> None:
    call("accents", message(params={"é": "\U0001f600"}, entrypoint="shop.É").dumps)
    call("surrogate", message(params={"a": "\ud800"}).dumps)
    call("control", message(params={"a": '\x00\n"\\/\x7f'}).dumps)
    call("nan", message(params={"a": float("nan"), "b": float("-inf")}).dumps)
    call("keys", message(params={1: "int", None: "none", False: "bool", 1.5: "float"}).dumps)
    call("tuple key", message(params={(1, 2): "x"}).dumps)
    call("big", message(params={"a": 2**70, "b": 1e400, "c": 1e22, "d": -0.0}).dumps)


@case("2.dump.copies")
def dump_copies_one_level() -> None:
    inner: list = []
    target = message(params={"a": inner}, metadata={"b": inner}, result=Result(uuid="r", retval={"c": inner}))
    dumped = target.dump()
    show("fresh", (dumped["params"] is target.params, dumped["metadata"] is target.metadata))
    show("fresh retval", dumped["result"]["retval"] is target.result.retval)
    show("shared", all(dumped[k][n] is inner for k, n in (("params", "a"), ("metadata", "b"))))
    show("shared retval", dumped["result"]["retval"]["c"] is inner)


@case("2.dump.not-json")
def values_that_json_does_not_know() -> None:
    values = (datetime.date(2020, 1, 2), uuid.UUID(int=1), decimal.Decimal("1.5"), {1}, b"x", Exception("x"))
    for value in values:
        target = message(params={"a": value})
        show(f"{type(value).__name__} kept", target.dump()["params"]["a"] is value)
        call(f"{type(value).__name__} dumps", target.dumps)
    call("cycle", message(params=cyclic()).dumps)


def cyclic() -> dict:
    """Return a mapping that contains itself."""
    target: dict = {}
    target["self"] = target
    return target


@case("2.dump.not-mapping")
def params_that_are_no_mapping_fail_when_dumped() -> None:
    for value in ([1], "text", 5, [("a", 1)], True):
        target = message(params=value)
        show(f"{value!r} kept", target.params)
        call(f"{value!r} dump", target.dump)
        call(f"{value!r} dumps", target.dumps)
    call("metadata", message(metadata=[1]).dump)


@case("2.dump.coerced")
def values_are_coerced_when_dumped() -> None:
    call("uuid", Message(uuid=12, entrypoint=3.5).dumps)
    call("null uuid", Message(uuid=None, entrypoint=None, result=Result(uuid="r")).dumps)
    call("bytes uuid", Message(uuid=b"abc", entrypoint=b"e", result=Result(uuid="r")).dumps)
    call("not utf-8", Message(uuid=b"\xff", entrypoint="e", result=Result(uuid="r")).dumps)
    for retcode in ("12", 1.9, None, True, "abc", [], 2**70, float("nan")):
        call(f"retcode {retcode!r}", message(result=Result(uuid="r", retcode=retcode)).dumps)
    for stdout in (5, b"abc", None, ["x"], True):
        call(f"stdout {stdout!r}", message(result=Result(uuid="r", stdout=stdout, stderr=stdout)).dumps)
    for retval in ([("a", 1)], "x", 5):
        call(f"retval {retval!r}", message(result=Result(uuid="r", retval=retval)).dumps)


@case("2.dump.deleted")
def deleted_attributes_are_left_out() -> None:
    for name in ("params", "result", "metadata", "uuid", "entrypoint"):
        target = message(result=Result(uuid="r"))
        delattr(target, name)
        call(name, target.dumps)


@case("2.dump.replaced")
def values_that_were_assigned_later_are_what_is_dumped() -> None:
    target = message(result=Result(uuid="r"))
    target.params, target.metadata, target.result = None, None, None
    call("nulls", target.dumps)
    target = message(result=Result(uuid="r"))
    target.result = {"uuid": "d", "retcode": 4}
    call("result as mapping", target.dumps)
    target.extra = "ignored"
    call("further attribute", target.dumps)


if __name__ == "__main__":
    main()
