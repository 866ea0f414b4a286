"""Tests of broker outages: no message is lost, results name the unsent messages, and consumers can be stopped."""

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
    read_uuids,
    repeated,
    send_records,
    uuids,
    wait_until,
)

# kafka-python leaves the sockets of connections that were refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

TOPIC = "work"
GROUP = "g"

#: The longest back-off between two connection attempts of kafka-python; by default it grows to 30 s.
SHORT_BACKOFF = {"reconnect_backoff_max_ms": 500}

#: Seconds that the broker is down.
OUTAGE_SECONDS = 1.5

#: Seconds that a busy machine may need to start the broker and to catch up.
LONG_SECONDS = 60

#: Seconds within which a consumer ends during an outage; the timeouts of the Kafka client are longer.
END_SECONDS = 5

EndBroker = Callable[[KafkaBroker], None]


class Outage:
    """A thread that stops or kills the broker, and starts it again after ``OUTAGE_SECONDS``."""

    def __init__(self, broker: KafkaBroker, end: EndBroker) -> None:
        self._thread = threading.Thread(target=self._run, args=(broker, end), name="outage")
        self._error: BaseException | None = None
        #: The time at which the broker was up again.
        self.ended_at = 0.0
        self._thread.start()

    def wait(self) -> None:
        """Wait until the broker is up again."""
        self._thread.join()
        assert self._error is None, self._error

    def _run(self, broker: KafkaBroker, end: EndBroker) -> None:
        try:
            end(broker)
            time.sleep(OUTAGE_SECONDS)
            broker.start()
            self.ended_at = time.monotonic()
        except BaseException as error:
            self._error = error


class Sender(threading.Thread):
    """A thread that sends messages one by one."""

    def __init__(self, producer: Producer) -> None:
        super().__init__(name="sender")
        self._producer = producer
        self._stopped = threading.Event()
        #: The uuids of the sent messages, and those of the messages with a failed result.
        self.sent: list[str] = []
        self.failed: list[str] = []

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            sent = message()
            result = self._producer.send(TOPIC, sent, timeout=0.5)
            (self.failed if result.retcode else self.sent).append(sent.uuid)

    def stop(self) -> None:
        """Stop sending."""
        self._stopped.set()
        self.join()


def check_bulk_result(broker: KafkaBroker, messages: list[Message], result: Result) -> None:
    """Check that each message without a reported failure is in the topic, and that the result counts these."""
    failed = result.retval.get("failed", {})
    reported = set(uuids(messages)) - failed.keys()
    arrived = read_uuids(broker, TOPIC)
    late = len(failed.keys() & set(arrived))
    print(f"bulk: {len(reported)} of {len(messages)} reported as sent, {len(failed)} as failed ({late} arrived)")
    assert result.stdout == f"{len(reported)} message(s) sent"
    assert reported <= set(arrived), f"{len(reported - set(arrived))} messages are lost, but reported as sent"
    assert not repeated(arrived), "sent twice"


@pytest.fixture
def broker(own_kafka: KafkaBroker) -> Iterator[KafkaBroker]:
    own_kafka.create_topic(TOPIC)
    yield own_kafka
    gc.collect()


@pytest.fixture
def producer(broker: KafkaBroker) -> Iterator[Producer]:
    with closing(Producer({"bootstrap_servers": broker.bootstrap_servers, **SHORT_BACKOFF})) as producer:
        yield producer


def start_worker(broker: KafkaBroker, folder: Path, **options: Any) -> Worker:
    """Start a worker and wait for its partition."""
    worker = Worker(config(broker, GROUP, **SHORT_BACKOFF, **options), TOPIC, folder / "ledger")
    worker.wait_for_partitions(1)
    return worker


