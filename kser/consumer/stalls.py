"""Detection of a stalled consumer, which has unfinished records and does not finish any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from kser.consumer.client import Partition
from kser.consumer.logs import ConsumerLogger
from kser.consumer.partition_table import PartitionTable
from kser.consumer.work_queue import WorkQueue


class StallDetector:
    """A detector of stalls. A consumer stalls if it has lag and finishes no record, or if it gets no partitions because
    it is not a member of its group. The detector logs each stall once.

    :param work_queue: the work queue.
    :param partitions: the partition table.
    :param timeout: a consumer with lag counts as stalled if it has finished no record for this number of seconds.
    :param log: the logger of the consumer.
    """

    def __init__(self, work_queue: WorkQueue, partitions: PartitionTable, timeout: float, log: ConsumerLogger) -> None:
        self._work_queue = work_queue
        self._partitions = partitions
        self._timeout = timeout
        self._log = log
        self._last_progress = work_queue.clock()
        self._seen_finished = 0
        self._stalled = False

    def check(
        self,
        no_stall: bool,
        client_lag: Callable[[], Mapping[Partition, int]],
        is_outside: Callable[[], bool],
        waiting: Callable[[], Collection[Partition]] = tuple,
    ) -> int:
        """Log a stall when it begins.

        :param no_stall: True if the consumer cannot stall now: the last poll returned records, or the consumer
            deliberately fetches none, because it is paused or shutting down.
        :param client_lag: returns how many records of each partition are not fetched yet.
        :param is_outside: returns whether the consumer has no partitions and is not a member of its group. A member
            without partitions is a spare, which is no stall.
        :param waiting: returns the partitions that wait because of their data. The client has logged why, so this
            detector names them only beside other partitions.
        :return: the number of partitions with lag if a stall begins now, otherwise 0.
        """
        finished, now = self._work_queue.finished_records, self._work_queue.clock()
        if no_stall or finished != self._seen_finished:
            self._seen_finished, self._last_progress, self._stalled = finished, now, False
            return 0
        if self._stalled or now - self._last_progress < self._timeout:
            return 0
        self._last_progress = now
        backlog = self._partitions.backlog
        lag = {key: count + backlog.pop(key, 0) for key, count in client_lag().items()}
        lag = {key: count for key, count in {**backlog, **lag}.items() if count > 0}
        held = sorted(lag.keys() & set(waiting()))
        if lag.keys() - held:
            self._stalled = True
            partitions = ", ".join(f"{key} by {count}" for key, count in sorted(lag.items()))
            self._log.error(
                f"no message was finished for {self._timeout:g} s, but partitions lag:"
                f" {partitions}; {self._describe_running(now)}{_describe_held(held)}"
            )
        elif not lag and is_outside():
            self._stalled = True
            self._log.error(
                f"the consumer has had no partitions for {self._timeout:g} s, because it is not a member of its group:"
                " see the errors before this line, and check the group with kafka-consumer-groups.sh"
            )
        return len(lag) if self._stalled else 0

    def _describe_running(self, now: float) -> str:
        items = self._work_queue.running()
        if not items:
            return "no message is being handled: check that the group is stable and that dead letters can be written"
        oldest = min(items, key=lambda item: item.attempt.started_at)
        age = now - oldest.attempt.started_at
        return (
            f"{len(items)} message(s) are being handled, the longest for {age:.0f} s: {oldest.place};"
            " set TIME_LIMIT on its class, or add workers"
        )


def _describe_held(held: Collection[Partition]) -> str:
    return f"; {', '.join(map(str, held))} waits because of its data: see the errors before this line" if held else ""
