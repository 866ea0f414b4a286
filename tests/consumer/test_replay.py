"""Tests of reading dead letters and replaying them to their original topics."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kser.consumer import replay as replay_module
from kser.consumer.client import Partition
from kser.consumer.dead_letters import DeadLetter
from kser.consumer.replay import MAX_KEPT, MAX_REFUSAL_LINES, ReplayCount, iter_dead_letters, replay
from kser.consumer.unreadable import UnreadableRecord
from kser.dummy.broker import DummyRecord, InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.errors import BrokerUnavailable, UsageError
from tests.consumer.harness import new_consumer, send_messages
from tests.support import lines

HEADERS = (("trace", b"\x00\xff"),)

#: The dead-letter topic.
TOPIC = "broken"

#: Seconds to wait for a dead letter.
TIMEOUT = 2


@pytest.fixture(autouse=True)
def three_dead_letters(bus: InMemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write three dead letters: of an undecodable record, and of two messages with an unknown entrypoint."""
    monkeypatch.setattr(replay_module, "POLL_TIMEOUT", 0.01)
    bus.send("dice", b"no message", key=b"k", headers=HEADERS)
    send_messages("1", "2", cls="shop.Unknown")
    consumer = new_consumer(dead_letter=TOPIC)
    consumer.run_until_idle()
    consumer.close()


def read_dead_letters(config: dict[str, Any] | None = None) -> list[DeadLetter]:
    """Return the dead letters."""
    return list(iter_dead_letters(Consumer, config or {}, TOPIC, timeout=TIMEOUT))


def replay_dead_letters(**options: Any) -> ReplayCount:
    """Replay the dead letters; return their number."""
    options.setdefault("topics", ["dice"])
    return replay(Consumer, options.pop("config", {}), options.pop("topic", TOPIC), timeout=TIMEOUT, **options)


def replayed_records(topic: str = "dice", start: int = 3) -> list[DummyRecord]:
    """Return the records of a topic from offset ``start``; the topic ``dice`` has three original records."""
    return [record for record in InMemoryBroker.at("").topics[topic][0] if record.offset >= start]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_dead_letter_contains_its_record_and_reason() -> None:
    first, second, _ = read_dead_letters()
    assert (first.value, first.key, first.headers, first.message) == (b"no message", b"k", HEADERS, None)
    assert (first.reason, first.attempts, first.topic, first.partition, first.offset) == (
        ("undecodable", 1, "dice", 0, 0)
    )
    assert (second.reason, second.offset, second.message and second.message.uuid) == ("unknown-entrypoint", 1, "1")
    assert second.error_class == "cdumay_error.types.ValidationError"
    assert first.consumer.startswith("Consumer ")


def test_reading_dead_letters_commits_nothing() -> None:
    before = dict(InMemoryBroker.at("").committed)
    assert len(read_dead_letters()) == len(read_dead_letters()) == 3
    assert {key: value for key, value in InMemoryBroker.at("").committed.items() if key in before} == before
    assert replay_dead_letters() == 3


def test_record_that_is_no_dead_letter_is_skipped(bus: InMemoryBroker) -> None:
    bus.send(TOPIC, b"somebody else's", headers=[("kser-dlq-reason", b"failed")])
    assert (len(read_dead_letters()), replay_dead_letters()) == (3, 3)


def test_empty_topic_has_no_dead_letters(bus: InMemoryBroker) -> None:
    bus.create_topic("empty")
    assert list(iter_dead_letters(Consumer, {}, "empty", timeout=TIMEOUT)) == []


def test_missing_response_raises_broker_unavailable() -> None:
    class SilentConsumer(Consumer):
        def _kser_connect(self) -> Any:
            client = super()._kser_connect()
            client.poll = lambda *_: {}  # type: ignore[method-assign]
            return client

    with pytest.raises(
        BrokerUnavailable, match=r"dead letters of 'broken' could not be read: no response within 0\.2 s"
    ):
        list(iter_dead_letters(SilentConsumer, {}, TOPIC, timeout=0.2))


def test_error_of_dead_letters_that_cannot_be_decoded_now_names_the_reason() -> None:
    class WaitingConsumer(Consumer):
        def _kser_connect(self) -> Any:
            client = super()._kser_connect()
            client.poll = lambda *_: {}  # type: ignore[method-assign]
            client.waiting = lambda: {Partition(TOPIC, 0): "install kser[codecs]"}  # type: ignore[method-assign]
            return client

    with pytest.raises(
        BrokerUnavailable, match=r"'broken' could not be read: broken\[0\] waits: install kser\[codecs\]"
    ):
        replay(WaitingConsumer, {}, TOPIC, topics=["dice"], timeout=0.2)


