"""Tests of reading dead letters and replaying them to their original topics."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kser.consumer import replay as replaying
from kser.consumer.dead_letters import DeadLetter
from kser.consumer.replay import iter_dead_letters, replay
from kser.dummy.broker import DummyRecord, InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.errors import BrokerUnavailable
from tests.consumer.harness import new_consumer, send_messages

HEADERS = (("trace", b"\x00\xff"),)

TIMEOUT = 2


@pytest.fixture(autouse=True)
def broken(bus: InMemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three dead letters: one that is no message, and two that ask for what nobody knows."""
    monkeypatch.setattr(replaying, "POLL_TIMEOUT", 0.01)
    bus.send("dice", b"no message", key=b"k", headers=HEADERS)
    send_messages("1", "2", cls="shop.Unknown")
    consumer = new_consumer(dead_letter="broken")
    consumer.run_until_idle()
    consumer.close()


def found(config: dict[str, Any] | None = None) -> list[DeadLetter]:
    return list(iter_dead_letters(Consumer, config or {}, "broken", timeout=TIMEOUT))


def sent_again(**options: Any) -> int:
    return replay(Consumer, options.pop("config", {}), "broken", timeout=TIMEOUT, **options)


def arrived(topic: str = "dice", behind: int = 3) -> list[DummyRecord]:
    """What is in a topic behind what was there."""
    return InMemoryBroker.at("").topics[topic][0][behind:]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_dead_letter_contains_its_record_and_reason() -> None:
    first, second, _ = found()
    assert (first.value, first.key, first.headers, first.message) == (b"no message", b"k", HEADERS, None)
    assert (first.reason, first.attempts, first.topic, first.partition, first.offset) == (
        ("undecodable", 1, "dice", 0, 0)
    )
    assert (second.reason, second.offset, second.message and second.message.uuid) == ("unknown-entrypoint", 1, "1")
    assert second.error_class == "cdumay_error.types.ValidationError"
    assert first.consumer.startswith("Consumer ")


def test_reading_dead_letters_commits_nothing() -> None:
    before = dict(InMemoryBroker.at("").committed)
    assert len(found()) == len(found()) == 3
    assert {key: value for key, value in InMemoryBroker.at("").committed.items() if key in before} == before
    assert sent_again() == 3


def test_record_that_is_no_dead_letter_is_skipped(bus: InMemoryBroker) -> None:
    bus.send("broken", b"somebody else's", headers=[("kser-dlq-reason", b"failed")])
    assert (len(found()), sent_again()) == (3, 3)


def test_empty_topic_has_no_dead_letters(bus: InMemoryBroker) -> None:
    bus.create_topic("empty")
    assert list(iter_dead_letters(Consumer, {}, "empty", timeout=TIMEOUT)) == []


def test_missing_response_raises_broker_unavailable() -> None:
    class Silent(Consumer):
        def _kser_connect(self) -> Any:
            client = super()._kser_connect()
            client.poll = lambda *_: {}  # type: ignore[method-assign]
            return client

    with pytest.raises(
        BrokerUnavailable, match=r"dead letters of 'broken' could not be read: no response within 0\.2 s"
    ):
        list(iter_dead_letters(Silent, {}, "broken", timeout=0.2))


# -- replaying ---------------------------------------------------------------------------------------------------------


def test_replayed_dead_letters_equal_their_original_records() -> None:
    assert sent_again() == 3
    first, second, third = arrived()
    assert (first.value, first.key, first.headers) == (b"no message", b"k", HEADERS)
    assert (second.value, third.value) == tuple(InMemoryBroker.at("").values("dice")[1:3])
    assert second.headers == ()


def test_each_dead_letter_is_replayed_once() -> None:
    assert [sent_again(limit=2), sent_again(), sent_again()] == [2, 1, 0]
    assert [record.offset for record in arrived()] == [3, 4, 5]


def test_replay_of_dead_letters_respects_its_limit() -> None:
    assert (sent_again(limit=0), arrived()) == (0, [])


def test_replay_of_dead_letters_may_be_filtered() -> None:
    assert sent_again(where=lambda letter: letter.reason == "undecodable") == 1
    assert sent_again() == 0
    assert [record.value for record in arrived()] == [b"no message"]


def test_replay_under_another_group_starts_at_the_first_dead_letter() -> None:
    assert [sent_again(), sent_again(group="me"), sent_again(group="me")] == [3, 3, 0]


def test_dead_letters_may_be_replayed_to_another_topic() -> None:
    assert sent_again(to="looked-at") == 3
    assert (len(arrived("looked-at", 0)), arrived()) == (3, [])


def test_dead_letter_that_was_not_replayed_is_the_first_of_the_next_replay() -> None:
    calls: list[DeadLetter] = []

    def second_time(letter: DeadLetter) -> bool:
        calls.append(letter)
        if len(calls) == 2:
            raise ConnectionError("no")
        return True

    with pytest.raises(ConnectionError):
        sent_again(where=second_time)
    assert sent_again() == 2
    assert len(arrived()) == 3


@pytest.mark.parametrize(
    ("setting", "value"), [("KSER_DEAD_LETTER", "broken"), ("KSER_COMMIT", "never"), ("KSER_COMMIT", "before")]
)
def test_dead_letter_replay_ignores_consumer_settings(
    setting: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay runs in the environment of the consumers."""
    monkeypatch.setenv(setting, value)
    assert (len(found()), sent_again(), sent_again()) == (3, 3, 0)


def test_dead_letter_replay_ignores_auto_offset_reset() -> None:
    config = {"auto_offset_reset": "latest"}
    assert (len(found(config)), sent_again(config=config)) == (3, 3)


def test_dead_letter_replay_keeps_the_pause_file() -> None:
    pause = Path(os.environ["LOCK_FILE"])
    pause.touch()
    assert (len(found()), sent_again()) == (3, 3)
    assert pause.exists()
