"""Context of user code during a step: the attempt at the task, and the choice of the next task."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kser.delivery import Attempt, AttemptAbandoned
from kser.retry import Retry

if TYPE_CHECKING:
    from kser.sequencing.task import Task

#: Minimum seconds between two database reads of ``cancel_requested``, for a task that polls it in a loop.
CANCEL_CHECK_INTERVAL = 0.5


class TaskAttempt(Attempt):
    """Attempt at a task of a stored operation.

    :param outer: the attempt at the record whose handling runs the task; None outside of a consumer.
    :param task: the task.
    :param number: number of the attempt, from 1: one more than the recorded attempts.
    :param retry: the retry policy for a class that declares none.
    :param operation_uuid: uuid of the operation that the task belongs to.
    :param is_cancelled: reads from the database whether the task should stop.
    """

    def __init__(
        self,
        outer: Attempt | None,
        task: Any,
        number: int,
        retry: Retry | None,
        operation_uuid: str,
        is_cancelled: Callable[[], bool],
    ) -> None:
        super().__init__(retry)
        self._outer = outer
        self.entry = task
        self.number = number
        self.operation_uuid = operation_uuid
        self._is_cancelled = is_cancelled
        self._checked_at = -CANCEL_CHECK_INTERVAL
        self._cancelled = False

    def on_finished(self, entry: Any) -> None:
        if self._outer is None:
            return
        if entry is self.entry:
            self._outer.resolve()
        self._outer.raise_if_abandoned()

    @property
    def abandoned(self) -> bool:  # type: ignore[override]  # a plain attribute in Attempt
        return self._outer is not None and self._outer.abandoned

    def abandon(self) -> None:
        """Abandon the step and the attempt at the record that it runs in.

        :raises kser.attempt.AttemptAbandoned: always.
        """
        raise AttemptAbandoned

    @property
    def cancel_requested(self) -> bool:  # type: ignore[override]  # a plain attribute in Attempt
        now = time.monotonic()
        if not self._cancelled and now - self._checked_at >= CANCEL_CHECK_INTERVAL:
            self._checked_at = now
            self._cancelled = self._is_cancelled()
        return self._cancelled


class NextTaskChoice:
    """Choice of the next task by an operation's own ``launch_next``. The first choice counts.

    :param uuid: uuid of the operation.
    """

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.is_made = False
        #: The next task; None for the end of the operation.
        self.next_task: Task | None = None
        #: True if the operation fails.
        self.is_failed = False

    def choose(self, next_task: Task | None, is_failed: bool = False) -> None:
        """Choose the next task; None ends the operation."""
        if not self.is_made:
            self.is_made, self.next_task, self.is_failed = True, next_task, is_failed


#: The choice that ``launch_next`` makes in this context; None while no next task is chosen.
current_choice: ContextVar[NextTaskChoice | None] = ContextVar("kser_choice", default=None)
