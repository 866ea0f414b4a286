"""Producer on kafka-python. Behaviour page, section 8."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from cdumay_result import Result
from kafka import KafkaProducer
from kafka.errors import KafkaTimeoutError

from kser import signals
from kser.config import CONFIG, Settings
from kser.controller import BaseProducer
from kser.python_kafka.options import connect, options_for, servers
from kser.schemas import Message

#: Milliseconds that the client may wait for the metadata of a topic, unless it is configured.
MAX_BLOCK_MS = 5000
#: Seconds that closing waits for messages that are still on their way.
CLOSE_TIMEOUT = 2.0
#: Messages of a bulk whose delivery is not looked at yet.
MAX_UNCHECKED = 10_000


class Producer(BaseProducer):
    """Sends messages with ``kafka.KafkaProducer``, and checks that each one was delivered. Safe to share by threads.

    :param config: options of KafkaProducer; what it knows of ``KSER_CONFIG`` when None.
    :param app: a Flask application whose ``config`` is looked at before the environment.
    :raises kser.errors.BrokerUnavailable: no broker answers.
    :raises kser.errors.SettingError: ``KSER_CONFIG`` cannot be used.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, *, app: Any = None) -> None:
        options = options_for(KafkaProducer, config, Settings(getattr(app, "config", None)))
        self._max_block_ms = options.setdefault("max_block_ms", MAX_BLOCK_MS)
        self._servers = servers(options)
        self._waiting_for_metadata = threading.Lock()
        self.client = connect(KafkaProducer, options)

    def _send(self, topic: str, kmsg: Message, timeout: float = 60) -> Any:
        deadline = time.monotonic() + timeout
        try:
            self._enqueue(topic, self._onmessage(kmsg), deadline).get(timeout=_remaining(deadline))
            result = Result(uuid=kmsg.uuid, stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic}")
        except Exception as exc:
            result = Result.from_exception(exc, uuid=kmsg.uuid)
        return self._sent(topic, kmsg, result)

    def bulk_send(self, topic: str, kmsgs: Iterable[Message], timeout: float = 60) -> Result:
        """Send many messages, then wait until all are delivered.

        :param topic: where to.
        :param kmsgs: the messages; any iterable, consumed once.
        :param timeout: seconds for everything together.
        :return: a Result that says how many were sent. If some were not, it is failed, and ``retval["failed"]`` has the
            reason by uuid; those whose time ran out may still arrive.
        """
        deadline = time.monotonic() + timeout
        unchecked: deque[tuple[Message, Any]] = deque()
        failed: dict[str, str] = {}
        count = 0
        try:
            for kmsg in kmsgs:
                count += 1
                try:
                    unchecked.append((kmsg, self._enqueue(topic, self._onmessage(kmsg), deadline)))
                except Exception as exc:
                    failed[kmsg.uuid] = str(exc)
                while len(unchecked) > MAX_UNCHECKED:
                    self._check(topic, *unchecked.popleft(), deadline, failed)
            while unchecked:
                self._check(topic, *unchecked.popleft(), deadline, failed)
        except Exception as exc:
            return Result.from_exception(exc)
        if not failed:
            return Result(stdout=f"{count} message(s) sent")
        reason = next(iter(failed.values()))
        return Result(
            retcode=500,
            stdout=f"{count - len(failed)} message(s) sent",
            stderr=f"{len(failed)} of {count} message(s) not sent; the first one: {reason}",
            retval={"failed": failed},
        )

    def close(self) -> None:
        self.client.close(timeout=CLOSE_TIMEOUT)

    def _enqueue(self, topic: str, kmsg: Message, deadline: float) -> Any:
        """Hand a message to the client, which may have to wait for metadata first; returns the future of its delivery.

        The client has one setting for how long it waits, which has to fit each call's own deadline.
        """
        data = kmsg.dumps().encode("utf-8")
        if not self._waiting_for_metadata.acquire(timeout=_remaining(deadline)):
            raise KafkaTimeoutError(f"another thread still waits for metadata from {self._servers}")
        try:
            self.client.config["max_block_ms"] = min(self._max_block_ms, _remaining(deadline) * 1000)
            return self.client.send(topic, data)
        except KafkaTimeoutError as error:
            raise KafkaTimeoutError(f"{error.args[0] if error.args else error} {self._explain(topic)}") from error
        finally:
            self._waiting_for_metadata.release()

    def _explain(self, topic: str) -> str:
        if self.client.bootstrap_connected():
            return f"The brokers at {self._servers} answer, but know no topic {topic!r}: create it, or correct its name"
        return f"No broker answers at {self._servers}: start one there, or correct 'bootstrap_servers' in {CONFIG}"

    def _check(self, topic: str, kmsg: Message, delivery: Any, deadline: float, failed: dict[str, str]) -> None:
        try:
            delivery.get(timeout=_remaining(deadline))
        except Exception as exc:
            failed[kmsg.uuid] = str(exc)
        else:
            signals.emit(signals.message_sent, type(self), topic=topic, kmsg=kmsg, result=None)


def _remaining(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)
