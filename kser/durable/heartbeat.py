"""Heartbeat: renews the leases of the claims that the workers of this process hold."""

from __future__ import annotations

import logging
import threading

from kser.durable.context import DurableContext
from kser.durable.periodic import PeriodicThread
from kser.errors import StoreUnavailable
from kser.escaping import escape_lines
from kser.store.base import LeaseRenewer

logger = escape_lines(logging.getLogger(__name__))


class Heartbeat:
    """Heartbeat of a process. While a consumer runs, it has a thread of its own, so that nothing delays it.

    :param context: the durable context of this process.
    """

    def __init__(self, context: DurableContext) -> None:
        self._context = context
        #: Claims that this process has lost, and under which its workers still run steps.
        self._lost_claims: set[tuple[int, int]] = set()
        #: The thread of the heartbeat, which has a database connection of its own.
        self.thread = PeriodicThread("kser-heartbeat", self._beat, context.settings.heartbeat, self._close_renewer)
        # Each thread has its own renewer, because a stopped thread may end after the start of the next one.
        self._own = threading.local()

    def renew_leases(self) -> None:
        """Renew the leases of the claims that workers hold now.

        :raises kser.errors.StoreUnavailable: the database is unavailable.
        """
        context = self._context
        keys = {claim.key for claim in context.active_claims()}
        if not keys:
            return
        renewer: LeaseRenewer | None = getattr(self._own, "renewer", None)
        renew = context.store.direct.renew if renewer is None else renewer.renew
        renewed = context.store.once(renew, keys, context.owner, context.settings.lease)
        lost = {key for key in keys if key[0] not in renewed}
        for root_id, epoch in lost - self._lost_claims:
            claim = context.claim_for(root_id)
            if claim is not None and claim.key == (root_id, epoch):
                logger.warning(
                    f"{claim.label}: the claim was lost; the result of the running task will not be recorded"
                )
        self._lost_claims = lost

    def _beat(self) -> None:
        try:
            if not hasattr(self._own, "renewer"):
                self._own.renewer = self._context.store.lease_renewer(self._context.settings.heartbeat)
            self.renew_leases()
        except StoreUnavailable as error:
            self._context.store.report_outage(error)
        except Exception:
            # No exception may end this thread, because then the leases of all claims would expire. The next heartbeat
            # may succeed.
            logger.exception("unexpected error in the heartbeat; trying again at the next heartbeat")

    def _close_renewer(self) -> None:
        if hasattr(self._own, "renewer"):
            self._own.renewer.close()
