"""Tests of the commit modes: which offset Kafka has at which moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer
from tests.kafka.broker import Kafka
from tests.kafka.helpers import committed, config, consuming, message, put, step_until

#: Longer than any test: nothing is committed because of the time.
NEVER: dict[str, Any] = {"auto_commit_interval_ms": 3_600_000}
AT_ONCE: dict[str, Any] = {"enable_auto_commit": False}


class Look(Entrypoint):
    """Looks, while it runs, at what is committed."""

    topic: str
    look: Callable[[], int | None]
    seen: list[int | None]

    def run(self) -> Result:
        type(self).seen.append(type(self).look() if self.params.get("looks", True) else None)
        if self.params.get("then") == "interrupt":
            raise KeyboardInterrupt
        return Result(uuid=self.uuid)


@pytest.fixture
def look(kafka: Kafka, topic: Callable[..., str]) -> type[Look]:
    """The task and, as ``topic``, where its messages go; the topic's name is that of the group, too."""
    name = topic()

    class Looking(Look):
        topic = name
        seen = []  # noqa: RUF012
        look = staticmethod(lambda: committed(kafka, name, name))

    Controller.register("look", Looking)
    return Looking


def consumer_of(kafka: Kafka, task: type[Look], commit: str = "after", **options: Any) -> Consumer:
    return Consumer(config(kafka, task.topic, **options), [task.topic], commit=commit)


def test_manual_commit_after_commits_each_message_when_it_finishes(kafka: Kafka, look: type[Look]) -> None:
    put(kafka, look.topic, [message("look") for _ in range(4)])
    with consuming(consumer_of(kafka, look, **AT_ONCE)) as consumer:
        step_until(consumer, lambda: len(look.seen) == 4, "all are handled")
        assert look.seen == [0, 1, 2, 3]
        assert look.look() == 4


def test_manual_commit_before_commits_each_message_when_it_starts(kafka: Kafka, look: type[Look]) -> None:
    put(kafka, look.topic, [message("look") for _ in range(4)])
    with consuming(consumer_of(kafka, look, "before", auto_offset_reset="earliest", **AT_ONCE)) as consumer:
        step_until(consumer, lambda: len(look.seen) == 4, "all are handled")
        assert look.seen == [1, 2, 3, 4]


@pytest.mark.parametrize(("commit", "expected"), [("after", 1), ("before", 2)])
def test_interrupted_message_is_committed_only_with_commit_before(
    kafka: Kafka, look: type[Look], commit: str, expected: int
) -> None:
    put(kafka, look.topic, [message("look"), message("look", then="interrupt")])
    consumer = consumer_of(kafka, look, commit, auto_offset_reset="earliest")
    with pytest.raises(KeyboardInterrupt), consuming(consumer):
        step_until(consumer, lambda: False, "an interrupt")
    assert look.look() == expected


@pytest.mark.parametrize("commit", ["after", "before"])
def test_interval_commit_waits_for_the_interval_or_the_close(kafka: Kafka, look: type[Look], commit: str) -> None:
    put(kafka, look.topic, [message("look") for _ in range(3)])
    with consuming(consumer_of(kafka, look, commit, auto_offset_reset="earliest", **NEVER)) as consumer:
        step_until(consumer, lambda: len(look.seen) == 3, "all are handled")
        assert look.seen == [0, 0, 0], "more than where it began"
        assert look.look() == 0
    assert look.look() == 3


def test_commit_interval_is_that_of_the_client(kafka: Kafka, look: type[Look]) -> None:
    with consuming(consumer_of(kafka, look, auto_commit_interval_ms=100)) as consumer:
        put(kafka, look.topic, [message("look", looks=False)])
        step_until(consumer, lambda: look.look() == 1, "it is committed while the consumer goes on", 5)


def test_poison_message_is_committed_like_any_other(kafka: Kafka, look: type[Look]) -> None:
    pills = [b"", b"\xff\xfe\xfd", b"{", b"[]", b'{"uuid": 1}', message("unknown.Entrypoint").dumps().encode()]
    put(kafka, look.topic, [*pills, message("look")])
    with consuming(consumer_of(kafka, look, **AT_ONCE)) as consumer:
        step_until(consumer, lambda: look.seen, "the message after them is handled")
        assert look.seen == [len(pills)]
        assert look.look() == len(pills) + 1


def test_unchanged_offset_is_not_committed_again(
    kafka: Kafka, look: type[Look], monkeypatch: pytest.MonkeyPatch
) -> None:
    with consuming(consumer_of(kafka, look, auto_commit_interval_ms=50)) as consumer:
        step_until(consumer, lambda: consumer.assignment, "the partition is assigned")
        put(kafka, look.topic, [message("look", looks=False)])
        commits: list[Any] = []
        commit = consumer.client.commit

        def counting(offsets: Any, **options: Any) -> None:
            commits.append(offsets)
            commit(offsets, **options)

        monkeypatch.setattr(consumer.client, "commit", counting)
        step_until(consumer, lambda: look.look() == 1, "it is committed")
        for _ in range(3):
            consumer.step(0.1)
        assert len(commits) == 1


@pytest.mark.parametrize(("commit", "expected"), [("after", 2), ("before", 0)])
def test_new_group_starts_at_the_earliest_message_only_with_commit_after(
    kafka: Kafka, look: type[Look], commit: str, expected: int
) -> None:
    put(kafka, look.topic, [message("look", looks=False)] * 2)
    with consuming(consumer_of(kafka, look, commit)) as consumer:
        step_until(consumer, consumer.client.assignment, "the partition is assigned")
        for _ in range(3):
            consumer.step()
        assert len(look.seen) == expected


def test_consumer_without_a_group_handles_messages_and_commits_nothing(
    kafka: Kafka, look: type[Look], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"bootstrap_servers": kafka.bootstrap_servers, "auto_offset_reset": "earliest"}
    put(kafka, look.topic, [message("look", looks=False)] * 3)
    with consuming(Consumer(options, [look.topic])) as consumer:
        step_until(consumer, lambda: len(look.seen) == 3, "all are handled")
    assert "without group_id no offset can be committed" in caplog.text


def test_stop_ends_a_consumer_running_in_another_thread(kafka: Kafka, look: type[Look]) -> None:
    put(kafka, look.topic, [message("look", looks=False)])
    consumer = consumer_of(kafka, look)
    ends: list[Any] = []

    def run() -> None:
        try:
            consumer.run()
        except BaseException as end:
            ends.append(end)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(100):
            if look.seen:
                break
            thread.join(0.1)
    finally:
        consumer.stop()
        thread.join(5)
    assert not thread.is_alive()
    assert [type(end) for end in ends] == [SystemExit] and ends[0].code == 0
    assert look.look() == 1
