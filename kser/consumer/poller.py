"""The poller: the thread that owns the Kafka client. It polls, pauses and commits, and runs no user code.

User code runs in other threads. So the client remains a member of its group even while a task runs for hours.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

from kser.backoff import random_delay
from kser.connection import FailureLog
from kser.consumer.client import Commit, ConsumerClient, Partition
from kser.consumer.client_watch import ClientWatch
from kser.consumer.logs import ConsumerLogger
from kser.consumer.membership import MembershipProof
from kser.consumer.offsets import has_progress
from kser.consumer.options import NEVER
from kser.consumer.partition_table import PartitionTable
from kser.consumer.stalls import StallDetector
from kser.consumer.work_queue import WorkQueue
from kser.errors import ClientError, ClientFenced, ClientStuck, KserError, SettingError

#: Seconds that a poll waits for records if there is no other work.
POLL_TIMEOUT = 0.5
#: Longest time in seconds between two polls while the work queue is full. The client must poll to stay in its group.
MAX_POLL_GAP = 1.0
#: Seconds that a poll waits while a message runs, if offsets are committed as soon as a message finishes.
BUSY_POLL_TIMEOUT = 0.05
#: Seconds that a poll waits during the shutdown, when polls only keep the group membership alive.
SHUTDOWN_POLL_TIMEOUT = 0.05
#: Time limit in seconds of a commit and of closing the client, so that an unreachable broker cannot block the shutdown.
CLIENT_TIMEOUT = 1.2

#: Back-off in seconds after a failed poll.
_BACKOFF = partial(random_delay, first=0.2, ceiling=10, lowest=0.1)


class Poller:
    """The poll loop, which moves records from the client to the work queue and commits finished records.

    :param connect: creates a client; the poller calls it again after a fatal error of the client.
    :param topics: the topics to consume.
    :param work_queue: the work queue.
    :param partitions: the partition table.
    :param commit: ``"after"``, ``"before"`` or ``"never"``.
    :param interval: seconds between commits; 0 commits as soon as a record is finished.
    :param stall_timeout: the poller logs lag as an error if no record was finished for this number of seconds.
    :param watch: the watch over the turns of the client thread.
    :param log: the logger of the consumer.
    """

    def __init__(
        self,
        connect: Callable[[], ConsumerClient],
        topics: Iterable[str],
        work_queue: WorkQueue,
        partitions: PartitionTable,
        *,
        commit: str,
        interval: float,
        stall_timeout: float,
        watch: ClientWatch,
        log: ConsumerLogger,
    ) -> None:
        self._connect = connect
        self._topics = topics
        self._work_queue = work_queue
        self._partitions = partitions
        self._interval = interval
        self._log = log
        self._watch = watch
        self._stalls = StallDetector(work_queue, partitions, stall_timeout, log)
        #: True while fetching is paused.
        self.paused = False
        #: True during a shutdown: no records are fetched, but finished records are still committed.
        self.shutting_down = False
        #: The error that ends the consumer; None while it works. The poller then fetches and commits nothing more.
        self.final_error: KserError | None = None
        #: The partitions from which the client does not fetch because of their data, and the logged reasons.
        self.waiting: Mapping[Partition, str] = {}
        self._stop = threading.Event()
        self._deadline = 0.0
        self._error_count = 0
        self._failures = {activity: FailureLog(work_queue.clock) for activity in ("poll", "commit")}
        self._membership = MembershipProof(partitions, work_queue.clock)
        self._last_commit = work_queue.clock()
        self._client: ConsumerClient | None = self._connect_and_subscribe()
        #: The effective commit mode, which is ``"never"`` without a group.
        self.mode = commit if self._client.can_commit else NEVER
        partitions.commit_enabled = self.mode != NEVER

    def cluster(self) -> str:
        """Return the id of the Kafka cluster, or "" if the id is unknown or no client exists.

        Any thread may call this method.
        """
        client = self._client
        return "" if client is None else client.cluster

    # -- the client thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Poll until :meth:`stop` is called, and then call :meth:`close`.

        After a final error, only wait, because attempts still run, and the consumer logs at its end which of their
        messages will run again.
        """
        death: ClientStuck | None = None
        try:
            while not self._stop.is_set():
                if self.final_error is None:
                    self.poll_once(POLL_TIMEOUT)
                else:
                    self._watch.beat()
                    self._stop.wait(POLL_TIMEOUT)
        except:  # noqa: E722  a client library written in C can raise objects that are no BaseException
            error = sys.exc_info()[1]
            self._log.exception(f"the Kafka client thread has died: {error!r}")
            death = ClientStuck(f"the Kafka client thread has died of {error!r}; see the log")
        self.close()
        self.final_error = self.final_error or death

    def stop(self, deadline: float) -> None:
        """Stop the loop after the current poll.

        :param deadline: the deadline for retrying the final commit, by the clock of the work queue.
        """
        self._deadline = deadline
        self._stop.set()

    def poll_once(self, timeout: float) -> int:
        """Poll once, queue the received records and commit if a commit is due.

        :param timeout: the longest time in seconds to wait for records.
        :return: the number of records queued.
        """
        queued = self._guard(lambda: self._fetch(timeout), timeout)
        self._guard(self.commit_when_due, timeout)
        self._guard(
            lambda: self._stalls.check(
                bool(queued) or self.paused or self.shutting_down,
                self.lag,
                lambda: self._membership.is_outside(self._client),
                lambda: self.waiting,
            ),
            timeout,
        )
        return queued

    def _guard(self, call: Callable[[], int], timeout: float) -> int:
        """Call a function that uses the client. If it raises an exception, log the exception, back off and return 0.

        After a final error, no call is made.
        """
        self._watch.beat()
        if self.final_error is not None:
            return 0
        try:
            return call()
        except (ClientFenced, SettingError) as error:
            self._end(error)
        except ClientError as error:
            self._back_off(error, timeout)
        except KserError as error:
            self._back_off(ClientError(error.message), timeout)
        except Exception as exc:
            # The state of the client is unknown after an unexpected exception, so a new client must replace it.
            text = f"the Kafka client raised an unexpected error: {exc!r}"
            unexpected = ClientError(text, kind=f"unexpected: {type(exc).__name__}", fatal=True)
            if self._failures["poll"].is_due(unexpected.kind):
                self._log.exception(text)
            self._back_off(unexpected, timeout)
        return 0

    def _fetch(self, timeout: float) -> int:
        if self._client is None:
            if (wait := self._membership.seconds_to_connect) > 0:
                self._stop.wait(min(wait, timeout))
                return 0
            self._client = self._connect_and_subscribe()
        if self._work_queue.group_lease.is_expired:
            try:
                self._membership.commit_again(self._client)
            except ClientError:
                # The client detects only during a poll that it has lost its membership, so poll once.
                self._stay_in_group()
                raise
        self._work_queue.group_lease.renew()
        limit = self._limit(timeout)
        batches = self._client.poll(self._poll_timeout(timeout, limit), limit, self._partitions.blocked_partitions())
        self.waiting = self._client.waiting()
        self._error_count = 0
        # A poll without an error proves nothing, because the client may be waiting for its group without end.
        if self._failures["poll"].is_failing and self._membership.is_given(self._client, bool(batches)):
            self._report("poll", None)
        commit = partial(self.commit, on_fetch=True)
        queued = self._partitions.put(batches, commit) if batches else 0
        if self._partitions.is_holding and not self.paused and not self.shutting_down:
            queued += self._partitions.start_isolated(commit)
        return queued

    def _limit(self, timeout: float) -> int:
        """Return how many records to fetch.

        Wait for capacity of the work queue first, but at most ``MAX_POLL_GAP`` seconds, so that the client polls often
        enough to stay in its group.
        """
        if self.paused or self.shutting_down:
            return 0
        room = self._work_queue.capacity()
        in_flight = self._work_queue.in_flight
        enough = in_flight // 2
        # Wait for capacity, because otherwise each poll would fetch only a few records. With ``interval`` 0, each
        # record is committed as soon as it finishes (with ``commit="before"``, as soon as it starts), and no commit is
        # possible while a poll blocks. So, with ``interval`` 0, wait also while all workers are busy, until a record
        # starts or finishes.
        if timeout and (room <= enough or (not self._interval and in_flight and self._work_queue.is_busy)):
            wait = min(MAX_POLL_GAP, self._until_commit())
            seen = self._work_queue.finished_count + self._work_queue.started_count
            if self._interval:
                self._work_queue.wait_for_room(wait, enough)
            else:
                self._work_queue.waiters.wait(
                    lambda: self._work_queue.finished_count + self._work_queue.started_count != seen, wait
                )
            room = self._work_queue.capacity()
        return room

    def _poll_timeout(self, timeout: float, limit: int) -> float:
        if self.shutting_down:
            return min(timeout, SHUTDOWN_POLL_TIMEOUT)
        if not limit and not self.paused:
            return 0
        if self._partitions.is_holding:
            timeout = min(timeout, BUSY_POLL_TIMEOUT)
        in_flight = self._work_queue.in_flight
        if not self._interval and in_flight:
            return 0 if self._work_queue.is_busy else min(timeout, BUSY_POLL_TIMEOUT)
        return min(timeout, max(self._until_commit(), BUSY_POLL_TIMEOUT)) if in_flight else timeout

    def _until_commit(self) -> float:
        return max(self._last_commit + self._interval - self._work_queue.clock(), 0) if self._interval else MAX_POLL_GAP

    def lag(self) -> Mapping[Partition, int]:
        """Return the number of records of each partition that are not fetched yet.

        If the client raises an error, the result is empty.
        """
        try:
            return self._client.lag() if self._client else {}
        except ClientError:
            return {}

    # -- commits -------------------------------------------------------------------------------------------------------

    def commit_when_due(self) -> int:
        """Commit finished records if the commit interval has passed; return the number of partitions committed."""
        if self._work_queue.clock() - self._last_commit < self._interval and not self._partitions.has_due_start:
            return 0
        if self._client is not None:
            # All fetched records are queued now, so the fetch positions are not above a record that is not queued.
            self._partitions.advance(self._client.positions())
        return self.commit()

    def commit(self, *, on_fetch: bool = False) -> int:
        """Commit finished records; return the number of partitions committed.

        :param on_fetch: True for a commit before fetched records start, which is independent of the interval.
        """
        if not on_fetch:
            self._last_commit = self._work_queue.clock()
        commits = self._partitions.commits()
        if not commits or self._client is None:
            return 0
        try:
            self._client.commit(commits, CLIENT_TIMEOUT)
        except (ClientFenced, SettingError):
            raise
        except ClientError as error:
            # The offsets stay pending, so the next commit includes them. If the consumer crashes before the next commit
            # succeeds, Kafka redelivers the records.
            self._report("commit", error)
            return 0
        self._report("commit", None)
        self._partitions.mark_committed(commits)
        if not self._interval and not on_fetch:
            self._log.debug("Manual commit done.")
        return len(commits)

    # -- the client ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit finished records, leave the group and close the client."""
        self._watch.beat()
        self._final_commit()
        client, self._client = self._client, None
        if client is not None:
            self._partitions.close()
            try:
                client.close(CLIENT_TIMEOUT)
            except Exception:
                self._log.exception("the Kafka client could not be closed cleanly")

    def _final_commit(self) -> None:
        """Commit finished records and retry until the deadline, because uncommitted records will run again."""
        self._partitions.end_starts()
        while rest := self._partitions.commits():
            self._guard(self.commit, 0)
            done = not self._partitions.commits() and self._client is not None
            if done:
                return
            is_final = self.final_error is not None or self._client is None
            if is_final or self._work_queue.clock() >= self._deadline:
                committed = self._partitions.committed_offsets()
                unsaved = {key: commit for key, commit in rest.items() if has_progress(commit, committed.get(key))}
                if unsaved:
                    self._log.warning(redelivery_text(unsaved))
                return
            # A client that lost its membership rejoins the group only during a poll.
            self._guard(self._stay_in_group, 0)
            threading.Event().wait(SHUTDOWN_POLL_TIMEOUT)

    def _stay_in_group(self) -> int:
        if self._client is not None:
            self._partitions.put(self._client.poll(SHUTDOWN_POLL_TIMEOUT, 0, ()))
        return 0

    def _connect_and_subscribe(self) -> ConsumerClient:
        client = self._connect()
        client.progress = self._watch.beat
        try:
            client.subscribe(self._topics, self._partitions)
        except BaseException:
            client.close(0)
            raise
        return client

    def _back_off(self, error: ClientError, timeout: float) -> None:
        """Log the error, discard the client after a fatal error, and back off exponentially before the next poll."""
        self._report("poll", error)
        self._error_count += 1
        if self._client is None or error.fatal:
            self._membership.note_discarded()
        if error.fatal and self._client is not None:
            client, self._client = self._client, None
            self._partitions.on_lost(self._partitions.assignment)
            with suppress(Exception):
                client.close(0)
        self._stop.wait(min(_BACKOFF(self._error_count), timeout))

    def _end(self, error: KserError) -> None:
        """End the consumer because of a final error: start no more attempts, and log which messages will run again."""
        self.final_error = error
        self._log.error(f"{error.message}; the consumer ends")
        self._work_queue.close()
        running = ", ".join(
            f"offset {item.record.offset} of {item.partition}"
            for item in self._work_queue.running()
            if not item.attempt.acked and not item.tracker.is_committed(item.record.offset)
        )
        if running:
            self._log.warning(f"messages still run, and will run again, because they cannot be committed: {running}")

    def _report(self, activity: str, error: ClientError | None) -> None:
        """Log each kind of client error once and then every ten minutes, and log the recovery."""
        failures = self._failures[activity]
        if error is None:
            if failures.succeed():
                self._log.info(f"the Kafka client can {activity} again")
        elif failures.is_due(error.kind):
            level = logging.INFO if error.transient else logging.ERROR
            self._log.log(level, f"{error.message}; trying again")


def redelivery_text(rest: Mapping[Partition, Commit]) -> str:
    """Return the text of a log line about finished records that could not be committed.

    :param rest: the offsets that should have been committed.
    """
    partitions = ", ".join(f"{key} up to offset {commit.offset}" for key, commit in rest.items())
    return f"finished messages could not be committed and will be redelivered: {partitions}"
