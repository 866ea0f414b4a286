"""Tests of dead letters: failed messages are written to their own topic before their offset is committed."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from typing import Any

import pytest
from cdumay_error import Error as CduError
from cdumay_result import Result

from kser import signals
from kser.attempt import FAILED, Attempt, Failure, current_attempt
from kser.consumer.dead_letters import PREFIX, TEXT_LIMITS, DeadLetterWriter
from kser.consumer.logs import ConsumerLogger
from kser.controller import BaseProducer, Controller
from kser.dummy.broker import DummyRecord, InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.errors import RecordRejected, SettingError
from kser.retry import Retry
from tests.consumer.harness import (
    MANUAL_COMMIT,
    FaultyConsumer,
    ScriptedTask,
    committed,
    new_consumer,
    send_messages,
)
from tests.support import Clock, lines, message, record_of

pytestmark = pytest.mark.usefixtures("bus")

RETRY_AT_ONCE = Retry(max_attempts=3, delay=0)


def dead_letters(topic: str = "dice.dlq") -> list[DummyRecord]:
    """Return the records of a dead-letter topic."""
    return [record for log in InMemoryBroker.at("").topics.get(topic, []) for record in log]


def failure_headers(record: DummyRecord) -> dict[str, str]:
    """Return the headers that describe the failure, by their names without the prefix."""
    return {
        name.removeprefix(PREFIX): (value or b"").decode() for name, value in record.headers if name.startswith(PREFIX)
    }


def consume(**options: Any) -> Consumer:
    """Consume all messages with dead letters; return the consumer."""
    consumer = new_consumer(MANUAL_COMMIT, **{"dead_letter": True, **options})
    consumer.run_until_idle()
    return consumer


# -- the content of a dead letter --------------------------------------------------------------------------------------


def test_undecodable_record_is_dead_lettered_unchanged(bus: InMemoryBroker) -> None:
    original = (("trace", b"\x00\xff"), ("empty", None), ("trace", b"again"))
    bus.create_topic("dice", 2)
    bus.send("dice", b"good bytes", partition=1)
    bus.send("dice", b"\xff no message", key=b"k\xff", headers=original, partition=1)
    consume()
    _, letter = dead_letters()
    assert (letter.value, letter.key, letter.headers[:3]) == (b"\xff no message", b"k\xff", original)
    headers = failure_headers(letter)
    assert (headers["reason"], headers["attempts"]) == ("undecodable", "1")
    assert (headers["topic"], headers["partition"], headers["offset"], headers["timestamp"]) == ("dice", "1", "1", "0")
    assert headers["error-class"]
    assert headers["error-message"]


def test_null_value_is_dead_lettered_as_null(bus: InMemoryBroker) -> None:
    bus.send("dice", None, key=b"k")
    consume()
    (letter,) = dead_letters()
    assert (letter.value, letter.key, failure_headers(letter)["reason"]) == (None, b"k", "undecodable")


def test_dead_letter_names_an_unknown_entrypoint() -> None:
    send_messages("1", cls="shop.Unknown")
    consume(retry=RETRY_AT_ONCE)
    (letter,) = dead_letters()
    headers = failure_headers(letter)
    assert (headers["reason"], headers["attempts"]) == ("unknown-entrypoint", "1")
    assert headers["error-class"] == "cdumay_error.types.ValidationError"
    assert "Entrypoint 'shop.Unknown' not registred" in headers["error-message"]


def test_dead_letter_is_written_after_the_last_attempt_with_its_error() -> None:
    ScriptedTask.script["1"] = ConnectionError("refused")
    send_messages("1")
    consumer = consume(retry=RETRY_AT_ONCE)
    assert ScriptedTask.ran == ["1"] * 3
    (letter,) = dead_letters()
    headers = failure_headers(letter)
    assert (headers["reason"], headers["attempts"]) == ("failed", "3")
    assert (headers["error-class"], headers["error-message"]) == ("ConnectionError", "refused")
    assert consumer.counts == {"done": 1, "failed": 1, "retried": 2, "dead_lettered": 1}


def test_dead_letter_of_a_failed_result_has_no_error_class() -> None:
    ScriptedTask.script["1"] = lambda: Result(retcode=7, stderr="card declined")
    send_messages("1")
    consume()
    (letter,) = dead_letters()
    assert (failure_headers(letter)["error-class"], failure_headers(letter)["error-message"]) == ("", "card declined")


def test_dead_letter_names_its_consumer_and_time() -> None:
    send_messages("1", cls="shop.Unknown")
    before = int(time.time() * 1000)
    consume()
    headers = failure_headers(dead_letters()[0])
    assert headers["consumer"].split()[::2] == ["Consumer", str(os.getpid())]
    assert before <= int(headers["time"]) <= time.time() * 1000


def test_dead_letter_escapes_text_without_a_utf_8_form() -> None:
    ScriptedTask.script["1"] = ValueError("caf\u00e9 \udc80")
    send_messages("1")
    consume()
    assert failure_headers(dead_letters()[0])["error-message"] == "caf\u00e9 \\udc80"


@pytest.mark.parametrize("error", [SystemExit(2), ValueError("x")])
def test_raising_task_is_dead_lettered_even_with_system_exit(error: BaseException) -> None:
    ScriptedTask.script["1"] = error
    send_messages("1", "2")
    consume()
    assert len(dead_letters()) == 1
    assert (ScriptedTask.ran, committed()) == (["1", "2"], 2)


def test_raising_registry_gives_a_dead_letter() -> None:
    class RaisingRegistry:
        @staticmethod
        def run(data: Any) -> None:
            raise RuntimeError("registry")

    send_messages("1")
    consumer = new_consumer(MANUAL_COMMIT, dead_letter=True)
    consumer.REGISTRY = RaisingRegistry
    consumer.run_until_idle()
    assert failure_headers(dead_letters()[0])["error-class"] == "RuntimeError"


def test_message_rejected_by_a_hook_is_dead_lettered() -> None:
    class RejectingController(Controller):
        @classmethod
        def onmessage(cls, kmsg: Any) -> Any:
            raise ValueError("rejected")

    send_messages("1")
    consumer = new_consumer(MANUAL_COMMIT, dead_letter=True)
    consumer.REGISTRY = RejectingController
    consumer.run_until_idle()
    assert (failure_headers(dead_letters()[0])["reason"], ScriptedTask.ran) == ("failed", [])


def test_task_that_cannot_be_built_is_dead_lettered() -> None:
    class BrokenTask(ScriptedTask):
        def postinit(self) -> None:
            raise ConnectionError("refused")

    Controller.register(BrokenTask.path, BrokenTask)
    send_messages("1", cls=BrokenTask)
    consumer = consume()
    assert failure_headers(dead_letters()[0])["error-message"] == "refused"
    assert consumer.counts["failed"] == 1


def test_successful_message_is_not_dead_lettered() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    send_messages("1", "2")
    consume(retry=RETRY_AT_ONCE)
    assert dead_letters() == []


# -- the dead-letter topic ---------------------------------------------------------------------------------------------


def test_failed_message_is_committed_without_a_dead_letter_by_default(caplog: pytest.LogCaptureFixture) -> None:
    """As in kser 0.8.27, a failed message is only logged and counted."""
    send_messages("1", cls="shop.Unknown")
    consumer = consume(dead_letter=None)
    assert (set(InMemoryBroker.at("").topics), committed()) == ({"dice"}, 1)
    assert consumer.counts == {"done": 1, "failed": 1, "dead_lettered": 0}
    assert record_of(caplog, "Controller.Failed: ")


def test_each_topic_has_its_own_dead_letter_topic(bus: InMemoryBroker) -> None:
    for topic in ("dice", "cards"):
        bus.send(topic, b"no message")
    Consumer({}, ["dice", "cards"], dead_letter=True).run_until_idle()
    assert (len(dead_letters("dice.dlq")), len(dead_letters("cards.dlq"))) == (1, 1)


def test_dead_letters_of_all_topics_may_share_a_named_topic(bus: InMemoryBroker) -> None:
    for topic in ("dice", "cards"):
        bus.send(topic, b"no message")
    Consumer({}, ["dice", "cards"], dead_letter="broken").run_until_idle()
    assert {failure_headers(letter)["topic"] for letter in dead_letters("broken")} == {"dice", "cards"}


def test_dead_lettered_signal_is_emitted() -> None:
    emitted: list[Any] = []

    def listen(sender: Any, topic: str, record: Any, failure: Failure) -> None:
        emitted.append((sender, topic, record.offset, failure))

    ScriptedTask.script["1"] = KeyError("x")
    send_messages("1")
    with signals.dead_lettered.connected_to(listen):
        consume()
    assert emitted == [(Consumer, "dice.dlq", 0, Failure("failed", "KeyError", "'x'"))]


# -- dead letters that cannot be written -------------------------------------------------------------------------------


class FailingProducer(Producer):
    """A producer that writes nothing until ``is_up``."""

    is_up = False
    tries = 0

    def produce(self, *arguments: Any, **options: Any) -> None:
        self.tries += 1
        if not self.is_up:
            raise ConnectionError("no broker")
        super().produce(*arguments, **options)


class ConsumerWithFailingProducer(Consumer):
    """A consumer whose dead letters fail to be written until its producer is up."""

    def make_producer(self) -> BaseProducer:
        self.failing_producer = FailingProducer(self.config)
        return self.failing_producer


def test_unwritten_dead_letter_blocks_its_partition_alone(
    bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    bus.create_topic("dice", 2)
    ScriptedTask.script["bad"] = KeyError("x")
    send_messages("bad", partition=0)
    clock = Clock()
    consumer = ConsumerWithFailingProducer(MANUAL_COMMIT, ["dice"], dead_letter=True, clock=clock)
    consumer.step(timeout=0)
    send_messages("held", partition=0)
    send_messages("free", partition=1)
    for _ in range(50):
        clock.advance(1)
        consumer.step(timeout=0)
    assert (ScriptedTask.ran, committed(0), committed(1)) == (["bad", "free"], 0, 1)
    (line,) = [line for line in lines(caplog, logging.ERROR) if line.startswith("ConsumerWithFailingProducer: ")]
    assert line == (
        "ConsumerWithFailingProducer: offset 0 of dice[0] failed (failed) and its dead letter cannot be written to"
        " 'dice.dlq': no broker; the partition is paused until the write succeeds"
    )
    assert 4 < consumer.failing_producer.tries < 10
    consumer.failing_producer.is_up = True
    clock.advance(30)
    consumer.run_until_idle()
    assert (len(dead_letters()), ScriptedTask.ran, committed(0)) == (1, ["bad", "free", "held"], 2)
    assert consumer.counts == {"done": 3, "failed": 1, "dead_lettered": 1}


def test_unwritten_dead_letter_does_not_run_its_task_again() -> None:
    ScriptedTask.script["1"] = KeyError("x")
    send_messages("1")
    clock = Clock()
    consumer = ConsumerWithFailingProducer(MANUAL_COMMIT, ["dice"], dead_letter=True, clock=clock)
    consumer.step(timeout=0)
    clock.advance(100)
    consumer.step(timeout=0)
    assert (ScriptedTask.ran, consumer.failing_producer.tries, consumer.counts["failed"]) == (["1"], 2, 1)


def test_message_with_an_unwritten_dead_letter_is_redelivered_after_close() -> None:
    ScriptedTask.script["1"] = KeyError("x")
    send_messages("1")
    consumer = ConsumerWithFailingProducer(MANUAL_COMMIT, ["dice"], dead_letter=True)
    consumer.step(timeout=0)
    consumer.close()
    assert (committed(), dead_letters()) == (0, [])
    consume()
    assert (ScriptedTask.ran, committed(), len(dead_letters())) == (["1", "1"], 1, 1)


def test_dead_letter_truncates_a_long_error_text() -> None:
    ScriptedTask.script["1"] = ValueError("long " * 10_000)
    send_messages("1")
    consume()
    assert failure_headers(dead_letters()[0])["error-message"] == ("long " * 10_000)[: TEXT_LIMITS[0]]


def test_dead_letter_of_a_nearly_oversized_message_omits_the_error_text() -> None:
    """The headers of the failure make the record larger than its message was."""
    ScriptedTask.script["1"] = ScriptedTask.script["2"] = ValueError("long " * 300)
    send_messages("1")
    send_messages("2", key=b"k" * 4500)
    new_consumer({**MANUAL_COMMIT, "max_request_size": 5500}, dead_letter=True).run_until_idle()
    with_text, without = dead_letters()
    assert failure_headers(with_text)["error-message"] == "long " * 300
    assert (without.key, failure_headers(without)["error-message"]) == (b"k" * 4500, "")
    assert (failure_headers(without)["reason"], failure_headers(without)["error-class"]) == ("failed", "ValueError")


# -- dead letters that are rejected ------------------------------------------------------------------------------------


def stepped_consumer(limit: int, **options: Any) -> FaultyConsumer:
    """Consume one record with a size limit for dead letters; return the consumer."""
    consumer = FaultyConsumer({**MANUAL_COMMIT, "max_request_size": limit}, dead_letter=True, **options)
    consumer.step(timeout=0)
    return consumer


def consumer_lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return the lines of the consumer itself, without those of the controller."""
    return [line for line in lines(caplog, level) if "Consumer: " in line]


