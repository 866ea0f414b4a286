"""Tests of the development broker, in this process and as a program."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest
from cdumay_result import Result

from kser import embedded
from kser.controller import Controller
from kser.embedded import EmbeddedBroker
from kser.entry import Entrypoint
from kser.errors import BrokerUnavailable, MissingDependency, UsageError
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from kser.schemas import Message


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker("dice") as broker:
        yield broker


def listens(host: str, port: int) -> bool:
    """Return whether a server accepts connections at this address."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def port_of(broker: EmbeddedBroker) -> int:
    return int(broker.bootstrap_servers.rpartition(":")[2])


def consume_one(consumer: Consumer) -> None:
    """Step the consumer until it has handled a record."""
    for _ in range(30):
        if consumer.step():
            return
    raise AssertionError("no message arrived in 15 s")


def test_message_passes_from_producer_through_broker_to_consumer(broker: EmbeddedBroker) -> None:
    class Hello(Entrypoint):
        def run(self) -> Result:
            handled.append(self.uuid)
            return Result(uuid=self.uuid)

    handled: list[str] = []
    Controller.register(Hello.path, Hello)
    message = Message(uuid=str(uuid.uuid4()), entrypoint=Hello.path)
    producer = Producer(broker.producer_config)
    try:
        assert producer.send("dice", message).retcode == 0
    finally:
        producer.close()
    consumer = Consumer({**broker.config, "group_id": "players"}, ["dice"])
    try:
        consume_one(consumer)
    finally:
        consumer.close()
    assert handled == [message.uuid]


def test_environment_of_the_broker_configures_producer_and_consumer(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in broker.environment(group_id="players").items():
        monkeypatch.setenv(name, value)
    producer = Producer()
    try:
        assert producer.send("dice", Message(uuid="1", entrypoint="unknown.Task")).retcode == 0
    finally:
        producer.close()
    consumer = Consumer()
    try:
        consume_one(consumer)
    finally:
        consumer.close()


def test_broker_listens_on_127_0_0_1_alone(broker: EmbeddedBroker) -> None:
    assert broker.bootstrap_servers.startswith("127.0.0.1:")
    assert listens("127.0.0.1", port_of(broker))
    # 127.0.0.2 is also an address of this machine: a broker that listened on all addresses would accept this one too.
    assert not listens("127.0.0.2", port_of(broker))


def test_signal_to_the_process_does_not_end_the_broker(broker: EmbeddedBroker) -> None:
    # While the main thread blocks a signal, the system delivers it to any other thread that does not block it.
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        # Leave a thread of the broker time to receive the signal.
        time.sleep(0.1)
        broker.create_topic("created-afterwards")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, previous)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_broker_can_be_closed_twice(broker: EmbeddedBroker) -> None:
    broker.close()
    assert not listens("127.0.0.1", port_of(broker))
    broker.close()


def test_closed_broker_rejects_a_new_topic(broker: EmbeddedBroker) -> None:
    broker.close()
    with pytest.raises(UsageError, match="'late' cannot be created: this development broker is closed; start another"):
        broker.create_topic("late")


def test_topics_are_created_once_and_listed_in_order(broker: EmbeddedBroker) -> None:
    for name in ("second", "dice", "third.of_them-all"):
        broker.create_topic(name)
    assert broker.topics == ["dice", "second", "third.of_them-all"]
    assert broker.environment()["KSER_TOPICS"] == "dice,second,third.of_them-all"


@pytest.mark.parametrize("name", ["", " ", "a/b", "caf\u00e9", ".", "..", "a,b", "x" * 250])
def test_topic_name_that_kafka_rejects_is_rejected(broker: EmbeddedBroker, name: str) -> None:
    with pytest.raises(UsageError, match="is not a valid topic name: use 1 to 249"):
        broker.create_topic(name)


def test_config_property_returns_a_new_dict_each_time(broker: EmbeddedBroker) -> None:
    broker.config["group_id"] = "changed"
    assert "group_id" not in broker.config


def test_missing_confluent_kafka_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(MissingDependency, match=r'pip install "kser\[embedded\]"'):
        EmbeddedBroker()


def test_broker_that_does_not_respond_is_reported(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    from confluent_kafka import KafkaException

    class UnresponsiveCluster:
        def list_topics(self, *_topic: str, timeout: float) -> None:
            raise KafkaException("timed out")

    monkeypatch.setattr(embedded, "_mock_cluster", UnresponsiveCluster)
    with pytest.raises(BrokerUnavailable, match="does not respond on the loopback interface"):
        EmbeddedBroker()


class BrokerProgram:
    """``python -m kser.embedded`` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kser.embedded", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_exports(self) -> list[str]:
        """Return the two lines for a shell that the program prints when the broker runs."""
        assert self.process.stdout is not None
        return [self.process.stdout.readline() for _ in range(2)]

    def __enter__(self) -> BrokerProgram:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_program_prints_lines_for_a_shell() -> None:
    with BrokerProgram("--topic", "dice", "--topic", "cards") as program:
        exports = program.read_exports()
        output = subprocess.run(
            ["sh", "-c", "".join(exports) + 'printf "%s\\n%s\\n" "$KSER_CONFIG" "$KSER_TOPICS"'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert all(line.startswith("export ") for line in exports)
        config = json.loads(output[0])
        host, _, port = config.pop("bootstrap_servers").partition(":")
        assert listens(host, int(port))
    assert host == "127.0.0.1"
    assert config == {
        "api_version": "2.0",
        "session_timeout_ms": 6000,
        "heartbeat_interval_ms": 500,
        "group_id": "kser",
        "auto_offset_reset": "earliest",
    }
    assert output[1] == "dice,cards"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_program_ends_at_a_signal_with_status_0_and_prints_only_its_greeting(number: signal.Signals) -> None:
    with BrokerProgram("--topic", "dice") as program:
        program.read_exports()
        program.process.send_signal(number)
        # Users may press Ctrl-C twice.
        program.process.send_signal(signal.SIGINT)
        stdout, stderr = program.process.communicate(timeout=10)
        assert program.process.returncode == 0
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert "keeps 5 MB per partition and loses all messages at exit" in stderr


def test_program_rejects_an_invalid_topic_in_one_line() -> None:
    command = [sys.executable, "-m", "kser.embedded", "--topic", "a b"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("kser: 'a b' is not a valid topic name")
    assert len(process.stderr.splitlines()) == 1