@pytest.mark.parametrize("end", [KafkaBroker.stop, KafkaBroker.kill], ids=["stopped", "killed"])
def test_broker_restart_while_sending_and_consuming_loses_no_message(
    broker: KafkaBroker, producer: Producer, tmp_path: Path, end: EndBroker
) -> None:
    messages = [message(text="x" * 200) for _ in range(1200)]
    outages: list[Outage] = []

    def messages_with_an_outage() -> Iterator[Message]:
        for number, sent in enumerate(messages):
            if number == 200:
                outages.append(Outage(broker, end))
            time.sleep(0.001)
            yield sent

    with start_worker(broker, tmp_path, auto_commit_interval_ms=200) as worker:
        sender = Sender(producer)
        sender.start()
        result = producer.bulk_send(TOPIC, messages_with_an_outage(), timeout=LONG_SECONDS)
        returned_at = time.monotonic()
        outages[0].wait()
        before = len(sender.sent)
        wait_until(lambda: len(sender.sent) > before + 5, "single messages are sent again", LONG_SECONDS)
        sender.stop()
        assert sender.failed, "no send failed, so the outage was not noticed"
        assert "rror" in worker.text, "the consumer logged no error, so the outage was not noticed"
        print(f"bulk_send returned {returned_at - outages[0].ended_at:.2f} s after the broker was up again")
        check_bulk_result(broker, messages, result)
        assert result.retcode == 0, result.stderr

        expected = {*uuids(messages), *sender.sent}
        wait_until(lambda: set(worker.all_recorded("end")) >= expected, "all sent messages are handled", LONG_SECONDS)
        since = time.monotonic() - outages[0].ended_at
        arrived = read_uuids(broker, TOPIC)
        print(f"single: {len(sender.sent)} sent, {len(sender.failed)} failed, of which"
              f" {len(set(sender.failed) & set(arrived))} arrived; all handled {since:.2f} s after the outage,"
              f" {len(repeated(worker.all_recorded('end')))} of {len(expected)} more than once")  # fmt: skip
        assert not repeated(arrived), "sent twice"
        wait_until(lambda: set(worker.all_recorded("end")) >= set(arrived), "all messages in the topic are handled")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(END_SECONDS) == 0
        assert committed(broker, GROUP, TOPIC) == len(arrived)


def test_bulk_send_names_the_unsent_messages_when_the_broker_stays_down(
    broker: KafkaBroker, producer: Producer
) -> None:
    first, second = ([message(text="x" * 200) for _ in range(500)] for _ in range(2))

    def messages_with_a_kill() -> Iterator[Message]:
        yield from first
        time.sleep(0.2)
        broker.kill()
        yield from second

    started_at = time.monotonic()
    result = producer.bulk_send(TOPIC, messages_with_a_kill(), timeout=3)
    duration = time.monotonic() - started_at
    print(f"returned after {duration:.2f} s: {result.stderr}")
    assert result.retcode != 0
    assert duration < 6, duration
    producer.close()
    broker.start()
    check_bulk_result(broker, first + second, result)


def test_sigterm_ends_a_consumer_with_pending_commits_while_the_broker_is_down(
    broker: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The final commit is retried for this time.
    monkeypatch.setenv("KSER_SHUTDOWN_TIMEOUT", "1")
    with start_worker(broker, tmp_path) as worker:
        send_records(broker, TOPIC, [message(seconds=0.5), message(seconds=0.5), message()])
        worker.wait_for("start")
        broker.kill()
        worker.wait_for("end", 3)
        # Longer than the session timeout.
        time.sleep(6.5)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(END_SECONDS) == 0
        assert "Closing consumer and exiting" in worker.text


def test_sigterm_ends_an_idle_consumer_within_5_s_while_the_broker_is_down(broker: KafkaBroker, tmp_path: Path) -> None:
    with start_worker(broker, tmp_path) as worker:
        broker.stop()
        worker.wait_for_text("rror")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(END_SECONDS) == 0


def test_sigterm_ends_a_consumer_with_pending_commits_while_the_broker_hangs(
    broker: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The final commit is retried for this time.
    monkeypatch.setenv("KSER_SHUTDOWN_TIMEOUT", "1")
    with start_worker(broker, tmp_path) as worker:
        send_records(broker, TOPIC, [message(seconds=0.5), message(seconds=0.5), message()])
        worker.wait_for("start")
        pid = broker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            worker.wait_for("start", 2)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(END_SECONDS) == 0
        finally:
            os.kill(pid, signal.SIGCONT)
