"""Commits that end in time: librdkafka waits for an answer without a limit."""

from __future__ import annotations

import queue
import threading
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition


class Committer:
    """Commits in a thread of its own, which runs nothing else, one commit after the other.

    :param client: the client of librdkafka, which threads may share.
    """

    def __init__(self, client: Consumer) -> None:
        self._client = client
        self._orders: queue.SimpleQueue[list[TopicPartition] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._unanswered = 0
        self._thread: threading.Thread | None = None

    def commit(self, offsets: list[TopicPartition], timeout: float) -> None:
        """Commit, and return when the group knows it.

        :raises confluent_kafka.KafkaException: it was refused.
        :raises TimeoutError: there was no answer in time, to this commit or to the one before it.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kser-commit", daemon=True)
            self._thread.start()
        if not self._unanswered:
            self._orders.put(offsets)
            self._unanswered = 1
        else:
            # What is committed now is not what was asked for: the next one asks again.
            self._answer(timeout)
            raise TimeoutError("the last commit was only answered now")
        if (error := self._answer(timeout)) is not None:
            raise error

    def close(self) -> None:
        """End the thread, once it has its answer."""
        self._orders.put(None)

    def _answer(self, timeout: float) -> Exception | None:
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        self._unanswered = 0
        return answer

    def _run(self) -> None:
        while (offsets := self._orders.get()) is not None:
            self._answers.put(self._commit(offsets))

    def _commit(self, offsets: list[TopicPartition]) -> Exception | None:
        try:
            committed: Any = self._client.commit(offsets=offsets, asynchronous=False)
        except Exception as error:
            return error
        return next((KafkaException(tp.error) for tp in committed or () if tp.error is not None), None)
