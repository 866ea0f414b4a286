"""Development broker: librdkafka's mock cluster, in memory, in this process, without Java.

In a program or a test::

    with EmbeddedBroker("dice") as broker:
        producer = Producer(broker.producer_config)
        consumer = Consumer({**broker.config, "group_id": "players"}, ["dice"])

In a shell::

    python -m kser.embedded --topic dice

The broker listens on a free port of the loopback interface, keeps the newest 5 MB of each partition and loses all
messages when it stops. To use it, install the extra ``embedded``.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from kser.config import is_topic_name
from kser.errors import BrokerUnavailable, KserError, MissingDependency, UsageError
from kser.forks import keep_for_ever, renew_after_fork

#: Seconds to wait for a response of the broker, which runs in this process.
_START_TIMEOUT = 10

# With this log level, librdkafka logs only warnings and errors. With its default level, librdkafka would also log that
# the mock cluster is in use, which is intended here.
_SYSLOG_WARNING = 4


class EmbeddedBroker:
    """Development broker. The constructor starts it, and :meth:`close` or the end of the ``with`` block stops it.

    :param topics: topics to create. Create the topics of a consumer before the consumer starts: a topic that appears
        after the consumer has joined its group may cause another rebalance.
    :raises MissingDependency: confluent-kafka is not installed.
    :raises BrokerUnavailable: the broker does not start.
    """

    def __init__(self, *topics: str) -> None:
        self._client: Any = _mock_cluster()
        #: Address of the broker, ``127.0.0.1:port``.
        self.bootstrap_servers = self._start()
        #: Created topics, in the order of their creation.
        self.topics: list[str] = []
        for name in topics:
            self.create_topic(name)
        renew_after_fork(self)

    def _kser_renew_after_fork(self) -> None:
        # The broker runs in the parent process. In the child, this object is closed.
        if self._client is not None:
            keep_for_ever(self._client)
            self._client = None

    @property
    def config(self) -> dict[str, Any]:
        """Options of kafka-python for a consumer. Each access returns a new dict, to which you may add options."""
        return {
            **self.producer_config,
            # When the group changes, the broker waits for lost members until their session times out, and the other
            # members learn of the change with their next heartbeat. The defaults are a session timeout of 15 s and a
            # heartbeat every 3 s, so a restarted consumer could wait for about 18 s until it gets partitions. Use
            # shorter times here.
            "session_timeout_ms": 6000,
            "heartbeat_interval_ms": 500,
        }

    @property
    def producer_config(self) -> dict[str, Any]:
        """Options of kafka-python for a producer. Each access returns a new dict."""
        # Set ``api_version``, because otherwise kafka-python 3 asks the broker for its version endlessly, in a format
        # that is too new for the mock cluster.
        return {"bootstrap_servers": self.bootstrap_servers, "api_version": (2, 0)}

    def environment(self, group_id: str = "kser") -> dict[str, str]:
        """Return the values of ``KSER_CONFIG`` and ``KSER_TOPICS`` for consumers and producers in other processes.

        :param group_id: the consumer group. The group starts at the earliest message.
        """
        config = {**self.config, "api_version": "2.0", "group_id": group_id, "auto_offset_reset": "earliest"}
        return {"KSER_CONFIG": json.dumps(config), "KSER_TOPICS": ",".join(self.topics)}

    def create_topic(self, name: str) -> None:
        """Create a topic; an existing topic is not changed.

        :raises BrokerUnavailable: the broker does not respond.
        :raises UsageError: the broker is closed, or Apache Kafka would reject the name.
        """
        # Apache Kafka accepts only these topic names, but the mock cluster accepts any name. Without this check, a
        # program that works here could fail with a real broker.
        if not is_topic_name(name):
            raise UsageError(
                f"{name!r} is not a valid topic name: use 1 to 249 ASCII letters, digits, '.', '_' and '-'"
            )
        if self._client is None:
            raise UsageError(f"topic {name!r} cannot be created: this development broker is closed; start another one")
        # The mock cluster creates a topic when a client requests the metadata of the topic.
        problem = self._metadata(name).topics[name].error
        if problem is not None:
            raise BrokerUnavailable(f"the development broker did not create topic {name!r}: {problem}")
        if name not in self.topics:
            self.topics.append(name)

    def close(self) -> None:
        """Stop the broker and discard its messages. A second call has no effect."""
        # librdkafka stops the mock cluster when it destroys the client that started the mock cluster. So drop the only
        # reference to this client.
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
            return self._client.list_topics(*topic, timeout=_START_TIMEOUT)
        except KafkaException as error:
            raise BrokerUnavailable(
                f"the development broker does not respond on the loopback interface ({error}); "
                "check whether a firewall or a sandbox blocks connections of this process to itself"
            ) from error


def _mock_cluster() -> Any:
    """Create the librdkafka client that runs the mock cluster, which has one broker."""
    try:
        from confluent_kafka import Producer
    except ImportError as error:
        raise MissingDependency(
            f'the development broker needs confluent-kafka ({error}); install it with: pip install "kser[embedded]"'
        ) from error
    # Block all signals, because the mock cluster's thread inherits the signal mask and a signal would end the thread.
    # The broker would then not respond any more, and closing it could hang.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        # The client requires bootstrap.servers, although the mock cluster replaces it.
        return Producer({"bootstrap.servers": "127.0.0.1", "test.mock.num.brokers": 1, "log_level": _SYSLOG_WARNING})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a broker until SIGINT or SIGTERM, as ``python -m kser.embedded`` does.

    The settings are written to standard output as lines for a shell; all other texts go to standard error.
    """
    options = _parser().parse_args(arguments)
    # Block both signals before the broker starts and wait for them later, so that no signal is lost and no signal
    # interrupts a call. Keep both signals blocked, so that a second Ctrl-C does not interrupt the shutdown of the
    # broker.
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        with EmbeddedBroker(*options.topic) as broker:
            sys.stderr.write(
                f"kser: development broker on {broker.bootstrap_servers}: it keeps 5 MB per partition and loses all"
                " messages at exit; stop it with Ctrl-C\n"
            )
            for name, value in broker.environment().items():
                # Single quotes are safe, because neither the options nor the topic names contain a single quote.
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
        epilog="Paste the printed lines into the shell where you start consumers and producers.",
    )
    parser.add_argument(
        "--topic",
        metavar="NAME",
        action="append",
        default=[],
        help="create this topic; repeat the option for more topics; tasks are sent to the first topic",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
