"""Leader/follower group commit: concurrent writes of several threads share a transaction."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from kser.errors import StoreUnavailable

Item = TypeVar("Item")

#: Maximum number of writes in one group.
GROUP_LIMIT: Final = 200


class PendingWrite(Generic[Item]):
    """An item to write, with its result or error.

    :param item: the item to write.
    """

    __slots__ = ("error", "has_led", "is_leader", "item", "result", "wake")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.result: Any = None
        self.error: BaseException | None = None
        #: True once the thread of this entry is a leader, that is, it writes a group of entries.
        self.is_leader = False
        #: True once the thread of this entry has written its group as a leader.
        self.has_led = False
        #: The thread of this entry waits until another thread releases this lock. A bare lock is faster than a
        #: condition or an event.
        self.wake = threading.Lock()


class GroupCommit(Generic[Item]):
    """Leader/follower group commit.

    Each thread has an *entry*, a :class:`PendingWrite` with the item to write. A thread becomes a leader if there are
    fewer than ``leaders`` leaders; otherwise, it puts its entry into a queue. A leader writes its own entry and the
    queued entries as one group. A thread that is not a leader blocks until a leader has written its entry, or until it
    becomes a leader itself. After a leader has written its group, the thread of the oldest entry that is in the queue
    by then becomes the next leader. If only one thread writes, this thread is always the leader, so there is no thread
    switch.

    :param run: function that writes a group of entries, and sets a result or an error on each entry.
    :param leaders: maximum number of groups that are written at the same time.
    """

    def __init__(self, run: Callable[[Sequence[PendingWrite[Item]]], None], leaders: int) -> None:
        self._run = run
        self._leaders = leaders
        self._leading = 0
        self._lock = threading.Lock()
        self._waiting: deque[PendingWrite[Item]] = deque()

    def write(self, item: Item) -> Any:
        """Write an item together with other items, and return the result of this write or raise its error."""
        entry = PendingWrite(item)
        try:
            self._queue(entry)
            if not entry.is_leader:
                # The call blocks until a leader has written this entry or hands the lead over to this thread.
                entry.wake.acquire()
            if entry.is_leader:
                self._lead(entry)
        except BaseException:
            # An exception in this thread, such as KeyboardInterrupt during the wait, must not block the other threads.
            # So remove the entry from the queue and hand the lead over.
            self._abandon(entry)
            raise
        if entry.error is not None:
            raise entry.error
        return entry.result

    def _queue(self, entry: PendingWrite[Item]) -> None:
        with self._lock:
            entry.is_leader = self._leading < self._leaders
            if entry.is_leader:
                self._leading += 1
            else:
                entry.wake.acquire()
                self._waiting.append(entry)

    def _abandon(self, entry: PendingWrite[Item]) -> None:
        with self._lock:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry.is_leader and not entry.has_led:
            self._hand_over()

    def _lead(self, own: PendingWrite[Item]) -> None:
        group = [own]
        try:
            with self._lock:
                waiting = self._waiting
                group += (waiting.popleft() for _ in range(min(len(waiting), GROUP_LIMIT - 1)))
            self._run(group)
        except BaseException as error:
            for entry in group:
                entry.error = StoreUnavailable(f"the thread that wrote this group commit was interrupted: {error!r}")
            raise
        finally:
            own.has_led = True
            self._hand_over()
            for entry in group:
                if entry is not own:
                    entry.wake.release()

    def _hand_over(self) -> None:
        with self._lock:
            if not self._waiting:
                self._leading -= 1
                return
            successor = self._waiting.popleft()
            successor.is_leader = True
        successor.wake.release()
