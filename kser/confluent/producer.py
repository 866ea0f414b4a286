"""Producer on confluent-kafka. Drop-in for ``kser.confluent`` of 0.8.27."""

from __future__ import annotations

import collections
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import confluent_kafka
from cdumay_result import Result
from confluent_kafka import KafkaError, KafkaException

from kser import signals
from kser.config import CONFIG, Settings
from kser.confluent.logs import CLIENT_LOGGER
from kser.confluent.options import connect, options_for, servers, with_defaults
from kser.confluent.reports import SLICE, Delivery, Reports, Trouble, Waiting, guarded
from kser.outgoing import (
    HeaderList,
    KeyOf,
    OutgoingProducer,
    Tally,
    key_bytes,
    refused_as_too_large,
    remaining,
    size_of,
    too_large,
)
from kser.results import merge
from kser.schemas import Message

logger = logging.getLogger(__name__)

#: Seconds to wait for a topic that the client does not know yet.
MAX_BLOCK = 5.0
#: Seconds between two questions for a topic that the brokers do not know; one that is being created appears so late.
ASK_AGAIN = 0.1
#: Seconds that closing waits for messages that are still on their way.
CLOSE_TIMEOUT = 0.5
#: librdkafka's default.
MESSAGE_MAX_BYTES = 1_000_000
#: Messages of a bulk between two looks at what was reported.
CHUNK = 500
#: Messages of a bulk that may be on their way before it waits for some to arrive.
MAX_ON_THEIR_WAY = 20_000

_UNKNOWN_TOPIC = (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART)
_NOT_YET = (*_UNKNOWN_TOPIC, KafkaError.LEADER_NOT_AVAILABLE)


