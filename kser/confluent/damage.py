"""Data that librdkafka cannot decode: a search for its first and last offset, over connections of its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Mapping, Set
from contextlib import suppress
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from kser.confluent.logs import CLIENT_LOGGER
from kser.consumer.client import Partition
from kser.consumer.unreadable import FETCH_TRIES, UnreadableRecord
from kser.escaping import escape_lines

logger = escape_lines(logging.getLogger(__name__))

#: Errors of data that librdkafka cannot decode: a wrong checksum, damaged compressed data, an unknown format or codec.
#: The offset of such an error is the first offset of the batch.
DAMAGE = (KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError._NOT_IMPLEMENTED)

#: Seconds that a probe waits for data before another client repeats it.
PROBE_TIMEOUT = 10.0
#: Seconds between two checks of a probe whether the search was cancelled, and between two failed probes.
PROBE_INTERVAL = 0.5
#: Seconds between two log lines about a partition whose data cannot be fetched again.
REPORT_INTERVAL = 600.0
#: How many times a search may find readable data at one offset before the client must be replaced.
MAX_REFETCHES = 3

#: Options that a probe must not have: callbacks, and options of the group membership.
_NOT_FOR_PROBES = ("error_cb", "stats_cb", "throttle_cb", "on_commit", "statistics.interval.ms", "group.instance.id")


class SearchCancelled(Exception):
    """The end of a search whose partition was revoked, or whose client is closing."""


class DamageSearch(threading.Thread):
    """The search for the end of data that cannot be decoded, in a thread of its own.

    The search fetches the data again with ``FETCH_TRIES`` new clients. If all of them fail, it looks for the next
    readable offset, first in growing steps, then by bisection.

    :param options: the options of the client that could not decode the data.
    :param partition: the partition.
    :param offset: the first offset that was not read.
    :param error: the error of the client.
    """

    def __init__(self, options: Mapping[str, Any], partition: Partition, offset: int, error: KafkaError) -> None:
        super().__init__(name="kser-damage", daemon=True)
        self._options = {key: value for key, value in options.items() if key not in _NOT_FOR_PROBES}
        self.partition = partition
        self.offset = offset
        self.error = error
        self.cancelled = threading.Event()
        #: True once the search has a result. A thread without a result could not start, or was cancelled or killed.
        self.has_result = False
        #: The record for the unreadable offsets; None if another client could read the data.
        self.unreadable: UnreadableRecord | None = None
        self._reason = str(error)
        self._reported_at = -math.inf

    def run(self) -> None:
        """Search, and then end this thread."""
        try:
            for _ in range(FETCH_TRIES):
                next_batch = self._probe(self.offset)
                if next_batch is None:
                    self.has_result = True
                    return
            last = self._next_readable(self.offset) - 1
            self.unreadable = UnreadableRecord(*self.partition, self.offset, last, self._reason)
            self.has_result = True
        except SearchCancelled:
            pass

    def _next_readable(self, offset: int) -> int:
        """Return the lowest offset above ``offset`` that is readable, or that belongs to another batch."""
        step, low = 1, offset
        while not self._is_other_batch(high := low + step):
            low, step = high, step * 2
        # The offset ``low`` belongs to the damaged batch, and ``high`` does not.
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_other_batch(middle) else (middle, high)
        return high

    def _is_other_batch(self, offset: int) -> bool:
        base = self._probe(offset)
        return base is None or base > self.offset

    def _probe(self, offset: int) -> int | None:
        """Fetch once at an offset with a new client.

        :return: the first offset of the batch if the batch cannot be decoded, otherwise None.
        :raises SearchCancelled: the search was cancelled.
        """
        while not self.cancelled.is_set():
            # Any error, also an unexpected one such as too many open files, says nothing about the data.
            try:
                client = self._connect()
                try:
                    event = self._first_event(client, offset)
                finally:
                    with suppress(Exception):
                        client.close()
                if event is not None:
                    return self._damaged_base(event)
                problem = f"the broker returns nothing within {PROBE_TIMEOUT:g} s"
            except Exception as error:
                problem = str(error) or repr(error)
            self._report(problem)
            self.cancelled.wait(PROBE_INTERVAL)
        raise SearchCancelled

    def _damaged_base(self, event: Any) -> int | None:
        """Return the first offset of a batch that cannot be decoded; None if the event is not about such a batch.

        :raises confluent_kafka.KafkaException: the event is an error that says nothing about the data.
        """
        error = event.error()
        if error is None or error.code() in (KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET):
            return None
        if error.code() in DAMAGE:
            self._reason = f"{error.name()}: {error.str()}"
            return int(event.offset())
        raise KafkaException(error)

    def _report(self, problem: str) -> None:
        now = time.monotonic()
        if not self.cancelled.is_set() and now - self._reported_at >= REPORT_INTERVAL:
            self._reported_at = now
            logger.error(
                f"{self.partition} waits: the data at offset {self.offset} cannot be decoded ({self._reason}), and"
                f" cannot be fetched again: {problem}; the other partitions are consumed meanwhile"
            )

    def _first_event(self, client: Any, offset: int) -> Any:
        client.assign([TopicPartition(*self.partition, offset)])
        deadline = time.monotonic() + PROBE_TIMEOUT
        while time.monotonic() < deadline and not self.cancelled.is_set():
            if (event := client.poll(PROBE_INTERVAL)) is not None:
                return event
        return None

    def _connect(self) -> Any:
        keywords = {} if "logger" in self._options else {"logger": CLIENT_LOGGER}
        return confluent_kafka.Consumer(self._options, **keywords)


class DamagedPartitions:
    """The partitions from which the client does not fetch, because a search for the end of damaged data runs.

    :param options: the options of the client.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._searches: dict[Partition, DamageSearch] = {}
        self._refetches: dict[Partition, tuple[int, int]] = {}

    @property
    def partitions(self) -> Set[Partition]:
        """The partitions with damaged data."""
        return self._searches.keys()

    def search(self, partition: Partition, offset: int, error: KafkaError) -> None:
        """Start a search at an offset that was not read, unless a search for this partition runs.

        If the search cannot start, :meth:`take_finished` starts it later.
        """
        if partition not in self._searches:
            self._start(partition, offset, error)

    def take_finished(self, paused: Collection[Partition]) -> list[DamageSearch]:
        """Remove the searches that have ended, except those in paused partitions, and return them.

        Start the searches again that have no result although they do not run.
        """
        ended = [search for search in self._searches.values() if not search.is_alive()]
        for search in ended:
            if not search.has_result:
                self._start(search.partition, search.offset, search.error)
        finished = [search for search in ended if search.has_result and search.partition not in paused]
        for search in finished:
            del self._searches[search.partition]
        return finished

    def _start(self, partition: Partition, offset: int, error: KafkaError) -> None:
        search = self._searches[partition] = DamageSearch(self._options, partition, offset, error)
        # The process may have too many threads.
        with suppress(RuntimeError):
            search.start()

    def must_reconnect(self, search: DamageSearch) -> bool:
        """Return whether searches have found readable data at this offset so often that the connection is suspect."""
        offset, count = self._refetches.get(search.partition, (-1, 0))
        count = count + 1 if offset == search.offset else 1
        self._refetches[search.partition] = (search.offset, count)
        return count > MAX_REFETCHES

    def forget(self, partitions: Collection[Partition]) -> None:
        """Cancel the searches in these partitions."""
        for partition in partitions:
            if (search := self._searches.pop(partition, None)) is not None:
                search.cancelled.set()
