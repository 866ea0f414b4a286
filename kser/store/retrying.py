"""RetryingStore: a store that repeats each call during an outage of the database."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

from kser.attempt import current_attempt
from kser.backoff import random_delay
from kser.errors import StateConflict, StoreUnavailable
from kser.escaping import escape_lines
from kser.store.base import LeaseRenewer, Store
from kser.store.model import (
    MAX_SENDS,
    UNKNOWN_AFTER,
    Checkpoint,
    Claim,
    ClaimRefused,
    ClaimRequest,
    DueStep,
    NewOperation,
    OperationQuery,
    OperationRow,
    OperationSnapshot,
    Page,
    TakeoverQuery,
    TaskRow,
)

logger = escape_lines(logging.getLogger(__name__))

P = ParamSpec("P")
T = TypeVar("T")

#: Back-off in seconds between two tries of a call. It is at most 2 s, so that operations continue soon after an outage.
_BACKOFF = partial(random_delay, first=0.1, ceiling=2, lowest=0.05)

#: Seconds between two checks during a back-off. Each check tests whether the consumer is shutting down.
_CHECK_INTERVAL = 0.1

#: The calls that write nothing, or only if they find something to write. A database may be locked or read-only, so they
#: do not prove that it accepts writes again.
READS = frozenset(
    {
        *("check", "find", "get_children", "get_operation", "get_task", "get_tasks", "get_topics", "snapshot"),
        *("reserve_due_steps", "take_due_steps"),
    }
)

#: Maximum number of tries of a call outside of a consumer. If the last try fails, the caller gets the error.
ATTEMPTS = 3


class RetryingStore(Store):
    """Store that repeats each call to another store during an outage, until the database works again.

    In a consumer, the store repeats a call without a limit, until a shutdown of the consumer abandons the attempt at
    the record; the call then raises :class:`kser.attempt.AttemptAbandoned`. Outside of a consumer, the caller gets
    :class:`kser.errors.StoreUnavailable` after :data:`ATTEMPTS` tries. The store logs the start of an outage once, and
    the end of the outage once.

    :param store: the store to call.
    """

    def __init__(self, store: Store) -> None:
        #: The wrapped store, for calls that must be made only once and must not log an outage.
        self.direct = store
        self.name = store.name
        self._lock = threading.Lock()
        self._outage = ""
        # True if the call that failed last in this thread, or the call that reported the outage, was a write.
        self._failed = threading.local()
        self._outage_of_writes = False

    def check(self) -> None:
        self._retry(self.direct.check)

    def save(self, operation: NewOperation, request: ClaimRequest | None = None) -> Claim | ClaimRefused | int:
        return self._retry(self.direct.save, operation, request)

    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Claim | ClaimRefused | None:
        return self._retry(self.direct.claim, uuid, step, request)

    def get_operation(self, uuid: str) -> OperationRow | None:
        return self._retry(self.direct.get_operation, uuid)

    def get_tasks(self, operation_id: int) -> Sequence[TaskRow]:
        return self._retry(self.direct.get_tasks, operation_id)

    def get_task(self, operation_id: int, position: int) -> TaskRow | None:
        return self._retry(self.direct.get_task, operation_id, position)

    def get_children(self, root_id: int) -> Sequence[OperationRow]:
        return self._retry(self.direct.get_children, root_id)

    def checkpoint(self, checkpoint: Checkpoint) -> str:
        return self._retry(self.direct.checkpoint, checkpoint)

    def renew(self, claims: Iterable[tuple[int, int]], owner: str, lease: float) -> set[int]:
        return self._retry(self.direct.renew, list(claims), owner, lease)

    def lease_renewer(self, timeout: float) -> LeaseRenewer:
        return self.direct.lease_renewer(timeout)

    def get_topics(self) -> Sequence[str]:
        return self._retry(self.direct.get_topics)

    def reserve_due_steps(self, query: TakeoverQuery, reservation: float) -> Sequence[DueStep]:
        return self._retry(self.direct.reserve_due_steps, query, reservation)

    def reserve_step(self, row: OperationRow, reservation: float) -> DueStep | None:
        return self._retry(self.direct.reserve_step, row, reservation)

    def return_reservations(self, steps: Iterable[DueStep]) -> None:
        self._retry(self.direct.return_reservations, list(steps))

    def postpone_takeover(self, steps: Iterable[DueStep], wait: float) -> None:
        self._retry(self.direct.postpone_takeover, list(steps), wait)

    def take_due_steps(
        self,
        limit: int,
        consumer: str,
        *,
        expired: bool,
        max_sends: int = MAX_SENDS,
        unknown_after: float = UNKNOWN_AFTER,
    ) -> Sequence[DueStep]:
        return self._retry(
            self.direct.take_due_steps,
            limit,
            consumer,
            expired=expired,
            max_sends=max_sends,
            unknown_after=unknown_after,
        )

    def mark_sent(self, steps: Iterable[tuple[int, int]], resend_after: float, lease: float) -> None:
        self._retry(self.direct.mark_sent, list(steps), resend_after, lease)

    def postpone_send(self, steps: Iterable[tuple[int, int]], wait: float) -> None:
        self._retry(self.direct.postpone_send, list(steps), wait)

    def refuse_class(self, uuid: str, step: str) -> OperationRow | None:
        return self._retry(self.direct.refuse_class, uuid, step)

    def cancel(self, uuid: str, reason: str | None) -> OperationRow | None:
        return self._retry(self.direct.cancel, uuid, reason)

    def resume(self, uuid: str, epoch: int, token: str) -> OperationRow | None:
        reply_lost = False

        def resume() -> OperationRow | None:
            nonlocal reply_lost
            try:
                return self.direct.resume(uuid, epoch, token)
            except StoreUnavailable:
                reply_lost = True
                raise
            except StateConflict:
                # The first call may have taken effect although its reply was lost, and a consumer may have claimed the
                # operation before the second call. The claim replaced the token of the resume, so the store does not
                # recognise the second call, and raises StateConflict. In this case, the resume and the claim have
                # increased the epoch by at least 2, so return the row as the result of the resume.
                row = self.direct.get_operation(uuid) if reply_lost else None
                if row is None or row.epoch <= epoch + 1:
                    raise
                return row

        return self._retry(resume)

    def snapshot(self, uuid: str) -> OperationSnapshot | None:
        return self._retry(self.direct.snapshot, uuid)

    def find(self, query: OperationQuery, limit: int, after: str | None = None) -> Page:
        return self._retry(self.direct.find, query, limit, after)

    def purge(self, older_than: float, status: Collection[str], limit: int) -> int:
        return self._retry(self.direct.purge, older_than, status, limit)

    def close(self) -> None:
        self.direct.close()

    # -- outages -------------------------------------------------------------------------------------------------------

    def once(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call to :attr:`direct` once and return its result. If the call shows that an outage has ended, log
        this.

        :raises kser.errors.StoreUnavailable: the database is unavailable.
        """
        # Read ``_outage`` before the call, because a call that started before an outage does not prove that the
        # database works again.
        was_away, is_write = bool(self._outage), getattr(call, "__name__", "") not in READS
        try:
            result = call(*args, **kwargs)
        except StoreUnavailable:
            self._failed.is_write = is_write
            raise
        if was_away and (is_write or not self._outage_of_writes):
            self.report_outage(None)
        return result

    def _retry(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        failures = 0
        while True:
            try:
                return self.once(call, *args, **kwargs)
            except StoreUnavailable as error:
                failures += 1
                if current_attempt.get() is None and failures >= ATTEMPTS:
                    raise
                self.report_outage(error)
                _wait_before_retry(_BACKOFF(failures))

    def report_outage(self, error: StoreUnavailable | None) -> None:
        """Log the start of an outage, a different error during the outage, or the end of the outage.

        :param error: the error of a failed call; None if the database works again.
        """
        text = "" if error is None else error.message
        if text == self._outage:
            return
        with self._lock:
            before, self._outage = self._outage, text
            self._outage_of_writes = bool(text) and getattr(self._failed, "is_write", False)
        if text and not before:
            logger.error(f"Store: {text}; work in flight waits, and the call is retried")
        elif text and text != before:
            logger.warning(f"Store: {text}; the database is still unavailable")
        elif before and not text:
            logger.info("Store: the database works again")


def _wait_before_retry(seconds: float) -> None:
    attempt = current_attempt.get()
    never = threading.Event()
    while seconds > 0:
        if attempt is not None and (attempt.abandoned or (attempt.shutting_down and not attempt.acked)):
            attempt.abandon()
        never.wait(min(_CHECK_INTERVAL, seconds))
        seconds -= _CHECK_INTERVAL
