"""Commits with a timeout, which librdkafka's synchronous commit does not have."""

from __future__ import annotations

import queue
import threading
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition


class Committer:
    """A thread that runs commits one after the other, so that a caller can stop waiting at its timeout.

    :param client: librdkafka's client. Several threads may use it at the same time.
    """

    def __init__(self, client: Consumer) -> None:
        self._client = client
        self._requests: queue.SimpleQueue[list[TopicPartition] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._pending = 0
        self._thread: threading.Thread | None = None

    def commit(self, offsets: list[TopicPartition], timeout: float) -> None:
        """Commit offsets, and return when the group coordinator has confirmed them.

        :raises confluent_kafka.KafkaException: the commit was rejected.
        :raises TimeoutError: this commit or the previous commit was not confirmed within ``timeout`` seconds.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kser-commit", daemon=True)
            self._thread.start()
        if not self._pending:
            self._requests.put(offsets)
            self._pending = 1
        else:
            # The previous commit, which had other offsets, had no result yet. Wait for this result, and then fail, so
            # that the caller commits the current offsets in its next call.
            self._result(timeout)
            raise TimeoutError("the previous commit took until now, so this commit was not sent")
        if (error := self._result(timeout)) is not None:
            raise error

    def close(self) -> None:
        """Stop the thread after its current commit."""
        self._requests.put(None)

    def _result(self, timeout: float) -> Exception | None:
        try:
            result = self._results.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no response within {timeout:g} s") from None
        self._pending = 0
        return result

    def _run(self) -> None:
        while (offsets := self._requests.get()) is not None:
            self._results.put(self._commit(offsets))

    def _commit(self, offsets: list[TopicPartition]) -> Exception | None:
        try:
            commit_and_check(self._client, offsets)
        except Exception as error:
            return error
        return None


def commit_and_check(client: Consumer, offsets: list[TopicPartition]) -> None:
    """Commit offsets without a timeout.

    :raises confluent_kafka.KafkaException: the commit of at least one partition was rejected.
    """
    committed: Any = client.commit(offsets=offsets, asynchronous=False)
    if (error := next((tp.error for tp in committed or () if tp.error is not None), None)) is not None:
        raise KafkaException(error)
