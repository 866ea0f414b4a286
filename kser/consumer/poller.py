"""The thread that owns the Kafka client: it polls, pauses and commits, and runs no user code.

So a task may take hours: the client goes on telling its group that it is there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress

from tenacity import RetryCallState, Retrying, wait_random_exponential

from kser.consumer.client import Commit, ConsumerClient, Listener, Partition, Revocation
from kser.consumer.dispatch import Dispatch
from kser.consumer.options import NEVER
from kser.errors import ClientTrouble, KserError

#: Seconds that a poll waits for records when there is nothing else to do.
POLL_TIMEOUT = 0.5
#: Seconds between two polls while there is no room for records: the client must be seen to live.
KEEP_ALIVE = 1.0
#: Seconds that a poll waits while a message runs whose offset is to be committed at once.
EAGER_POLL = 0.05
#: Seconds that a poll waits while the consumer ends: only its place in the group is kept.
ENDING_POLL = 0.05
#: Seconds that a commit, and that closing the client, may take: a broker that is gone must not hold the end up.
CLIENT_TIMEOUT = 1.2

_BACKOFF = wait_random_exponential(multiplier=0.2, max=10, min=0.1)


class Poller(Listener):
    """Feeds a dispatch from a client, and commits what it says is finished.

    :param connect: makes a client; called again when one has come to its end.
    :param topics: what to consume.
    :param commit: ``"after"``, ``"before"`` or ``"never"``.
    :param interval: seconds between commits; 0 commits as soon as there is something to commit.
    :param stall_timeout: seconds without progress after which lag is reported.
    :param say: the consumer's logger and name.
    """

    def __init__(
        self,
        connect: Callable[[], ConsumerClient],
        topics: Iterable[str],
        dispatch: Dispatch,
        *,
        commit: str,
        interval: float,
        stall_timeout: float,
        say: tuple[logging.Logger, str],
    ) -> None:
        self._connect = connect
        self._topics = topics
        self._dispatch = dispatch
        self._interval = interval
        self._stall_timeout = stall_timeout
        self._logger, self._name = say
        self._clock = dispatch.clock
        #: Set to take no more records for a while.
        self.paused = False
        #: Set to take no more records at all; finished ones are still committed.
        self.ending = False
        self._closing = False
        self._stop = threading.Event()
        self._until = 0.0
        self._troubles = 0
        self._trouble: dict[str, str] = {}
        self._last_commit = self._last_progress = self._clock()
        self._settled = 0
        self._stalled = False
        self._client: ConsumerClient | None = self._subscribed()
        dispatch.cluster = lambda: self._client.cluster if self._client is not None else ""
        self._mode = commit if self._client.can_commit else NEVER

    @property
    def mode(self) -> str:
        """The commit mode in force: without a group nothing can be committed."""
        return self._mode

    # -- its thread ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Take turns until :meth:`stop`, then :meth:`close`."""
        try:
            while not self._stop.is_set():
                self.turn(POLL_TIMEOUT)
        finally:
            self.close()

    def stop(self, until: float) -> None:
        """End after this turn.

        :param until: when to be done, at the latest; as long it is tried to commit what is finished.
        """
        self._until = until
        self._stop.set()

    def turn(self, timeout: float) -> int:
        """Poll once, take in what comes, and commit what is due.

        :param timeout: seconds to wait for records at most.
        :return: how many records were taken in.
        """
        taken = self._guard(lambda: self._take(timeout), timeout)
        self._guard(self.commit_when_due, timeout)
        self._guard(lambda: self._look_for_stall(taken), timeout)
        return taken

    def _guard(self, what: Callable[[], int], timeout: float) -> int:
        """Do something with the client, and survive whatever becomes of it."""
        try:
            return what()
        except ClientTrouble as trouble:
            self._suffer(trouble, timeout)
        except KserError as error:
            self._suffer(ClientTrouble(error.message), timeout)
        except Exception as exc:
            text = f"the Kafka client raised {exc!r}, which it does not announce"
            if text != self._trouble.get("poll"):
                self._logger.exception(f"{self._name}: {text}")
            # Whatever state it is in now: another one takes its place.
            self._suffer(ClientTrouble(text, fatal=True), timeout)
        return 0

    def _take(self, timeout: float) -> int:
        if self._client is None:
            self._client = self._subscribed()
        if self._dispatch.pulse.is_weak:
            self._prove_membership(self._client)
        self._dispatch.pulse.beat()
        limit = self._limit(timeout)
        batches = self._client.poll(self._patience(timeout, limit), limit, self._dispatch.held())
        self._recover()
        return self._dispatch.offer(batches) if batches else 0

    def _limit(self, timeout: float) -> int:
        """How many records to ask for; waits for room, but not longer than the client may go unseen."""
        if self.paused or self.ending:
            return 0
        room = self._dispatch.room()
        enough = self._dispatch.in_flight // 2
        # Few at a time would cost a poll each, and offsets that are to be committed at once could not be meanwhile.
        if timeout and (room <= enough or (not self._interval and self._dispatch.in_flight and self._dispatch.is_busy)):
            wait = min(KEEP_ALIVE, self._until_commit())
            seen = self._dispatch.settled + self._dispatch.begun
            if self._interval:
                self._dispatch.wait_for_room(wait, enough)
            else:
                self._dispatch.wait_for_change(wait, lambda: self._dispatch.settled + self._dispatch.begun != seen)
            room = self._dispatch.room()
        return room

    def _patience(self, timeout: float, limit: int) -> float:
        if self.ending:
            return min(timeout, ENDING_POLL)
        if not limit and not self.paused:
            return 0
        if not self._interval and self._dispatch.in_flight:
            return 0 if self._dispatch.is_busy else min(timeout, EAGER_POLL)
        return min(timeout, max(self._until_commit(), EAGER_POLL)) if self._dispatch.in_flight else timeout

    def _until_commit(self) -> float:
        return max(self._last_commit + self._interval - self._clock(), 0) if self._interval else KEEP_ALIVE

    def lag(self) -> Mapping[Partition, int]:
        """How far each partition's end is ahead of what was taken in; nothing, when the client cannot tell."""
        try:
            return self._client.lag() if self._client else {}
        except ClientTrouble:
            return {}

    def _prove_membership(self, client: ConsumerClient) -> None:
        """Ask the group whether this is still a member: it takes commits of nobody else.

        :raises kser.errors.ClientTrouble: it is not, or cannot be asked.
        """
        known = self._dispatch.known()
        if known and self._mode != NEVER:
            try:
                client.commit(known, CLIENT_TIMEOUT)
            except ClientTrouble:
                # The client finds out by itself, while it is polled.
                self._dispatch.offer(client.poll(ENDING_POLL, 0, ()))
                raise

    # -- commits -------------------------------------------------------------------------------------------------------

    def commit_when_due(self) -> int:
        """Commit what is finished, when the last time is long enough ago; returns for how many partitions."""
        return self.commit() if self._clock() - self._last_commit >= self._interval else 0

    def commit(self) -> int:
        """Commit what is finished; returns for how many partitions."""
        self._last_commit = self._clock()
        commits = {} if self._mode == NEVER else self._dispatch.commits()
        if not commits or self._client is None:
            return 0
        try:
            self._client.commit(commits, CLIENT_TIMEOUT)
        except ClientTrouble as trouble:
            # Not done with: they stay committable, and what is never committed is handed out again.
            self._report("commit", trouble)
            return 0
        self._report("commit", None)
        self._dispatch.committed(commits)
        if not self._interval:
            self._logger.debug(f"{self._name}: Manual commit done.")
        return len(commits)

    # -- partitions come and go ----------------------------------------------------------------------------------------

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        self._dispatch.on_assign(starts)

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        self._dispatch.on_reset(starts)

    def on_revoke(self, partitions: Collection[Partition]) -> Revocation:
        if self._closing:
            # Leaving the group gives partitions up once more: nothing is left to commit, or nobody to take it.
            return self._dispatch.on_revoke(())
        draining = self._dispatch.on_revoke(partitions)
        if self._mode == NEVER:
            draining.commits = dict
        return draining

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self._dispatch.on_lost(partitions)

    # -- the client ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit what is finished, leave the group and let go of the client."""
        self._commit_the_rest()
        client, self._client = self._client, None
        if client is not None:
            self._closing = True
            try:
                client.close(CLIENT_TIMEOUT)
            except Exception:
                self._logger.exception(f"{self._name}: the client was not closed in order")

    def _commit_the_rest(self) -> None:
        """Commit what is finished, and try again as long as there is time: what is not committed is run again."""
        while rest := {} if self._mode == NEVER else self._dispatch.commits():
            self._guard(self.commit, 0)
            done = not self._dispatch.commits() and self._client is not None
            if done:
                return
            if self._client is None or self._clock() >= self._until:
                places = ", ".join(f"{key} up to offset {commit.offset}" for key, commit in rest.items())
                self._logger.warning(f"{self._name}: what is done could not be committed and comes again: {places}")
                return
            # The client finds its way back to the group while it is polled.
            self._guard(self._keep_place, 0)
            threading.Event().wait(ENDING_POLL)

    def _keep_place(self) -> int:
        if self._client is not None:
            self._dispatch.offer(self._client.poll(ENDING_POLL, 0, ()))
        return 0

    def _subscribed(self) -> ConsumerClient:
        client = self._connect()
        try:
            client.subscribe(self._topics, self)
        except BaseException:
            client.close(0)
            raise
        return client

    def _suffer(self, trouble: ClientTrouble, timeout: float) -> None:
        """Say what is wrong, and wait a while before the next turn, longer each time."""
        self._report("poll", trouble)
        self._troubles += 1
        if trouble.fatal and self._client is not None:
            client, self._client = self._client, None
            self.on_lost(self._dispatch.assignment)
            with suppress(Exception):
                client.close(0)
        state = RetryCallState(Retrying(), None, (), {})
        state.attempt_number = self._troubles
        self._stop.wait(min(_BACKOFF(state), timeout))

    def _recover(self) -> None:
        if self._troubles:
            self._troubles = 0
            self._report("poll", None)

    def _report(self, activity: str, trouble: ClientTrouble | None) -> None:
        """Log once when the client gets into trouble, when that changes, and when it is out of it."""
        text = trouble.message if trouble else ""
        if text != self._trouble.get(activity, ""):
            self._trouble[activity] = text
            if trouble:
                level = logging.INFO if trouble.passing else logging.ERROR
                self._logger.log(level, f"{self._name}: {text}; trying again")
            else:
                self._logger.info(f"{self._name}: the Kafka client can {activity} again")

    # -- stalls --------------------------------------------------------------------------------------------------------

    def _look_for_stall(self, taken: int) -> int:
        """Report once that nothing moves although there is something to do; returns how many partitions wait."""
        settled, now = self._dispatch.settled, self._clock()
        if taken or settled != self._settled or self.paused or self.ending:
            self._settled, self._last_progress, self._stalled = settled, now, False
            return 0
        lag: dict[Partition, int] = {}
        if not self._stalled and now - self._last_progress >= self._stall_timeout:
            self._last_progress = now
            here = self._dispatch.backlog
            lag = {key: count + here.pop(key, 0) for key, count in self.lag().items()}
            lag = {key: count for key, count in {**here, **lag}.items() if count > 0}
            if lag:
                self._stalled = True
                places = ", ".join(f"{key} by {count}" for key, count in sorted(lag.items()))
                self._logger.error(
                    f"{self._name}: nothing was finished for {self._stall_timeout:g} s, and messages wait: {places};"
                    f" {self._running()}"
                )
        return len(lag)

    def _running(self) -> str:
        jobs = self._dispatch.running()
        if not jobs:
            return "no message is being handled: is the group stable, and do dead letters arrive?"
        oldest = min(jobs, key=lambda job: job.taken)
        age = self._clock() - oldest.taken
        return (
            f"{len(jobs)} message(s) are being handled, the longest for {age:.0f} s: offset {oldest.record.offset} of"
            f" {oldest.place}; set TIMEOUT on its class, or more workers"
        )
