"""Group commit: what several threads want to write at the same time shares a transaction."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from kser.errors import StoreUnavailable

Item = TypeVar("Item")

#: As many share a transaction at the most.
GROUP_LIMIT: Final = 200


class Entry(Generic[Item]):
    """Something to write, and what came of it.

    :param item: what it is.
    """

    __slots__ = ("error", "item", "leads", "led", "result", "wake")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.result: Any = None
        self.error: BaseException | None = None
        #: Its thread is to run the next group.
        self.leads = False
        #: It has, and handed the lead over.
        self.led = False
        #: Held while its thread waits: the cheapest way to wait that there is.
        self.wake = threading.Lock()


class Group(Generic[Item]):
    """Whoever comes while nobody leads runs everything that has come, its own included; the others wait for it.

    A thread that is alone is never switched from. When a group has ended, one of those that came meanwhile leads the
    next one.

    :param run: writes entries and gives each a result or an error.
    :param leaders: how many groups may be written at the same time.
    """

    def __init__(self, run: Callable[[Sequence[Entry[Item]]], None], leaders: int) -> None:
        self._run = run
        self._leaders = leaders
        self._leading = 0
        self._lock = threading.Lock()
        self._waiting: deque[Entry[Item]] = deque()

    def write(self, item: Item) -> Any:
        """Write something; returns what came of it, or raises that."""
        entry = Entry(item)
        try:
            self._queue(entry)
            if not entry.leads:
                # Released by whoever has written it, or hands the lead over.
                entry.wake.acquire()
            if entry.leads:
                self._lead(entry)
        except BaseException:
            # What is raised in a thread that waits must not keep the others waiting for it.
            self._forsake(entry)
            raise
        if entry.error is not None:
            raise entry.error
        return entry.result

    def _queue(self, entry: Entry[Item]) -> None:
        with self._lock:
            entry.leads = self._leading < self._leaders
            if entry.leads:
                self._leading += 1
            else:
                entry.wake.acquire()
                self._waiting.append(entry)

    def _forsake(self, entry: Entry[Item]) -> None:
        with self._lock:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry.leads and not entry.led:
            self._hand_over()

    def _lead(self, own: Entry[Item]) -> None:
        group = [own]
        try:
            with self._lock:
                waiting = self._waiting
                group += (waiting.popleft() for _ in range(min(len(waiting), GROUP_LIMIT - 1)))
            self._run(group)
        except BaseException as error:
            for entry in group:
                entry.error = StoreUnavailable(f"the thread that wrote for several was stopped: {error!r}")
            raise
        finally:
            own.led = True
            self._hand_over()
            for entry in group:
                if entry is not own:
                    entry.wake.release()

    def _hand_over(self) -> None:
        with self._lock:
            if not self._waiting:
                self._leading -= 1
                return
            following = self._waiting.popleft()
            following.leads = True
        following.wake.release()
