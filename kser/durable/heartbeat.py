"""Heartbeat: renews the leases of the claims that the workers of this process hold."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Final

from kser.durable.context import DurableContext
from kser.durable.periodic import PeriodicThread
from kser.errors import StoreUnavailable
from kser.escaping import escape_lines
from kser.store.base import LeaseRenewer, Renewal

logger = escape_lines(logging.getLogger(__name__))

#: Seconds until the heartbeat tries again to renew leases in locked rows, and after an outage of the database. Both are
#: less than the grace period of :class:`kser.durable.context.DurabilitySettings`: a consumer that has reserved a step
#: does not claim it before its owner has tried again.
LOCK_INTERVAL: Final = 0.1
OUTAGE_INTERVAL: Final = 0.3


class Heartbeat:
    """Heartbeat of a process. While a consumer runs, it has a thread of its own, so that nothing delays it.

    :param context: the durable context of this process.
    """

    def __init__(self, context: DurableContext) -> None:
        self._context = context
        #: Claims that this process has lost, and under which its workers still run steps.
        self._lost_claims: set[tuple[int, int]] = set()
        #: Claims that the last renewal did not renew, because their rows were locked.
        self._locked_claims: set[tuple[int, int]] = set()
        #: The time of the last renewal of all leases, and whether the log says that leases are not renewed.
        self._renewed_at = context.clock()
        self._is_late = False
        #: The thread of the heartbeat, which has a database connection of its own.
        self.thread = PeriodicThread("kser-heartbeat", self._beat, self._close_renewer)
        # Each thread has its own renewer, because a stopped thread may end after the start of the next one.
        self._own = threading.local()

    def renew_leases(self) -> None:
        """Renew the leases of the claims that workers hold now.

        :raises kser.errors.StoreUnavailable: the database is unavailable.
        """
        self._renew({claim.key for claim in self._context.active_claims()})

    def _renew(self, keys: Collection[tuple[int, int]]) -> None:
        self._locked_claims = set()
        if not keys:
            return
        renewal = self._context.store.once(self._call_renew, keys)
        self._locked_claims = {key for key in keys if key[0] in renewal.locked}
        lost = {key for key in keys if key[0] not in renewal.held}
        for root_id, epoch in lost - self._lost_claims:
            claim = self._context.claim_for(root_id)
            if claim is not None and claim.key == (root_id, epoch):
                logger.warning(
                    f"{claim.label}: the claim was lost; the result of the running task will not be recorded"
                )
        self._lost_claims = {*self._lost_claims.difference(keys), *lost}

    def _call_renew(self, keys: Collection[tuple[int, int]]) -> Renewal:
        owner, lease = self._context.owner, self._context.settings.lease
        renewer: LeaseRenewer | None = getattr(self._own, "renewer", None)
        if renewer is None:
            return Renewal(self._context.store.direct.renew(keys, owner, lease), set())
        return renewer.renew(keys, owner, lease)

    def _beat(self) -> float:
        """Renew leases, and return the number of seconds until the next call."""
        heartbeat, started_at = self._context.settings.heartbeat, self._context.clock()
        is_due = started_at - self._renewed_at >= heartbeat or not self._locked_claims
        try:
            if not hasattr(self._own, "renewer"):
                self._own.renewer = self._context.store.lease_renewer(heartbeat)
            self._renew({claim.key for claim in self._context.active_claims()} if is_due else self._locked_claims)
        except StoreUnavailable as error:
            self._report(error)
            return min(OUTAGE_INTERVAL, heartbeat)
        except Exception:
            # No exception may end this thread, because then the leases of all claims would expire. The next heartbeat
            # may succeed.
            logger.exception("unexpected error in the heartbeat; trying again at the next heartbeat")
            return heartbeat
        if is_due:
            self._renewed_at = started_at
            self._report(None)
        return min(LOCK_INTERVAL, heartbeat) if self._locked_claims else heartbeat

    def _report(self, error: StoreUnavailable | None) -> None:
        """Log once that leases are not renewed, and once that they are renewed again.

        :param error: the error of a renewal; None if it succeeded.
        """
        lease, late_by = self._context.settings.lease, self._context.clock() - self._renewed_at
        if error is None:
            if self._is_late:
                logger.info("the leases of the running operations are renewed again")
            self._is_late = False
        elif not self._is_late and late_by > lease / 2:
            self._is_late = True
            logger.error(
                f"the leases of the running operations were not renewed for {late_by:.0f} s, and other consumers take"
                f" the operations over after {lease:g} s: {error.message}"
            )

    def _close_renewer(self) -> None:
        if hasattr(self._own, "renewer"):
            self._own.renewer.close()
