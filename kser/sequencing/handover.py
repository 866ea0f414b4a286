"""What a stored operation and the code of users tell each other while a step runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kser.delivery import Abandoned, Delivery
from kser.retry import Retry

if TYPE_CHECKING:
    from kser.sequencing.task import Task

#: Seconds between two looks into the database for a task that asks again and again whether to end.
CANCEL_TICK = 0.5


class StepDelivery(Delivery):
    """An attempt at a task of a stored operation.

    :param outer: the attempt at the message that the task is run for; None outside of a consumer.
    :param task: the task.
    :param number: of the attempt, from 1: the recorded ones before it count.
    :param retry: the policy for a class that declares none.
    :param operation_uuid: the operation that the task belongs to.
    :param is_cancelled: looks into the database.
    """

    def __init__(
        self,
        outer: Delivery | None,
        task: Any,
        number: int,
        retry: Retry | None,
        operation_uuid: str,
        is_cancelled: Callable[[], bool],
    ) -> None:
        super().__init__(retry)
        self._outer = outer
        self.entry = task
        self.attempt = number
        self.operation_uuid = operation_uuid
        self._is_cancelled = is_cancelled
        self._looked_at = -CANCEL_TICK
        self._cancelled = False

    def settle(self, entry: Any) -> None:
        if self._outer is None:
            return
        if entry is self.entry:
            self._outer.decide()
        self._outer.check()

    @property
    def abandoned(self) -> bool:  # type: ignore[override]  # an attribute of other deliveries
        return self._outer is not None and self._outer.abandoned

    def hand_back(self) -> None:
        """Give up the step with the message that it is run for.

        :raises Abandoned: always.
        """
        raise Abandoned

    @property
    def cancel_requested(self) -> bool:  # type: ignore[override]  # an attribute of other deliveries
        now = time.monotonic()
        if not self._cancelled and now - self._looked_at >= CANCEL_TICK:
            self._looked_at = now
            self._cancelled = self._is_cancelled()
        return self._cancelled


class Choice:
    """What an operation's own ``launch_next`` chooses to follow a task. The first choice counts.

    :param uuid: the operation's.
    """

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.made = False
        #: The task that follows; None for the end.
        self.following: Task | None = None
        #: The operation is to fail.
        self.failed = False

    def make(self, following: Task | None, failed: bool = False) -> None:
        """Let ``following`` be the next task, or end the operation."""
        if not self.made:
            self.made, self.following, self.failed = True, following, failed


#: The choice that is to be made in this context.
CHOICE: ContextVar[Choice | None] = ContextVar("kser_choice", default=None)
