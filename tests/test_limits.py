"""Tests of the limits of messages: where they arrive and where they are sent."""

from __future__ import annotations

import gc
import json
import logging
import tracemalloc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from cdumay_result import Result
from flask import Flask

from kser import errors
from kser.consumer.client import Commit
from kser.consumer.dead_letters import parse_dead_letter
from kser.consumer.offsets import OffsetTracker
from kser.consumer.work_item import WorkItem
from kser.controller import Controller
from kser.dummy.broker import DummyRecord, InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.limits import Limits, applied, current_limits, environment_limits, header_bytes
from kser.schemas import Message
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.consumer.harness import FaultyConsumer, ScriptedTask, committed
from tests.support import UUID, message, records

pytestmark = pytest.mark.usefixtures("bus")

PATH = ScriptedTask.path
LARGE = {"max_request_size": 100 << 20}


def nested(levels: int, kind: type = list) -> Any:
    """Return lists or dicts inside one another, with this number of levels."""
    value: Any = kind()
    for _ in range(levels - 1):
        value = [value] if kind is list else {"inner": value}
    return value


class Case(NamedTuple):
    """A message above one limit."""

    error: type[errors.LimitExceeded]
    setting: str
    #: Fields of the message.
    fields: Mapping[str, Any] = MappingProxyType({})
    headers: tuple[tuple[str, bytes], ...] = ()


#: Messages one above each limit.
ABOVE = {
    "value": Case(errors.ValueTooLarge, "KSER_MAX_VALUE_BYTES", {"params": {"text": "x" * (32 << 20)}}),
    "one header": Case(errors.HeadersTooLarge, "KSER_MAX_HEADER_BYTES", headers=(("n", b"x" * 65536),)),
    "many headers": Case(errors.HeadersTooLarge, "KSER_MAX_HEADER_BYTES", headers=(("name", b"xx"),) * 10923),
    "header name": Case(errors.HeadersTooLarge, "KSER_MAX_HEADER_BYTES", headers=(("n" * 65537, b""),)),
    "metadata": Case(
        errors.TooManyMetadataKeys, "KSER_MAX_METADATA_KEYS", {"metadata": dict.fromkeys(map(str, range(1001)), 0)}
    ),
    "lists in params": Case(errors.NestedTooDeep, "KSER_MAX_JSON_DEPTH", {"params": {"a": nested(99)}}),
    "objects in params": Case(errors.NestedTooDeep, "KSER_MAX_JSON_DEPTH", {"params": nested(100, dict)}),
    "metadata levels": Case(errors.NestedTooDeep, "KSER_MAX_JSON_DEPTH", {"metadata": {"a": nested(99)}}),
    "result levels": Case(errors.NestedTooDeep, "KSER_MAX_JSON_DEPTH", {"result": {"retval": nested(99, dict)}}),
    "500 levels": Case(errors.NestedTooDeep, "KSER_MAX_JSON_DEPTH", {"params": {"a": nested(500)}}),
    "uuid": Case(errors.UuidTooLong, "KSER_MAX_UUID_LENGTH", {"uuid": "u" * 256}),
    "uuid of 1 MB": Case(errors.UuidTooLong, "KSER_MAX_UUID_LENGTH", {"uuid": "u" * 1_000_000}),
}

#: Messages at the limits.
AT = {
    "headers": Case(errors.HeadersTooLarge, "", headers=(("n", b"x" * 65535),)),
    "metadata": Case(errors.TooManyMetadataKeys, "", {"metadata": dict.fromkeys(map(str, range(1000)), 0)}),
    "lists": Case(errors.NestedTooDeep, "", {"params": {"a": nested(98)}}),
    "objects": Case(errors.NestedTooDeep, "", {"params": nested(99, dict)}),
    "result": Case(errors.NestedTooDeep, "", {"result": {"retval": nested(98, dict)}}),
    "many brackets": Case(errors.NestedTooDeep, "", {"params": {"a": [[], {}] * 5000, "text": "[{" * 5000}}),
    "uuid": Case(errors.UuidTooLong, "", {"uuid": "u" * 255}),
}


def value_of(case: Case) -> bytes:
    """Return the value of the record of a case."""
    return json.dumps({"uuid": UUID, "entrypoint": PATH, **case.fields}).encode()


