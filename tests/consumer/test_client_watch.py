"""Tests of the watch over the client thread, with a clock that the tests advance."""

from __future__ import annotations

import threading

from kser.consumer.client_watch import ClientWatch, stack_of
from tests.support import Clock, wait_until


class WatchedTurns:
    """A watch with a limit of 40 seconds, which a supervisor checks once per second."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.watch = ClientWatch(40, self.clock)

    def overdue_after(self, seconds: int) -> bool:
        """Check once per second; return the result of the last check."""
        results = []
        for _ in range(seconds):
            self.clock.advance(1)
            results.append(self.watch.is_overdue())
        return results[-1]


def test_turn_is_overdue_at_its_limit() -> None:
    turns = WatchedTurns()
    turns.watch.beat()
    assert not turns.overdue_after(40)
    assert turns.overdue_after(1)


def test_each_beat_begins_a_new_turn() -> None:
    turns = WatchedTurns()
    for _ in range(5):
        turns.watch.beat()
        assert not turns.overdue_after(30)


def test_thread_that_never_began_a_turn_is_overdue_too() -> None:
    assert WatchedTurns().overdue_after(41)


def test_turn_that_returns_late_is_no_longer_overdue() -> None:
    turns = WatchedTurns()
    assert turns.overdue_after(60)
    turns.watch.beat()
    assert not turns.overdue_after(1)


def test_time_of_a_suspended_process_does_not_count() -> None:
    """A suspended process makes no checks, and its client thread could not return meanwhile."""
    turns = WatchedTurns()
    turns.watch.beat()
    assert not turns.overdue_after(30)
    turns.clock.advance(3600)
    assert not turns.watch.is_overdue()
    assert turns.overdue_after(10)


def test_stack_of_a_thread_names_its_innermost_line() -> None:
    release, started = threading.Event(), threading.Event()

    def block_in_this_function() -> None:
        started.set()
        release.wait()

    thread = threading.Thread(target=block_in_this_function)
    thread.start()
    started.wait()
    wait_until(lambda: "threading.py" in stack_of(thread.ident)[0])
    line, stack = stack_of(thread.ident)
    release.set()
    thread.join()
    assert " in wait: " in line
    assert "block_in_this_function" in stack
    assert stack_of(thread.ident) == ("an unknown place", "")