def test_dead_letter_too_large_with_its_headers_is_written_without_them(
    caplog: pytest.LogCaptureFixture, bus: InMemoryBroker
) -> None:
    bus.send("dice", b"x" * 3000, key=b"k", headers=[("trace", b"t" * 3000)])
    stepped_consumer(5000)
    (letter,) = dead_letters()
    assert (letter.value, letter.key) == (b"x" * 3000, b"k")
    assert {name.startswith(PREFIX) for name, _ in letter.headers} == {True}
    assert failure_headers(letter)["omitted"] == "headers"
    (line,) = consumer_lines(caplog, logging.WARNING)
    assert line.startswith(
        "FaultyConsumer: the dead letter of offset 0 of dice[0] was written to 'dice.dlq' without headers: the record"
    )
    assert "raise 'max_request_size' in KSER_CONFIG and 'max.message.bytes' of the topic" in line
    assert committed() == 1


def test_dead_letter_too_large_with_its_value_is_a_stub(bus: InMemoryBroker) -> None:
    value = b"x" * 5000
    bus.send("dice", value, key=b"k", headers=[("trace", b"1")])
    consumer = stepped_consumer(5000)
    (letter,) = dead_letters()
    headers = failure_headers(letter)
    assert (letter.value, letter.key, headers["omitted"]) == (None, b"k", "value,headers")
    assert (headers["value-size"], headers["value-sha256"]) == ("5000", hashlib.sha256(value).hexdigest())
    assert (headers["topic"], headers["partition"], headers["offset"]) == ("dice", "0", "0")
    assert (headers["reason"], headers["error-message"]) == ("undecodable", "")
    assert (committed(), consumer.counts["dead_lettered"]) == (1, 1)