def consume(case: Case, **options: Any) -> tuple[dict[str, int], int | None]:
    """Consume the record of a case and a second message; return the counts of the consumer and the committed offset."""
    broker = InMemoryBroker.at("")
    broker.send("dice", value_of(case), headers=case.headers)
    broker.send("dice", message(ScriptedTask, uuid="next").dumps().encode())
    consumer = Consumer({}, ["dice"], **options)
    consumer.run_until_idle()
    counts = {"failed": 0, **consumer.counts}
    consumer.close()
    return counts, committed()


# -- messages that arrive ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ABOVE.values(), ids=ABOVE)
def test_message_above_a_limit_fails_with_its_own_error_and_the_next_one_runs(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    counts, offset = consume(case)
    assert (counts["done"], counts["failed"], offset) == (2, 1, 2)
    assert ScriptedTask.ran == ["next"]
    (record,) = records(caplog, logging.WARNING)
    text = record.getMessage()
    assert text.startswith(f"Controller.ImportError: Failed to load data from kafka: {case.error.MSGID}: ")
    assert f"raise {case.setting}" in text
    assert len(text) < 500
    assert record.error["name"] == case.error.__name__  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", AT.values(), ids=AT)
def test_message_at_a_limit_runs(case: Case) -> None:
    counts, _ = consume(case)
    assert counts["failed"] == 0
    assert ScriptedTask.ran == [case.fields.get("uuid", UUID), "next"]


@pytest.mark.parametrize("name", ["metadata", "lists in params", "uuid", "many headers"])
def test_dead_letter_of_a_message_above_a_limit_has_the_reason(name: str) -> None:
    case = ABOVE[name]
    counts, _ = consume(case, dead_letter=True)
    (record,) = InMemoryBroker.at("").topics["dice.dlq"][0]
    letter = parse_dead_letter(record)
    assert letter is not None
    assert counts["dead_lettered"] == 1
    assert (letter.reason, letter.error_class) == ("over-limit", f"kser.errors.{case.error.__name__}")
    assert letter.message is None or name == "many headers"
    assert (letter.value, letter.headers) == (value_of(case), case.headers)


@pytest.mark.parametrize(("name", "uuid", "entrypoint"), [
    ("metadata", UUID, PATH),
    ("lists in params", UUID, PATH),
    ("uuid", None, ""),
    ("value", None, ""),
    ("one header", None, ""),
])  # fmt: skip
def test_error_hook_gets_what_was_decoded_of_a_message_above_a_limit(
    name: str, uuid: str | None, entrypoint: str
) -> None:
    got: list[tuple[Message, Result]] = []

    class HookedController(Controller):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            assert kmsg.uuid == "next"
            return kmsg

        @classmethod
        def onerror(cls, kmsg: Message, result: Result) -> Result:
            got.append((kmsg, result))
            return result

    broker = InMemoryBroker.at("")
    broker.send("dice", value_of(ABOVE[name]), headers=ABOVE[name].headers)
    consumer = Consumer({}, ["dice"])
    consumer.REGISTRY = HookedController
    consumer.run_until_idle()
    consumer.close()
    ((kmsg, result),) = got
    assert (kmsg.uuid == uuid or uuid is None, kmsg.entrypoint) == (True, entrypoint)
    assert kmsg.uuid == result.uuid
    assert len(kmsg.uuid) == 36
    assert (result.retcode, result.retval["error"]["msgid"]) == (413, ABOVE[name].error.MSGID)


def test_controller_without_the_error_path_of_kser_fails_the_message(caplog: pytest.LogCaptureFixture) -> None:
    class OwnRegistry:
        handled: list[Any] = []  # noqa: RUF012  shared on purpose

        def run(self, data: Any) -> None:
            self.handled.append(data)

    InMemoryBroker.at("").send("dice", b"{}", headers=ABOVE["one header"].headers)
    InMemoryBroker.at("").send("dice", b"{}")
    consumer = Consumer({}, ["dice"])
    consumer.REGISTRY = OwnRegistry()
    consumer.run_until_idle()
    assert (OwnRegistry.handled, consumer.counts["failed"], committed()) == (["{}"], 1, 2)
    consumer.close()


@pytest.mark.parametrize("prefix", [b"[", b'{"a":', b'{"uuid":"1","entrypoint":"x","params":{"a":' + b"[" * 200])
def test_endless_nesting_is_answered_as_too_deep(prefix: bytes) -> None:
    result = Controller.run(prefix * 100_000)
    assert (result.retcode, result.retval["error"]["name"]) == (413, "NestedTooDeep")


def test_value_above_the_limit_takes_no_memory_beside_its_bytes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kser")
    value = b'{"uuid": "1", "entrypoint": "x", "params": {"a": [' + b"[]," * 14_000_000 + b"[]]}}"
    tracemalloc.start()
    result = Controller.run(value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.retval["error"]["name"] == "ValueTooLarge"
    assert peak < 1_000_000


@pytest.mark.parametrize("cls", [bytearray, memoryview, type("Text", (str,), {}), type("Bytes", (bytes,), {})])
def test_input_of_another_class_is_checked_as_well(cls: Any) -> None:
    text = json.dumps({"uuid": "u" * 256, "entrypoint": PATH})
    error = errors.UuidTooLong if cls is not memoryview else TypeError
    with pytest.raises(error):
        Message.loads(cls(text) if issubclass(cls, str) else cls(text.encode()))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_levels_are_counted_in_every_encoding(encoding: str) -> None:
    case = ABOVE["lists in params"]
    with pytest.raises(errors.NestedTooDeep):
        Message.loads(value_of(case).decode().encode(encoding))


# -- messages that are sent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ABOVE.values(), ids=ABOVE)
def test_sender_gets_the_error_of_a_message_above_a_limit(case: Case) -> None:
    kmsg = Message(**{"uuid": UUID, "entrypoint": PATH, **case.fields})
    result = Producer(LARGE).send("dice", kmsg, headers=list(case.headers))
    assert (result.retcode, result.retval["error"]["msgid"]) == (413, case.error.MSGID)
    assert f"raise {case.setting}" in result.stderr
    assert InMemoryBroker.at("").values("dice") == []


@pytest.mark.parametrize("case", AT.values(), ids=AT)
def test_message_at_a_limit_is_sent(case: Case) -> None:
    kmsg = Message(**{"uuid": UUID, "entrypoint": PATH, **case.fields})
    assert Producer(LARGE).send("dice", kmsg, headers=list(case.headers)).retcode == 0


@pytest.mark.parametrize("method", ["bulk_send", "send_nowait", "task.send"])
def test_every_way_to_send_checks_the_limits(method: str) -> None:
    producer = Producer(LARGE)
    kmsgs = [message(PATH, params={"a": nested(99)}), message(PATH, uuid="next")]
    results: list[Any] = []
    if method == "bulk_send":
        results.append(producer.bulk_send("dice", kmsgs))
        assert InMemoryBroker.at("").values("dice") == [kmsgs[1].dumps().encode()]
    elif method == "send_nowait":
        producer.send_nowait("dice", kmsgs[0], results.append)
    else:
        cls = OperationRegistry(producer=producer).subscribe(type("Sent", (Task,), {"TOPIC": "dice"}))
        results.append(cls(metadata=dict.fromkeys(map(str, range(1001)))).send())
    assert results[0].retcode != 0
    assert "raise KSER_MAX_" in results[0].stderr


def test_params_beyond_the_recursion_limit_are_too_deep() -> None:
    result = Producer({}).send("dice", message(PATH, params={"a": nested(100_000)}))
    assert result.retval["error"]["name"] == "NestedTooDeep"


def test_raw_records_have_no_limit() -> None:
    Producer(LARGE).produce("dice", b"x" * (33 << 20), headers=[("name", b"x" * 70_000)])
    assert len(InMemoryBroker.at("").values("dice")) == 1


# -- settings ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "KSER_MAX_VALUE_BYTES": ("max_value_bytes", 32 << 20),
    "KSER_MAX_HEADER_BYTES": ("max_header_bytes", 64 << 10),
    "KSER_MAX_METADATA_KEYS": ("max_metadata_keys", 1000),
    "KSER_MAX_JSON_DEPTH": ("max_json_depth", 100),
    "KSER_MAX_UUID_LENGTH": ("max_uuid_length", 255),
}


@pytest.mark.parametrize(("setting", "field"), [(setting, field) for setting, (field, _) in SETTINGS.items()])
def test_each_limit_is_a_setting(setting: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(current_limits(), field) == SETTINGS[setting][1]
    environment_limits.cache_clear()
    monkeypatch.setenv(setting, "7")
    assert current_limits() == Limits()._replace(**{field: 7})


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "much", "inf"])
@pytest.mark.parametrize("cls", [Consumer, Producer])
def test_invalid_limit_is_an_error_of_the_constructor(cls: Any, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_TOPICS", "dice")
    monkeypatch.setenv("KSER_MAX_JSON_DEPTH", value)
    with pytest.raises(errors.SettingError, match="KSER_MAX_JSON_DEPTH must be a whole number"):
        cls({})


def test_raised_limit_lets_a_message_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_MAX_UUID_LENGTH", "256")
    monkeypatch.setenv("KSER_MAX_METADATA_KEYS", "1001")
    kmsg = message(PATH, uuid="u" * 256, metadata=dict.fromkeys(map(str, range(1001)), 0))
    assert Producer({}).send("dice", kmsg).retcode == 0
    consumer = Consumer({}, ["dice"])
    consumer.run_until_idle()
    consumer.close()
    assert ScriptedTask.ran == [kmsg.uuid]


def test_limits_of_an_app_apply_to_its_consumer_and_to_what_its_tasks_send() -> None:
    app = Flask("shop")
    app.config["KSER_MAX_UUID_LENGTH"] = 10
    sent: list[Result] = []
    ScriptedTask.script["1"] = lambda: sent.append(Producer({}).send("other", message(PATH, uuid="u" * 11)))
    for uuid in ("1", "u" * 11):
        InMemoryBroker.at("").send("dice", message(PATH, uuid=uuid).dumps().encode())
    consumer = Consumer({}, ["dice"], app=app)
    consumer.run_until_idle()
    consumer.close()
    assert (ScriptedTask.ran, consumer.counts["failed"], sent[0].retcode) == (["1"], 1, 413)
    assert current_limits() == Limits()


def test_limits_of_an_app_apply_to_its_producer() -> None:
    app = Flask("shop")
    app.config["KSER_MAX_JSON_DEPTH"] = 3
    kmsg = message(PATH, params={"a": [1]})
    assert Producer({}, app=app).send("dice", kmsg).retcode == 0
    kmsg = message(PATH, params={"a": [[1]]})
    assert Producer({}, app=app).send("dice", kmsg).retcode == 413
    assert Producer({}).send("dice", kmsg).retcode == 0


def test_limits_apply_inside_of_the_context_alone() -> None:
    with applied(Limits(max_uuid_length=5)):
        assert current_limits().max_uuid_length == 5
        with pytest.raises(errors.UuidTooLong):
            Message.loads('{"uuid": "123456", "entrypoint": "x"}')
    assert current_limits().max_uuid_length == 255


# -- memory ------------------------------------------------------------------------------------------------------------


def test_headers_count_towards_the_buffered_bytes() -> None:
    consumer = FaultyConsumer(max_buffered_bytes=50_000)
    consumer.poll()
    in_flight = []
    for count in (1, 100):
        for number in range(count):
            value = message(PATH, uuid=f"{count}-{number}").dumps().encode()
            InMemoryBroker.at("").send("dice", value, headers=[("trace", b"x" * 10_000)])
        while consumer.poll() or consumer.in_flight:
            in_flight.append(consumer.in_flight)
            consumer.run_record()
    consumer.close()
    assert len(ScriptedTask.ran) == 101
    assert max(in_flight) == 5


@pytest.mark.parametrize(("headers", "size"), [((), 0), ([("a", b"bc")], 3), ([("a", None), ("é", b"")], 2)])
def test_size_of_headers_is_that_of_names_and_values(headers: Any, size: int) -> None:
    assert header_bytes(headers) == size


def test_unknown_entrypoints_are_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    # The fixture would keep the log records.
    caplog.set_level(logging.CRITICAL, "kser")
    tracemalloc.start()
    for number in range(20):
        Controller.run(message(f"{number}{'x' * 1_000_000}").dumps())
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 5_000_000


def test_work_item_of_a_record_without_key_value_and_headers_has_no_size() -> None:
    record = DummyRecord("dice", 0, 0, None, None)
    assert WorkItem(record, OffsetTracker(Commit(0)), None, None).size == 0
    assert WorkItem(record._replace(headers=(("a", None),)), OffsetTracker(Commit(0)), None, None).size == 1