class Producer(OutgoingProducer):
    """Sends messages with ``confluent_kafka.Producer``, and checks that each one was delivered.

    Threads may share it, and should: it is one connection to each broker. Unless they are configured, ``acks`` is
    ``all``, ``enable.idempotence`` is true, ``linger.ms`` is 0 (a message travels at once) and ``partitioner`` is
    ``murmur2_random``, as Java and kafka-python distribute keys.

    :param config: options of librdkafka; what a producer knows of ``KSER_CONFIG`` when None.
    :param app: a Flask application whose ``config`` is looked at before the environment.
    :raises kser.errors.SettingError: an option is not known, or cannot be used.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, *, app: Any = None) -> None:
        options = with_defaults(options_for("producer", config, Settings.of(app)))
        self._servers = servers(options)
        self._trouble = Trouble(options.get("error_cb"))
        options |= {name: guarded(options[name]) for name in ("stats_cb", "throttle_cb") if options.get(name)}
        self._topics: set[str] = set()
        self._closed = False
        keywords = {} if "logger" in options else {"logger": CLIENT_LOGGER}
        self.client = connect(confluent_kafka.Producer, {**options, "error_cb": self._trouble}, **keywords)
        self._limit = int(options.get("message.max.bytes", MESSAGE_MAX_BYTES))
        self._reports = Reports(self.client.poll)

    def bulk_send(
        self, topic: str, kmsgs: Iterable[Message], timeout: float = 60, *, key: KeyOf | None = None
    ) -> Result:
        """Send many messages, then wait until all are delivered.

        :param topic: where to.
        :param kmsgs: the messages; any iterable, consumed once.
        :param timeout: seconds for everything together.
        :param key: called with each message for its key; without, no message has one.
        :return: a Result that says how many were sent. If some were not, it is failed, and ``retval["failed"]`` has the
            reason by uuid; those whose time ran out may still arrive.
        """
        bulk = _Bulk(self, topic, timeout, key)
        with self._reports:
            try:
                bulk.send(kmsgs)
            except Exception as exc:
                return merge(bulk.finish(), Result.from_exception(exc))
            return bulk.finish()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reports.close()
        left = self.client.flush(CLOSE_TIMEOUT)
        if left:
            logger.warning(
                f"{type(self).__name__}: closed with messages still on their way to {self._servers}: {left} not"
                " confirmed"
            )
            # The client would go on trying for as long as anybody refers to it.
            self.client.purge()
            self.client.poll(0)
        # Older clients let go of their connections when nobody refers to them.
        if hasattr(self.client, "close"):
            self.client.close()

    def _deliver(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderList, deadline: float
    ) -> None:
        delivery = Delivery()
        began = time.monotonic()
        with self._reports:
            self._enqueue(topic, value, _options(key, headers), delivery, deadline)
            self._reports.wait(delivery, deadline)
        if not delivery.done():
            raise self._unconfirmed(began)
        if delivery.error is not None:
            raise self._undelivered(delivery.error, topic, size_of(value, key, headers), began)

    def _begin(
        self, topic: str, value: bytes | None, deadline: float, told: Callable[[Exception | None], None]
    ) -> None:
        began = time.monotonic()

        def report(error: Any, _record: Any) -> None:
            told(None if error is None else self._undelivered(error, topic, len(value or b""), began))

        self._enqueue(topic, value, {}, report, deadline)
        # What was reported meanwhile, of those before it.
        self._reports.serve()

    def _delivered(self, topic: str, kmsg: Message, timeout: float) -> Result:
        return Result(uuid=kmsg.uuid, stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent")

    def _enqueue(
        self,
        topic: str,
        value: bytes | None,
        options: Mapping[str, Any],
        on_delivery: Callable[[Any, Any], None],
        deadline: float,
    ) -> None:
        """Hand a record to the client, which may have to learn of the topic and to make room first."""
        if self._closed:
            raise KafkaException("This producer is closed: make another one")
        size = size_of(value, options.get("key"), options.get("headers", []))
        if size > self._limit:
            raise too_large(size, self._limit, "message.max.bytes")
        if topic not in self._topics:
            self._look_up(topic, deadline)
        while True:
            try:
                return self.client.produce(topic, value, on_delivery=on_delivery, **options)
            except KafkaException as error:
                raise self._refused(error.args[0], topic, size) from error
            except BufferError as error:
                left = remaining(deadline)
                if not left:
                    raise KafkaException(
                        f"The client's queue is full of messages that {self._servers} did not confirm yet: send slower,"
                        f" or raise 'queue.buffering.max.messages' in {CONFIG}"
                    ) from error
            if not self._reports.serve(min(left, SLICE)):
                time.sleep(min(left, SLICE / 10))

    def _look_up(self, topic: str, deadline: float) -> None:
        """Make sure that there is such a topic.

        The client would keep a message for one that is not there for half a minute before it said so.
        """
        began = time.monotonic()
        patience = min(deadline, began + MAX_BLOCK)
        question = 1.0
        known: Any = None
        while left := remaining(patience):
            try:
                # Short at first: a signal waits for the answer.
                known = self.client.list_topics(topic, timeout=max(min(left, question), 0.001)).topics[topic].error
            except KafkaException as error:
                self._trouble.note(error.args[0])
                question *= 2
                continue
            if known is None:
                self._topics.add(topic)
                return
            if known.code() not in _NOT_YET:
                raise KafkaException(f"{known.str()}: topic {topic!r} at {self._servers}")
            time.sleep(min(ASK_AGAIN, remaining(patience)))
        if known is not None:
            raise KafkaException(self._no_topic(topic))
        self._reports.serve()
        raise KafkaException(
            f"No broker answers at {self._servers}: start one there, or correct 'bootstrap.servers' in {CONFIG}"
            f"{self._trouble.since(began)}"
        )

    def _no_topic(self, topic: str) -> str:
        return f"The brokers at {self._servers} answer, but know no topic {topic!r}: create it, or correct its name"

    def _unconfirmed(self, began: float) -> KafkaException:
        return KafkaException(
            f"{self._servers} did not confirm the message, which may still arrive: see whether the brokers run there,"
            f" or correct 'bootstrap.servers' in {CONFIG}{self._trouble.since(began)}"
        )

    def _refused(self, error: KafkaError, topic: str, size: int) -> Exception:
        """What to say when the client does not take a record."""
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            return too_large(size, self._limit, "message.max.bytes")
        advice = "; this producer sends no more: make another one" if error.code() == KafkaError._FATAL else ""
        return KafkaException(f"{error.str()}: topic {topic!r} at {self._servers}{advice}")

    def _undelivered(self, error: KafkaError, topic: str, size: int, began: float) -> Exception:
        """What to say about a report of failure."""
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            return refused_as_too_large(size, topic, self._servers)
        if error.code() in _UNKNOWN_TOPIC:
            # It was there before: somebody has deleted it.
            self._topics.discard(topic)
            return KafkaException(self._no_topic(topic))
        if error.code() == KafkaError._MSG_TIMED_OUT:
            return self._unconfirmed(began)
        return KafkaException(f"{error.str()}: topic {topic!r} at {self._servers}")


class _Bulk(Waiting):
    """Messages on their way together. Reports come in whatever thread polls, and are looked at in that of the bulk."""

    def __init__(self, producer: Producer, topic: str, timeout: float, key: KeyOf | None) -> None:
        self._producer = producer
        self._topic = topic
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._key = key
        self._began = time.monotonic()
        self._tally = Tally()
        self._in_vain: Exception | None = None
        self._on_their_way: dict[int, tuple[Message, int]] = {}
        self._enough = 0
        self._number = 0
        self._arrived: collections.deque[tuple[Message, int, Any]] = collections.deque()

    def send(self, kmsgs: Iterable[Message]) -> None:
        """Take messages; each one is sent at once."""
        for kmsg in kmsgs:
            self._tally.take()
            try:
                self._put(kmsg)
            except Exception as exc:
                self._tally.fail(kmsg, exc)
            self._number += 1
            if not self._number % CHUNK:
                self._look()

    def finish(self) -> Result:
        """Wait until all are delivered, and say what came of them."""
        self._enough = 0
        self._producer._reports.wait(self, self._deadline)
        late = []
        while self._on_their_way:
            # Another thread may just take the last one away.
            _, (kmsg, _) = self._on_their_way.popitem()
            late.append(kmsg)
        self._settle()
        for kmsg in reversed(late):
            self._tally.fail(kmsg, self._producer._unconfirmed(self._began))
        return self._tally.result()

    def done(self) -> bool:
        return len(self._on_their_way) <= self._enough

    def _put(self, kmsg: Message) -> None:
        producer = self._producer
        data = producer._encode(kmsg)
        options = _options(key_bytes(self._key(kmsg)), []) if self._key else {}
        if self._in_vain is not None:
            raise self._in_vain
        number = self._number
        self._on_their_way[number] = (kmsg, len(data))
        try:
            producer._enqueue(self._topic, data, options, functools.partial(self._report, number), self._deadline)
        except Exception as exc:
            del self._on_their_way[number]
            if isinstance(exc, KafkaException):
                # What one waited for in vain, the others need not wait for again.
                self._in_vain = exc
            raise

    def _report(self, number: int, error: Any, _record: Any) -> None:
        """What librdkafka calls."""
        found = self._on_their_way.pop(number, None)
        if found is not None and (error is not None or signals.message_sent.receivers):
            self._arrived.append((*found, error))
        self.reported()

    def _look(self) -> None:
        """Take reports, and let the messages not become too many."""
        self._producer._reports.serve()
        if len(self._on_their_way) > MAX_ON_THEIR_WAY:
            self._enough = MAX_ON_THEIR_WAY // 2
            self._producer._reports.wait(self, self._deadline)
        self._settle()

    def _settle(self) -> None:
        while self._arrived:
            kmsg, size, error = self._arrived.popleft()
            if error is None:
                self._producer._announce(self._topic, kmsg, self._timeout)
            else:
                self._tally.fail(kmsg, self._producer._undelivered(error, self._topic, size, self._began))


def _options(key: bytes | None, headers: HeaderList) -> dict[str, Any]:
    """What the client is given beside the value: only what there is."""
    options: dict[str, Any] = {}
    if key is not None:
        options["key"] = key
    if headers:
        options["headers"] = headers
    return options
