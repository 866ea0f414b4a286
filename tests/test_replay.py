"""Dead letters are read back, and sent once more to where they came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kser.consumer import deadletter
from kser.consumer.deadletter import DeadLetter, iter_dead_letters, replay
from kser.dummy.bus import Bus, DummyRecord
from kser.dummy.consumer import Consumer
from kser.errors import BrokerUnavailable
from tests.engine import consumer_of, put

HEADERS = (("trace", b"\x00\xff"),)

TIMEOUT = 2


@pytest.fixture(autouse=True)
def broken(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three dead letters: one that is no message, and two that ask for what nobody knows."""
    monkeypatch.setattr(deadletter, "POLL_TIMEOUT", 0.01)
    bus.send("dice", b"no message", key=b"k", headers=HEADERS)
    put("1", "2", cls="shop.Unknown")
    consumer = consumer_of(dead_letter="broken")
    consumer.run_until_idle()
    consumer.close()


def found(config: dict[str, Any] | None = None) -> list[DeadLetter]:
    return list(iter_dead_letters(Consumer, config or {}, "broken", timeout=TIMEOUT))


def sent_again(**options: Any) -> int:
    return replay(Consumer, options.pop("config", {}), "broken", timeout=TIMEOUT, **options)


def arrived(topic: str = "dice", behind: int = 3) -> list[DummyRecord]:
    """What is in a topic behind what was there."""
    return Bus.at("").topics[topic][0][behind:]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_dead_letter_says_what_it_was_and_what_became_of_it() -> None:
    first, second, _ = found()
    assert (first.value, first.key, first.headers, first.message) == (b"no message", b"k", HEADERS, None)
    assert (first.reason, first.attempts, first.topic, first.partition, first.offset) == (
        ("undecodable", 1, "dice", 0, 0)
    )
    assert (second.reason, second.offset, second.message and second.message.uuid) == ("unknown-entrypoint", 1, "1")
    assert second.error_class == "cdumay_error.types.ValidationError"
    assert first.consumer.startswith("Consumer ")


def test_reading_takes_nothing_away() -> None:
    before = dict(Bus.at("").committed)
    assert len(found()) == len(found()) == 3
    assert {key: value for key, value in Bus.at("").committed.items() if key in before} == before
    assert sent_again() == 3


def test_what_is_no_dead_letter_is_passed_over(bus: Bus) -> None:
    bus.send("broken", b"somebody else's", headers=[("kser-dlq-reason", b"failed")])
    assert (len(found()), sent_again()) == (3, 3)


def test_a_topic_that_is_empty_has_none(bus: Bus) -> None:
    bus.create_topic("empty")
    assert list(iter_dead_letters(Consumer, {}, "empty", timeout=TIMEOUT)) == []


def test_no_answer_is_said() -> None:
    class Silent(Consumer):
        def _connect(self) -> Any:
            client = super()._connect()
            client.poll = lambda *_: {}  # type: ignore[method-assign]
            return client

    with pytest.raises(BrokerUnavailable, match=r"dead letters of 'broken' could not be read: no answer within 0\.2 s"):
        list(iter_dead_letters(Silent, {}, "broken", timeout=0.2))


# -- replaying ---------------------------------------------------------------------------------------------------------


def test_all_go_back_as_they_were() -> None:
    assert sent_again() == 3
    first, second, third = arrived()
    assert (first.value, first.key, first.headers) == (b"no message", b"k", HEADERS)
    assert (second.value, third.value) == tuple(Bus.at("").values("dice")[1:3])
    assert second.headers == ()


def test_each_is_sent_once() -> None:
    assert [sent_again(limit=2), sent_again(), sent_again()] == [2, 1, 0]
    assert [record.offset for record in arrived()] == [3, 4, 5]


def test_no_more_are_sent_than_were_asked_for() -> None:
    assert (sent_again(limit=0), arrived()) == (0, [])


def test_some_may_be_chosen_and_the_others_are_passed_over() -> None:
    assert sent_again(where=lambda letter: letter.reason == "undecodable") == 1
    assert sent_again() == 0
    assert [record.value for record in arrived()] == [b"no message"]


def test_whoever_asks_under_another_name_begins_at_the_beginning() -> None:
    assert [sent_again(), sent_again(group="me"), sent_again(group="me")] == [3, 3, 0]


def test_they_may_go_elsewhere() -> None:
    assert sent_again(to="looked-at") == 3
    assert (len(arrived("looked-at", 0)), arrived()) == (3, [])


def test_one_that_cannot_be_sent_is_the_first_of_the_next_call() -> None:
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
def test_settings_of_consumers_are_not_meant(setting: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs where they run, with their environment."""
    monkeypatch.setenv(setting, value)
    assert (len(found()), sent_again(), sent_again()) == (3, 3, 0)


def test_where_consumers_are_to_begin_is_not_meant() -> None:
    config = {"auto_offset_reset": "latest"}
    assert (len(found(config)), sent_again(config=config)) == (3, 3)


def test_consumers_of_this_host_stay_paused() -> None:
    pause = Path(os.environ["LOCK_FILE"])
    pause.touch()
    assert (len(found()), sent_again()) == (3, 3)
    assert pause.exists()
