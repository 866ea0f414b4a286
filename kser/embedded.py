"""A broker for development: librdkafka's mock cluster, in memory, in this process, without Java.

In a program or a test::

    with EmbeddedBroker("dice") as broker:
        producer = Producer(broker.producer_config)
        consumer = Consumer({**broker.config, "group_id": "players"}, ["dice"])

In a shell::

    python -m kser.embedded --topic dice

It listens on a free port of the loopback interface, keeps the newest 5 MB of each partition and forgets everything at
its end. It needs the extra ``embedded``.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from kser.errors import BrokerUnavailable, KserError, MissingDependency, UsageError

#: How long to wait for an answer of a broker that runs in this very process.
_PATIENCE_SECONDS = 10

# The mock cluster would take any name, and the program would fail with the first real broker.
_TOPIC_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")

# Warnings and worse: the one line below them says that the mock cluster is on, which is what was asked for.
_SYSLOG_WARNING = 4


class EmbeddedBroker:
    """A running development broker: it starts when it is built and ends with :meth:`close` or with the ``with`` block.

    :param topics: topics to create: a consumer joins its group smoothly only when its topics exist beforehand.
    :raises MissingDependency: confluent-kafka is not installed.
    :raises BrokerUnavailable: it does not start.
    """

    def __init__(self, *topics: str) -> None:
        self._client: Any = _mock_cluster()
        #: Address of the broker, ``127.0.0.1:port``.
        self.bootstrap_servers = self._start()
        #: The topics that were created, in that order.
        self.topics: list[str] = []
        for name in topics:
            self.create_topic(name)

    @property
    def config(self) -> dict[str, Any]:
        """Options of kafka-python for a consumer; add what you like, it is a new dict each time."""
        return {
            **self.producer_config,
            # A changed group waits for members that are gone until their session ends, and the others hear of the
            # change with their next heartbeat: with the client's own 45 s and 3 s, a restart would take that long.
            "session_timeout_ms": 6000,
            "heartbeat_interval_ms": 500,
        }

    @property
    def producer_config(self) -> dict[str, Any]:
        """Options of kafka-python for a producer, a new dict each time."""
        # Without a version, kafka-python 3 asks for it in a newer form than the mock cluster answers, for ever.
        return {"bootstrap_servers": self.bootstrap_servers, "api_version": (2, 0)}

    def environment(self, group_id: str = "kser") -> dict[str, str]:
        """``KSER_CONFIG`` and ``KSER_TOPICS`` for consumers and producers in other processes.

        :param group_id: the group of the consumers; it starts with the earliest message.
        """
        config = {**self.config, "api_version": "2.0", "group_id": group_id, "auto_offset_reset": "earliest"}
        return {"KSER_CONFIG": json.dumps(config), "KSER_TOPICS": ",".join(self.topics)}

    def create_topic(self, name: str) -> None:
        """Create a topic; one that exists stays as it is.

        :raises BrokerUnavailable: the broker does not answer.
        :raises UsageError: the broker was closed, or Apache Kafka would refuse the name.
        """
        if not _TOPIC_NAME.fullmatch(name) or name in (".", ".."):
            raise UsageError(
                f"{name!r} is no name for a topic: Apache Kafka takes 1 to 249 ASCII letters, digits, '.', '_' and '-'"
            )
        if self._client is None:
            raise UsageError(f"topic {name!r} cannot be created: this development broker is closed; start another one")
        # Asking for a topic by its name creates it.
        problem = self._metadata(name).topics[name].error
        if problem is not None:
            raise BrokerUnavailable(f"the development broker did not create topic {name!r}: {problem}")
        if name not in self.topics:
            self.topics.append(name)

    def close(self) -> None:
        """End the broker and forget its messages; closing twice is harmless."""
        # librdkafka ends the mock cluster with the last reference to the client that holds it.
        self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> str:
        brokers = self._metadata().brokers
        if not brokers:
            raise BrokerUnavailable("the development broker did not start: librdkafka's mock cluster has no broker")
        broker = next(iter(brokers.values()))
        return f"{broker.host}:{broker.port}"

    def _metadata(self, *topic: str) -> Any:
        from confluent_kafka import KafkaException

        try:
            return self._client.list_topics(*topic, timeout=_PATIENCE_SECONDS)
        except KafkaException as error:
            raise BrokerUnavailable(
                f"the development broker does not answer on the loopback interface ({error}); "
                "does a firewall or a sandbox keep this process from talking to itself?"
            ) from error


def _mock_cluster() -> Any:
    """The client that holds a mock cluster of one broker."""
    try:
        from confluent_kafka import Producer
    except ImportError as error:
        raise MissingDependency(
            f'the development broker needs confluent-kafka ({error}); install it with: pip install "kser[embedded]"'
        ) from error
    # The mock cluster's thread ends when a signal interrupts it: the broker would answer no more, and closing it could
    # take for ever. A thread inherits what is blocked where it is started.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        # The mock cluster replaces bootstrap.servers, which must be there all the same.
        return Producer({"bootstrap.servers": "127.0.0.1", "test.mock.num.brokers": 1, "log_level": _SYSLOG_WARNING})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m kser.embedded``: run a broker until SIGINT or SIGTERM.

    Standard output has the settings as lines for a shell; what is said to the reader goes to standard error.
    """
    options = _parser().parse_args(arguments)
    # Blocked before the broker starts, then waited for: no signal is lost, and none interrupts anything. They stay
    # blocked, because the process ends here and a second Ctrl-C must not spoil that.
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        with EmbeddedBroker(*options.topic) as broker:
            sys.stderr.write(
                f"kser: development broker on {broker.bootstrap_servers}: it keeps 5 MB a partition and forgets"
                " everything at exit; stop it with Ctrl-C\n"
            )
            for name, value in broker.environment().items():
                # Neither these options nor names of topics have a quote in them.
                sys.stdout.write(f"export {name}='{value}'\n")
            sys.stdout.flush()
            signal.sigwait(ends)
    except KserError as error:
        sys.stderr.write(f"kser: {error.message}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kser.embedded",
        description="Run a broker for development, in memory, on a free port of the loopback interface.",
        epilog="Paste the lines that it prints into the shell where you start consumers and producers.",
    )
    parser.add_argument(
        "--topic",
        metavar="NAME",
        action="append",
        default=[],
        help="create this topic (again for more); the first is where tasks are sent",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
