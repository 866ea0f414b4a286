"""The poller: the thread that owns the Kafka client. It polls, pauses and commits, and runs no user code.

So a task may run for hours while the client continues to send heartbeats to its group.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial

from kser.backoff import random_delay
from kser.consumer.client import Commit, ConsumerClient, Partition, RebalanceListener, Revocation
from kser.consumer.options import NEVER
from kser.consumer.work_queue import WorkQueue
from kser.errors import ClientError, KserError

#: Seconds that a poll waits for records if there is no other work.
POLL_TIMEOUT = 0.5
#: Longest time in seconds between two polls while the work queue is full, because the group membership needs polls.
MAX_POLL_GAP = 1.0
#: Seconds that a poll waits while a message runs whose offset must be committed immediately.
BUSY_POLL_TIMEOUT = 0.05
#: Seconds that a poll waits during the shutdown, when polls only serve the group membership.
SHUTDOWN_POLL_TIMEOUT = 0.05
#: Time limit in seconds of a commit and of closing the client, so that an unreachable broker cannot block the shutdown.
CLIENT_TIMEOUT = 1.2

#: Back-off in seconds after a failed poll.
_BACKOFF = partial(random_delay, first=0.2, ceiling=10, lowest=0.1)


class Poller(RebalanceListener):
    """The poll loop: moves records from the client to the work queue and commits the finished ones.

    :param connect: creates a client; called again after a fatal error of the client.
    :param topics: the topics to consume.
    :param work_queue: the work queue.
    :param commit: ``"after"``, ``"before"`` or ``"never"``.
    :param interval: seconds between commits; 0 commits as soon as a record is finished.
    :param stall_timeout: seconds without progress after which lag is logged as an error.
    :param say: the consumer's logger and name.
    """

    def __init__(
        self,
        connect: Callable[[], ConsumerClient],
        topics: Iterable[str],
        work_queue: WorkQueue,
        *,
        commit: str,
        interval: float,
        stall_timeout: float,
        say: tuple[logging.Logger, str],
    ) -> None:
        self._connect = connect
        self._topics = topics
        self._work_queue = work_queue
        self._interval = interval
        self._stall_timeout = stall_timeout
        self._logger, self._name = say
        self._clock = work_queue.clock
        #: True while fetching is paused.
        self.paused = False
        #: True during a shutdown: no records are fetched, but finished records are still committed.
        self.shutting_down = False
        self._closing = False
        self._stop = threading.Event()
        self._deadline = 0.0
        self._error_count = 0
        self._errors: dict[str, str] = {}
        self._last_commit = self._last_progress = self._clock()
        self._seen_finished = 0
        self._stalled = False
        self._client: ConsumerClient | None = self._connect_and_subscribe()
        work_queue.cluster = lambda: self._client.cluster if self._client is not None else ""
        self._mode = commit if self._client.can_commit else NEVER

    @property
    def mode(self) -> str:
        """The effective commit mode, which is ``"never"`` without a group."""
        return self._mode

    # -- the client thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Poll until :meth:`stop` is called, then :meth:`close`."""
        try:
            while not self._stop.is_set():
                self.poll_once(POLL_TIMEOUT)
        finally:
            self.close()

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
        taken = self._guard(lambda: self._fetch(timeout), timeout)
        self._guard(self.commit_when_due, timeout)
        self._guard(lambda: self._check_stall(taken), timeout)
        return taken

    def _guard(self, call: Callable[[], int], timeout: float) -> int:
        """Call a function that uses the client. After an exception, log it, back off and return 0."""
        try:
            return call()
        except ClientError as trouble:
            self._back_off(trouble, timeout)
        except KserError as error:
            self._back_off(ClientError(error.message), timeout)
        except Exception as exc:
            text = f"the Kafka client raised an unexpected error: {exc!r}"
            if text != self._errors.get("poll"):
                self._logger.exception(f"{self._name}: {text}")
            # The state of the client is unknown after an unexpected exception, so replace the client.
            self._back_off(ClientError(text, fatal=True), timeout)
        return 0

    def _fetch(self, timeout: float) -> int:
        if self._client is None:
            self._client = self._connect_and_subscribe()
        if self._work_queue.group_lease.is_expired:
            self._prove_membership(self._client)
        self._work_queue.group_lease.renew()
        limit = self._limit(timeout)
        batches = self._client.poll(self._poll_timeout(timeout, limit), limit, self._work_queue.blocked_partitions())
        self._recover()
        return self._work_queue.put(batches) if batches else 0

    def _limit(self, timeout: float) -> int:
        """Return how many records to fetch; wait for capacity first, but poll in time for the group membership."""
        if self.paused or self.shutting_down:
            return 0
        room = self._work_queue.capacity()
        enough = self._work_queue.in_flight // 2
        # Wait for capacity, because fetching a few records at a time would cost one poll each. With interval 0, wait
        # for a finished record too, because no offset can be committed while a poll blocks.
        if timeout and (
            room <= enough or (not self._interval and self._work_queue.in_flight and self._work_queue.is_busy)
        ):
            wait = min(MAX_POLL_GAP, self._until_commit())
            seen = self._work_queue.finished_count + self._work_queue.started_count
            if self._interval:
                self._work_queue.wait_for_room(wait, enough)
            else:
                self._work_queue.wait_for_change(
                    wait, lambda: self._work_queue.finished_count + self._work_queue.started_count != seen
                )
            room = self._work_queue.capacity()
        return room

    def _poll_timeout(self, timeout: float, limit: int) -> float:
        if self.shutting_down:
            return min(timeout, SHUTDOWN_POLL_TIMEOUT)
        if not limit and not self.paused:
            return 0
        if not self._interval and self._work_queue.in_flight:
            return 0 if self._work_queue.is_busy else min(timeout, BUSY_POLL_TIMEOUT)
        return min(timeout, max(self._until_commit(), BUSY_POLL_TIMEOUT)) if self._work_queue.in_flight else timeout

    def _until_commit(self) -> float:
        return max(self._last_commit + self._interval - self._clock(), 0) if self._interval else MAX_POLL_GAP

    def lag(self) -> Mapping[Partition, int]:
        """Return how many records of each partition are not fetched yet; empty if the client raises an error."""
        try:
            return self._client.lag() if self._client else {}
        except ClientError:
            return {}

    def _prove_membership(self, client: ConsumerClient) -> None:
        """Verify the group membership by repeating the last commit, which a group accepts from its members only.

        :raises kser.errors.ClientError: this client is no member, or the group does not respond.
        """
        known = self._work_queue.committed_offsets()
        if known and self._mode != NEVER:
            try:
                client.commit(known, CLIENT_TIMEOUT)
            except ClientError:
                # The client detects the lost membership by itself, but only during a poll.
                self._work_queue.put(client.poll(SHUTDOWN_POLL_TIMEOUT, 0, ()))
                raise

    # -- commits -------------------------------------------------------------------------------------------------------

    def commit_when_due(self) -> int:
        """Commit finished records if the commit interval has passed; return the number of partitions committed."""
        return self.commit() if self._clock() - self._last_commit >= self._interval else 0

    def commit(self) -> int:
        """Commit finished records; return the number of partitions committed."""
        self._last_commit = self._clock()
        commits = {} if self._mode == NEVER else self._work_queue.commits()
        if not commits or self._client is None:
            return 0
        try:
            self._client.commit(commits, CLIENT_TIMEOUT)
        except ClientError as trouble:
            # The offsets stay pending, so the next commit includes them. Uncommitted records will be redelivered.
            self._report("commit", trouble)
            return 0
        self._report("commit", None)
        self._work_queue.mark_committed(commits)
        if not self._interval:
            self._logger.debug(f"{self._name}: Manual commit done.")
        return len(commits)

    # -- rebalances ----------------------------------------------------------------------------------------------------

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        self._work_queue.on_assign(starts)

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        self._work_queue.on_reset(starts)

    def on_revoke(self, partitions: Collection[Partition]) -> Revocation:
        if self._closing:
            # Leaving the group revokes the partitions, but the final commit has already succeeded or failed for good.
            # So return an empty revocation, which commits nothing.
            return self._work_queue.on_revoke(())
        draining = self._work_queue.on_revoke(partitions)
        if self._mode == NEVER:
            draining.commits = dict
        return draining

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self._work_queue.on_lost(partitions)

    # -- the client ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit finished records, leave the group and close the client."""
        self._final_commit()
        client, self._client = self._client, None
        if client is not None:
            self._closing = True
            try:
                client.close(CLIENT_TIMEOUT)
            except Exception:
                self._logger.exception(f"{self._name}: the Kafka client could not be closed cleanly")

    def _final_commit(self) -> None:
        """Commit finished records and retry until the deadline, because uncommitted records will run again."""
        while rest := {} if self._mode == NEVER else self._work_queue.commits():
            self._guard(self.commit, 0)
            done = not self._work_queue.commits() and self._client is not None
            if done:
                return
            if self._client is None or self._clock() >= self._deadline:
                places = ", ".join(f"{key} up to offset {commit.offset}" for key, commit in rest.items())
                self._logger.warning(
                    f"{self._name}: finished messages could not be committed and will be redelivered: {places}"
                )
                return
            # A client that lost its membership rejoins the group only during a poll.
            self._guard(self._stay_in_group, 0)
            threading.Event().wait(SHUTDOWN_POLL_TIMEOUT)

    def _stay_in_group(self) -> int:
        if self._client is not None:
            self._work_queue.put(self._client.poll(SHUTDOWN_POLL_TIMEOUT, 0, ()))
        return 0

    def _connect_and_subscribe(self) -> ConsumerClient:
        client = self._connect()
        try:
            client.subscribe(self._topics, self)
        except BaseException:
            client.close(0)
            raise
        return client

    def _back_off(self, error: ClientError, timeout: float) -> None:
        """Log the error, replace the client after a fatal one, and back off exponentially before the next poll."""
        self._report("poll", error)
        self._error_count += 1
        if error.fatal and self._client is not None:
            client, self._client = self._client, None
            self.on_lost(self._work_queue.assignment)
            with suppress(Exception):
                client.close(0)
        self._stop.wait(min(_BACKOFF(self._error_count), timeout))

    def _recover(self) -> None:
        if self._error_count:
            self._error_count = 0
            self._report("poll", None)

    def _report(self, activity: str, error: ClientError | None) -> None:
        """Log an error of the client once, each change of the error, and the recovery."""
        text = error.message if error else ""
        if text != self._errors.get(activity, ""):
            self._errors[activity] = text
            if error:
                level = logging.INFO if error.transient else logging.ERROR
                self._logger.log(level, f"{self._name}: {text}; trying again")
            else:
                self._logger.info(f"{self._name}: the Kafka client can {activity} again")

    # -- stalls --------------------------------------------------------------------------------------------------------

    def _check_stall(self, taken: int) -> int:
        """Log a stall once: lag without progress. Return the number of stalled partitions."""
        settled, now = self._work_queue.finished_count, self._clock()
        if taken or settled != self._seen_finished or self.paused or self.shutting_down:
            self._seen_finished, self._last_progress, self._stalled = settled, now, False
            return 0
        lag: dict[Partition, int] = {}
        if not self._stalled and now - self._last_progress >= self._stall_timeout:
            self._last_progress = now
            here = self._work_queue.backlog
            lag = {key: count + here.pop(key, 0) for key, count in self.lag().items()}
            lag = {key: count for key, count in {**here, **lag}.items() if count > 0}
            if lag:
                self._stalled = True
                places = ", ".join(f"{key} by {count}" for key, count in sorted(lag.items()))
                self._logger.error(
                    f"{self._name}: no message was finished for {self._stall_timeout:g} s, but partitions lag:"
                    f" {places}; {self._describe_running()}"
                )
        return len(lag)

    def _describe_running(self) -> str:
        jobs = self._work_queue.running()
        if not jobs:
            return "no message is being handled: check that the group is stable and that dead letters can be written"
        oldest = min(jobs, key=lambda job: job.started_at)
        age = self._clock() - oldest.started_at
        return (
            f"{len(jobs)} message(s) are being handled, the longest for {age:.0f} s: offset {oldest.record.offset} of"
            f" {oldest.partition}; set TIME_LIMIT on its class, or add workers"
        )