def test_stub_omits_a_large_key(bus: InMemoryBroker) -> None:
    for value in (None, b"x" * 100):
        bus.send("dice", value, key=b"k" * 5000)
    new_consumer({"max_request_size": 5000}, dead_letter=True).run_until_idle()
    assert [(letter.value, letter.key) for letter in dead_letters()] == [(None, None)] * 2
    assert [failure_headers(letter)["omitted"] for letter in dead_letters()] == ["key", "key,value"]


def test_record_without_any_accepted_dead_letter_is_finished_with_the_limit_to_raise(
    caplog: pytest.LogCaptureFixture, bus: InMemoryBroker
) -> None:
    bus.send("dice", b"x" * 500, headers=[("trace", b"1")])
    send_messages("next")
    consumer = stepped_consumer(100)
    (line,) = consumer_lines(caplog, logging.ERROR)
    assert line.startswith(
        "FaultyConsumer: offset 0 of dice[0] failed (undecodable) and every form of its dead letter was rejected: the"
        " record has "
    )
    assert "'max_request_size' allows 100" in line
    assert "the topic 'dice.dlq' must accept the dead letters" in line
    assert (dead_letters(), ScriptedTask.ran, committed()) == ([], ["next"], 2)
    assert consumer.counts == {"done": 2, "failed": 1, "dead_lettered": 0}


