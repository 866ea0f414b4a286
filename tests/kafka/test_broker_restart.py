"""Tests of broker restarts: no message is lost, and results report the unsent messages."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cdumay_result import Result

from kser.python_kafka.producer import Producer
from kser.schemas import Message
from tests.kafka.broker import KafkaBroker
from tests.kafka.helpers import (
    Worker,
    committed,
    config,
    message,
    put,
    repeated,
    stored_uuids,
    uuids,
    wait_until,
)

# kafka-python leaves the sockets of connections that were refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

TOPIC = "work"
GROUP = "g"

#: kafka-python looks for a broker that is away ever more rarely, by default up to every 30 s.
SOON_BACK = {"reconnect_backoff_max_ms": 500}

#: Seconds that the broker is away.
AWAY = 1.5

END_IT = pytest.mark.parametrize("end", [KafkaBroker.stop, KafkaBroker.kill], ids=["stopped", "killed"])
End = Callable[[KafkaBroker], None]


class Outage:
    """The broker ends while other things go on, and comes back some time later."""

    def __init__(self, broker: KafkaBroker, end: End) -> None:
        self._thread = threading.Thread(target=self._run, args=(broker, end), name="outage")
        self._problem: BaseException | None = None
        self.ended = 0.0
        self._thread.start()

    def wait(self) -> None:
        """Wait until the broker is back."""
        self._thread.join()
        assert self._problem is None, self._problem

    def _run(self, broker: KafkaBroker, end: End) -> None:
        try:
            end(broker)
            time.sleep(AWAY)
            broker.start()
            self.ended = time.monotonic()
        except BaseException as problem:
            self._problem = problem


class Sender(threading.Thread):
    """Sends messages one by one, until it is told to stop."""

    def __init__(self, producer: Producer) -> None:
        super().__init__(name="sender")
        self._producer = producer
        self._enough = threading.Event()
        self.sent: list[str] = []
        self.refused: list[str] = []

    def run(self) -> None:
        while not self._enough.wait(0.02):
            each = message()
            result = self._producer.send(TOPIC, each, timeout=0.5)
            (self.refused if result.retcode else self.sent).append(each.uuid)

    def stop(self) -> None:
        self._enough.set()
        self.join()


@pytest.fixture
def broker(own_kafka: KafkaBroker) -> Iterator[KafkaBroker]:
    own_kafka.create_topic(TOPIC)
    yield own_kafka
    gc.collect()


@pytest.fixture
def producer(broker: KafkaBroker) -> Iterator[Producer]:
    with closing(Producer({"bootstrap_servers": broker.bootstrap_servers, **SOON_BACK})) as made:
        yield made


def start_worker(broker: KafkaBroker, folder: Path, **options: Any) -> Worker:
    worker = Worker(config(broker, GROUP, **SOON_BACK, **options), TOPIC, folder / "ledger")
    worker.wait_for_partitions(1)
    return worker


@END_IT
def test_broker_restart_while_sending_and_consuming_loses_no_message(
    broker: KafkaBroker, producer: Producer, tmp_path: Path, end: End
) -> None:
    messages = [message(text="x" * 200) for _ in range(1200)]
    outages: list[Outage] = []

    def with_an_outage() -> Iterator[Message]:
        for number, each in enumerate(messages):
            if number == 200:
                outages.append(Outage(broker, end))
            time.sleep(0.001)
            yield each

    with start_worker(broker, tmp_path, auto_commit_interval_ms=200) as worker:
        single = Sender(producer)
        single.start()
        result = producer.bulk_send(TOPIC, with_an_outage(), timeout=15)
        answered = time.monotonic()
        outages[0].wait()
        before = len(single.sent)
        wait_until(lambda: len(single.sent) > before + 5, "single messages are sent again")
        single.stop()
        assert single.refused, "no send failed: no fault hit"
        assert "rror" in worker.text, "the consumer noticed nothing: no fault hit"
        print(f"bulk_send answered {answered - outages[0].ended:.2f} s after the broker was back")
        _check_answer(broker, messages, result)
        assert result.retcode == 0, result.stderr

        expected = {*uuids(messages), *single.sent}
        wait_until(lambda: set(worker.noted("end")) >= expected, "all that was reported as sent is handled")
        since = time.monotonic() - outages[0].ended
        found = stored_uuids(broker, TOPIC)
        print(f"single: {len(single.sent)} sent, {len(single.refused)} refused, of which"
              f" {len(set(single.refused) & set(found))} arrived; all handled {since:.2f} s after the broker was back,"
              f" {len(repeated(worker.noted('end')))} of {len(expected)} more than once")  # fmt: skip
        assert not repeated(found), "sent twice"
        wait_until(lambda: set(worker.noted("end")) >= set(found), "whatever is in the topic is handled")
        at = worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert time.monotonic() - at < 2
        assert committed(broker, GROUP, TOPIC) == len(found)


def test_bulk_send_names_the_unsent_messages_when_the_broker_stays_down(
    broker: KafkaBroker, producer: Producer
) -> None:
    first, second = ([message(text="x" * 200) for _ in range(500)] for _ in range(2))

    def with_an_end_between() -> Iterator[Message]:
        yield from first
        time.sleep(0.2)
        broker.kill()
        yield from second

    at = time.monotonic()
    result = producer.bulk_send(TOPIC, with_an_end_between(), timeout=3)
    took = time.monotonic() - at
    print(f"answered after {took:.2f} s: {result.stderr}")
    assert result.retcode != 0
    assert took < 3.5, took
    producer.close()
    broker.start()
    _check_answer(broker, first + second, result)


def test_sigterm_ends_a_consumer_with_pending_commits_while_the_broker_is_down(
    broker: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As long it tries to commit what is done.
    monkeypatch.setenv("KSER_SHUTDOWN_TIMEOUT", "1")
    with start_worker(broker, tmp_path) as worker:
        put(broker, TOPIC, [message(seconds=0.5), message(seconds=0.5), message()])
        worker.wait_for("start")
        broker.kill()
        worker.wait_for("end", 3)
        # Longer than a session.
        time.sleep(6.5)
        at = worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        took = time.monotonic() - at
        print(f"ended {took:.2f} s after the signal")
        assert took < 5
        assert "Closing consumer and exiting" in worker.text


def test_sigterm_ends_an_idle_consumer_within_5_s_while_the_broker_is_down(broker: KafkaBroker, tmp_path: Path) -> None:
    with start_worker(broker, tmp_path) as worker:
        broker.stop()
        worker.wait_for_text("rror")
        at = worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        took = time.monotonic() - at
        print(f"ended {took:.2f} s after the signal")
        assert took < 5


def _check_answer(broker: KafkaBroker, messages: list[Message], result: Result) -> None:
    """What was not named as failed is in the topic, and the numbers add up."""
    failed = result.retval.get("failed", {})
    reported = set(uuids(messages)) - failed.keys()
    found = stored_uuids(broker, TOPIC)
    arrived = len(failed.keys() & set(found))
    print(f"bulk: {len(reported)} of {len(messages)} reported as sent, {len(failed)} as failed ({arrived} arrived)")
    assert result.stdout == f"{len(reported)} message(s) sent"
    assert reported <= set(found), f"{len(reported - set(found))} reported as sent, and lost"
    assert not repeated(found), "sent twice"


def test_sigterm_ends_a_consumer_with_pending_commits_while_the_broker_hangs(
    broker: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As long it tries to commit what is done.
    monkeypatch.setenv("KSER_SHUTDOWN_TIMEOUT", "1")
    with start_worker(broker, tmp_path) as worker:
        put(broker, TOPIC, [message(seconds=0.5), message(seconds=0.5), message()])
        worker.wait_for("start")
        pid = broker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            worker.wait_for("start", 2)
            at = worker.send_signal(signal.SIGTERM)
            assert worker.wait(10) == 0
            took = time.monotonic() - at
            print(f"ended {took:.2f} s after the signal")
            assert took < 5
        finally:
            os.kill(pid, signal.SIGCONT)