# -- replaying ---------------------------------------------------------------------------------------------------------


def test_replayed_dead_letters_equal_their_original_records() -> None:
    assert replay_dead_letters() == 3
    first, second, third = replayed_records()
    assert (first.value, first.key, first.headers) == (b"no message", b"k", HEADERS)
    assert (second.value, third.value) == tuple(InMemoryBroker.at("").values("dice")[1:3])
    assert second.headers == ()


def test_each_dead_letter_is_replayed_once() -> None:
    assert [replay_dead_letters(limit=2), replay_dead_letters(), replay_dead_letters()] == [2, 1, 0]
    assert [record.offset for record in replayed_records()] == [3, 4, 5]


def test_replay_of_dead_letters_respects_its_limit() -> None:
    assert (replay_dead_letters(limit=0), replayed_records()) == (0, [])


def test_replay_of_dead_letters_may_be_filtered() -> None:
    assert replay_dead_letters(where=lambda letter: letter.reason == "undecodable") == 1
    assert replay_dead_letters() == 0
    assert [record.value for record in replayed_records()] == [b"no message"]


def test_replay_under_another_group_starts_at_the_first_dead_letter() -> None:
    assert [replay_dead_letters(), replay_dead_letters(group="me"), replay_dead_letters(group="me")] == [3, 3, 0]


def test_dead_letters_may_be_replayed_to_another_topic() -> None:
    assert replay_dead_letters(to="looked-at") == 3
    assert (len(replayed_records("looked-at", 0)), replayed_records()) == (3, [])


def test_dead_letter_that_was_not_replayed_is_the_first_of_the_next_replay() -> None:
    calls: list[DeadLetter] = []

    def fail_at_second(letter: DeadLetter) -> bool:
        calls.append(letter)
        if len(calls) == 2:
            raise ConnectionError("no")
        return True

    with pytest.raises(ConnectionError):
        replay_dead_letters(where=fail_at_second)
    assert replay_dead_letters() == 2
    assert len(replayed_records()) == 3