class RejectingProducer(Producer):
    """A producer that rejects every record."""

    error: BaseException = RecordRejected("the name of the topic is illegal")

    def produce(self, *arguments: Any, **options: Any) -> None:
        raise self.error


def test_record_whose_dead_letter_is_rejected_for_good_is_finished(caplog: pytest.LogCaptureFixture) -> None:
    class RejectedConsumer(Consumer):
        def make_producer(self) -> BaseProducer:
            return RejectingProducer(self.config)

    send_messages("1", cls="shop.Unknown")
    send_messages("2")
    consumer = RejectedConsumer(MANUAL_COMMIT, ["dice"], dead_letter=True)
    consumer.run_until_idle()
    assert (ScriptedTask.ran, committed(), consumer.counts["dead_lettered"]) == (["2"], 2, 0)
    (line,) = consumer_lines(caplog, logging.ERROR)
    assert "was rejected: the name of the topic is illegal; the record counts as finished" in line


class TextlessError(Exception):
    """An exception without a usable text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("failure", "headers"),
    [
        (Failure("failed", "E", {"code": 7}), {"error-message": "{'code': 7}"}),  # type: ignore[arg-type]
        (Failure("failed", "E", None), {"error-message": "None"}),  # type: ignore[arg-type]
        (Failure("failed", "E", b"\xff"), {"error-message": "b'\\xff'"}),  # type: ignore[arg-type]
        (
            Failure("failed", "E", TextlessError()),  # type: ignore[arg-type]
            {"error-message": "<TextlessError, whose text raises RuntimeError>"},
        ),
        (Failure("\udcff", "a\0b", "\0"), {"reason": "\\udcff", "error-class": "a\0b", "error-message": "\0"}),
        (
            Failure("r" * 9999, "c" * 9999, "\udcff" * 9999),
            {"reason": "r" * 200, "error-class": "c" * 200, "error-message": "\\udcff" * 2000},
        ),
    ],
)
def test_every_failure_gives_a_dead_letter(failure: Failure, headers: dict[str, str], bus: InMemoryBroker) -> None:
    bus.create_topic("dice.dlq")
    record = DummyRecord("dice", 0, 5, None, b"x")
    writer = DeadLetterWriter("{}.dlq".format, lambda: Producer({}), Consumer, ConsumerLogger(Consumer.LOGGER, "C"))
    assert writer.write(record, failure, 1)
    assert headers.items() <= failure_headers(dead_letters()[0]).items()


@pytest.mark.parametrize("error", [TextlessError(), CduError(message={"code": 7})])  # type: ignore[arg-type]
def test_task_with_an_unusual_error_is_dead_lettered(error: Exception) -> None:
    ScriptedTask.script["1"] = error
    send_messages("1", "2")
    consume()
    assert (ScriptedTask.ran, committed(), len(dead_letters())) == (["1", "2"], 2, 1)


def test_controller_that_raises_an_error_without_text_gives_a_dead_letter() -> None:
    class RaisingRegistry:
        @staticmethod
        def run(data: Any) -> None:
            raise TextlessError

    send_messages("1")
    consumer = new_consumer(MANUAL_COMMIT, dead_letter=True)
    consumer.REGISTRY = RaisingRegistry
    consumer.run_until_idle()
    assert failure_headers(dead_letters()[0])["error-message"] == "<TextlessError, whose text raises RuntimeError>"


def test_record_whose_headers_cannot_be_decoded_is_dead_lettered_without_them() -> None:
    class UndecodableRecord(DummyRecord):
        @property
        def headers(self) -> Any:  # type: ignore[override]
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    writer = DeadLetterWriter("{}.dlq".format, lambda: Producer({}), Consumer, ConsumerLogger(Consumer.LOGGER, "C"))
    assert writer.write(UndecodableRecord("dice", 0, 5, None, b"x"), Failure("failed", "", ""), 1)
    assert (dead_letters()[0].value, failure_headers(dead_letters()[0])["omitted"]) == (b"x", "headers")


# -- dead letters that fail again --------------------------------------------------------------------------------------


def test_dead_letter_that_fails_again_is_not_dead_lettered(
    bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """A consumer may consume a dead-letter topic by its name."""
    send_messages("1", cls="shop.Unknown")
    consume()
    consumer = Consumer({"group_id": "letters"}, ["dice.dlq"], dead_letter=True)
    consumer.run_until_idle()
    assert consumer.counts == {"done": 1, "failed": 1, "dead_lettered": 0}
    assert set(bus.topics) == {"dice", "dice.dlq"}
    (line,) = consumer_lines(caplog, logging.WARNING)
    assert line.startswith("Consumer: offset 0 of dice.dlq[0] failed (unknown-entrypoint), and it is a dead letter")


def test_forged_dead_letter_on_another_topic_is_dead_lettered_with_its_own_headers(bus: InMemoryBroker) -> None:
    """Otherwise the producer of a message could prevent its dead letter."""
    send_messages("1", cls="shop.Unknown")
    consume()
    (letter,) = dead_letters()
    bus.send("cards", b"forged", headers=letter.headers)
    Consumer({"group_id": "cards"}, ["cards"], dead_letter=True).run_until_idle()
    (again,) = dead_letters("cards.dlq")
    assert failure_headers(again)["topic"] == "cards"
    names = [name for name, _ in again.headers]
    assert len(names) == len(set(names)) == len(letter.headers)


def test_foreign_record_on_a_dead_letter_topic_is_dead_lettered_once(bus: InMemoryBroker) -> None:
    bus.send("dice.dlq", b"no message")
    Consumer({}, ["dice.dlq"], dead_letter=True).run_until_idle()
    Consumer({}, ["dice.dlq.dlq"], dead_letter=True).run_until_idle()
    assert set(bus.topics) == {"dice.dlq", "dice.dlq.dlq"}
    assert len(dead_letters("dice.dlq.dlq")) == 1


@pytest.mark.parametrize(
    ("topics", "dead_letter", "text"),
    [
        (["dice", "dice.dlq"], True, "dead_letter is True, and 'dice.dlq' is a topic that this consumer reads"),
        (["dice", "broken"], "broken", "dead_letter is 'broken', and 'broken' is a topic that this consumer reads"),
        (["d" * 246], True, "would be '" + "d" * 246 + ".dlq', which is no legal name of a topic"),
    ],
)
def test_unusable_dead_letter_topic_is_rejected_by_the_constructor(
    topics: list[str], dead_letter: bool | str, text: str
) -> None:
    with pytest.raises(SettingError, match=re.escape(text)):
        Consumer({}, topics, dead_letter=dead_letter)


def test_send_by_user_code_does_not_change_the_failure_of_the_current_attempt() -> None:
    """A hook of a failed message may send a message."""
    attempt = Attempt()
    attempt.failure = Failure(FAILED, "ValueError", "boom")
    before = current_attempt.set(attempt)
    try:
        assert Producer({}).send("elsewhere", message("x")).retcode == 0
    finally:
        current_attempt.reset(before)
    assert attempt.failure == Failure(FAILED, "ValueError", "boom")