@pytest.mark.parametrize(
    ("setting", "value"), [("KSER_DEAD_LETTER", TOPIC), ("KSER_COMMIT", "never"), ("KSER_COMMIT", "before")]
)
def test_dead_letter_replay_ignores_consumer_settings(
    setting: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay runs with the environment variables of the consumers."""
    monkeypatch.setenv(setting, value)
    assert (len(read_dead_letters()), replay_dead_letters(), replay_dead_letters()) == (3, 3, 0)


def test_dead_letter_replay_ignores_auto_offset_reset() -> None:
    config = {"auto_offset_reset": "latest"}
    assert (len(read_dead_letters(config)), replay_dead_letters(config=config)) == (3, 3)


def test_dead_letter_replay_keeps_the_pause_file() -> None:
    pause = Path(os.environ["LOCK_FILE"])
    pause.touch()
    assert (len(read_dead_letters()), replay_dead_letters()) == (3, 3)
    assert pause.exists()


def test_replay_keeps_null_apart_from_empty(bus: InMemoryBroker) -> None:
    headers = (("null", None), ("empty", b""))
    for value, key in ((None, None), (None, b"k"), (b"", None), (b"", b"")):
        bus.send("cards", value, key=key, headers=headers)
    Consumer({}, ["cards"], dead_letter=True).run_until_idle()
    assert replay_dead_letters(topic="cards.dlq", topics=None) == 4
    records = replayed_records("cards", 4)
    assert [(record.value, record.key) for record in records] == [(None, None), (None, b"k"), (b"", None), (b"", b"")]
    assert {record.headers for record in records} == {headers}


# -- records that a replay refuses -------------------------------------------------------------------------------------


def forged(bus: InMemoryBroker, **changes: bytes | None) -> list[tuple[str, bytes | None]]:
    """Return the headers of the first dead letter with changes; a header whose new value is None is removed."""
    headers = {name: value for name, value in bus.topics[TOPIC][0][0].headers if name.startswith("kser-dlq-")}
    for name, value in changes.items():
        del headers[f"kser-dlq-{name}"]
        if value is not None:
            headers[f"kser-dlq-{name}"] = value
    return list(headers.items())


@pytest.mark.parametrize(
    "named", [b"payroll", b"__consumer_offsets", b"dice.dlq", b"", b"\xff", b"dic", b"dice\0", b"DICE", b"d" * 9000]
)
def test_replay_sends_only_to_the_topic_of_its_dead_letter_topic(
    named: bytes, bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    bus.send("dice.dlq", b"forged", headers=forged(bus, topic=named))
    bus.send("dice.dlq", b"honest", headers=forged(bus))
    before = {topic: bus.values(topic) for topic in bus.topics}
    sent = replay_dead_letters(topic="dice.dlq", topics=None)
    assert (sent, sent.refused) == (1, 1)
    assert bus.values("dice") == [*before.pop("dice"), b"honest"]
    assert {topic: bus.values(topic) for topic in bus.topics if topic != "dice"} == before
    (line,) = lines(caplog, logging.WARNING)[-1:]
    assert line.startswith("replay: offset 0 of dice.dlq[0] is not sent: it names ")
    assert line.endswith(
        "as its original topic, and this replay may send only to 'dice'; it stays unread: pass topics=[...] with all"
        " topics to send to"
    )
    assert len(line) < 1200
    assert replay_dead_letters(topic="dice.dlq", topics=None) == 0


@pytest.mark.parametrize("changes", [{"topic": None}, {"offset": b"first"}, {"partition": b"9" * 5000}, {"time": b""}])
def test_replay_refuses_broken_headers(
    changes: dict[str, bytes | None], bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    bus.send("dice.dlq", b"forged", headers=forged(bus, **changes))
    sent = replay_dead_letters(topic="dice.dlq", topics=None)
    assert (sent, sent.refused) == (0, 1)
    assert lines(caplog, logging.WARNING)[-1] == (
        "replay: offset 0 of dice.dlq[0] is not sent: its headers kser-dlq-… are incomplete or invalid"
    )


def test_replay_refuses_a_dead_letter_without_its_value(bus: InMemoryBroker, caplog: pytest.LogCaptureFixture) -> None:
    bus.send("cards", b"x" * 5000)
    Consumer({"max_request_size": 5000}, ["cards"], dead_letter=True).run_until_idle()
    (letter,) = iter_dead_letters(Consumer, {}, "cards.dlq", timeout=TIMEOUT)
    assert (letter.value, letter.omitted, letter.value_size) == (None, ("value",), 5000)
    assert len(letter.value_sha256) == 64
    for options in ({"topics": None}, {"to": "elsewhere", "group": "other"}):
        sent = replay_dead_letters(topic="cards.dlq", **options)
        assert (sent, sent.refused) == (0, 1)
    assert "elsewhere" not in bus.topics
    assert lines(caplog, logging.WARNING)[-1].endswith(
        "it has no value, because the value was too large for the dead-letter topic"
    )


def test_replay_refuses_a_message_that_its_topic_rejects_for_good(
    bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    for value in (b"x" * 5000, b"small"):
        bus.send("dice.dlq", value, headers=forged(bus))
    sent = replay_dead_letters(topic="dice.dlq", topics=None, config={"max_request_size": 4000})
    assert (sent, sent.refused, bus.values("dice")[-1]) == (1, 1, b"small")
    assert "replay: offset 0 of dice.dlq[0] is not sent: the record has 5,0" in lines(caplog, logging.WARNING)[-1]


def damage(bus: InMemoryBroker, topic: str, count: int) -> None:
    """Append data that a client cannot decode, in the place of ``count`` records."""
    log = bus.topics[topic][0]
    record = UnreadableRecord(topic, 0, len(log), len(log) + count - 1, "CorruptRecordError: x")
    # The in-memory broker finds a record by its offset, so each offset of the range needs an entry.
    log.extend([record] * count)


@pytest.mark.parametrize(("count", "offsets"), [(1, "offset 1 of dice.dlq[0]"), (3, "offsets 1 to 3 of dice.dlq[0]")])
def test_replay_refuses_damaged_dead_letters(
    count: int, offsets: str, bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    bus.send("dice.dlq", b"first", headers=forged(bus))
    damage(bus, "dice.dlq", count)
    bus.send("dice.dlq", b"last", headers=forged(bus))
    sent = replay_dead_letters(topic="dice.dlq", topics=None)
    assert (sent, sent.refused, bus.values("dice")[-2:]) == (2, 1, [b"first", b"last"])
    assert lines(caplog, logging.WARNING)[-1] == (
        f"replay: the data at {offsets} is not sent: the client cannot decode it: CorruptRecordError: x"
    )
    assert len(list(iter_dead_letters(Consumer, {}, "dice.dlq", timeout=TIMEOUT))) == 2
    assert (
        lines(caplog, logging.WARNING)[-1] == f"the data at {offsets} is no readable dead letter: CorruptRecordError: x"
    )


def test_replay_refuses_a_dead_letter_whose_headers_cannot_be_decoded(
    bus: InMemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    bus.create_topic("dice.dlq")
    record: Any = SimpleNamespace(
        topic="dice.dlq",
        partition=0,
        offset=0,
        key=None,
        value=b"x",
        headers=(),
        timestamp=0,
        headers_error="not UTF-8",
    )
    bus.topics["dice.dlq"][0].append(record)
    sent = replay_dead_letters(topic="dice.dlq", topics=None)
    assert (sent, sent.refused) == (0, 1)
    assert lines(caplog, logging.WARNING)[-1].endswith("is not sent: the client cannot decode it: not UTF-8")


def test_replay_counts_many_refused_records_in_one_line(bus: InMemoryBroker, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        bus.send("dice.dlq", b"forged", headers=forged(bus, topic=b"payroll"))
    assert replay_dead_letters(topic="dice.dlq", topics=["dice"]).refused == 50
    logged = [line for line in lines(caplog, logging.WARNING) if line.startswith("replay: ")]
    assert len(logged) == MAX_REFUSAL_LINES + 1
    assert logged[-1] == "replay: 50 records of 'dice.dlq' were not sent"


def test_replay_from_a_shared_dead_letter_topic_sends_only_to_named_topics(bus: InMemoryBroker) -> None:
    bus.send(TOPIC, b"forged", headers=forged(bus, topic=b"payroll"))
    sent = replay_dead_letters(topics=["dice", "cards"])
    assert (sent, sent.refused, "payroll" in bus.topics) == (3, 1, False)


@pytest.mark.parametrize("named", ["all", "orders"])
def test_replay_without_topics_leaves_the_dead_letters_of_other_topics_unread(named: str, bus: InMemoryBroker) -> None:
    """Consumers of several topics share a dead-letter topic, whose name does not show it."""
    originals = ["orders", "cards", named, "cards", "orders"]
    for number, original in enumerate(originals):
        bus.send(f"{named}.dlq", b"%d" % number, headers=forged(bus, topic=original.encode()))
    others = sum(original != named for original in originals)
    for sent in (len(originals) - others, 0, 0, 0, 0, 0):
        count = replay_dead_letters(topic=f"{named}.dlq", topics=None)
        assert (count, count.refused) == (sent, others)
    count = replay_dead_letters(topic=f"{named}.dlq", topics=["orders", "cards"])
    assert (count, count.refused) == (others, 0)
    assert sorted(value for topic in {*originals} for value in bus.values(topic)) == [b"0", b"1", b"2", b"3", b"4"]
    assert replay_dead_letters(topic=f"{named}.dlq", topics=None).refused == 0


def test_replay_of_a_shared_dead_letter_topic_without_topics_stops_and_uses_nothing_up(bus: InMemoryBroker) -> None:
    for _ in range(2 * MAX_KEPT):
        bus.send("all.dlq", b"x", headers=forged(bus, topic=b"orders"))
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r"more than 20 dead letters of 'all\.dlq' name other topics, such as 'orders'"
        ):
            replay_dead_letters(topic="all.dlq", topics=None)
    assert "orders" not in bus.topics
    assert replay_dead_letters(topic="all.dlq", topics=["orders"]) == 2 * MAX_KEPT


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"topics": None}, "the dead-letter topic 'broken' may contain dead letters of any topic"),
        ({"topics": "dice"}, "topics must be a list of names, not a str: pass ['dice']"),
        ({"topics": ["^dice"]}, "'^dice' is no legal name of a topic"),
        ({"topics": [TOPIC]}, "'broken' is the dead-letter topic itself"),
        ({"to": TOPIC}, "'broken' is the dead-letter topic itself"),
        ({"to": ""}, "'' is no legal name of a topic"),
        ({"topic": "^.*dlq"}, "'^.*dlq' is no legal name of a topic"),
    ],
)
def test_replay_without_a_usable_target_is_rejected(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        replay_dead_letters(**options)
