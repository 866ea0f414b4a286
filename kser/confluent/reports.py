"""Delivery reports: librdkafka hands them to whoever polls, and threads that share a producer wait for theirs."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from confluent_kafka import KafkaError

from kser.outgoing import remaining

logger = logging.getLogger(__name__)

#: Seconds that a thread stays in the client, where no signal reaches it.
SLICE = 0.1
#: Seconds between two looks at what happened while nobody sent.
HOUSEKEEPING = 1.0


def guarded(callback: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A callback of the user's, for whoever happens to poll: what it raises says nothing about what that one sends, and
    must not end the thread that keeps house."""

    def call(told: Any) -> None:
        try:
            callback(told)
        except Exception:
            logger.exception("a callback of the producer's configuration raised")

    return call


class Trouble:
    """What the client had to complain about last."""

    def __init__(self, told: Callable[[Any], Any] | None) -> None:
        self._told = None if told is None else guarded(told)
        self._text = ""
        self._at = 0.0

    def __call__(self, error: Any) -> None:
        """What librdkafka calls, and tells whoever asked for it in the configuration."""
        self.note(error)
        if self._told is not None:
            self._told(error)

    def note(self, error: Any) -> None:
        """Keep a complaint; that nobody is left says less than why."""
        if error.code() not in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT):
            self._text = error.str()
            self._at = time.monotonic()

    def since(self, began: float) -> str:
        """The last complaint, if it was after ``began``, to end a text with."""
        return f" (the client says: {self._text})" if self._text and self._at >= began else ""


class Waiting:
    """What a thread waits for."""

    #: What wakes the thread, once it leaves the polling to another one.
    wake: threading.Event | None = None

    def done(self) -> bool:
        """Whether the wait is over."""
        raise NotImplementedError

    def reported(self) -> None:
        """To be called after each report: wakes the thread when the wait is over."""
        if self.wake is not None and self.done():
            self.wake.set()


class Delivery(Waiting):
    """The report on one record."""

    def __init__(self) -> None:
        self.error: Any = None
        self._arrived = False

    def __call__(self, error: Any, _record: Any) -> None:
        """What librdkafka calls."""
        self.error = error
        self._arrived = True
        self.reported()

    def done(self) -> bool:
        return self._arrived


class Reports:
    """Of the threads that wait for reports, one polls for all; it hands that over when it has its own.

    A thread that polls and waits is as quick as the client is: a thread of the producer's own would add two changes of
    threads to each message. While nobody waits, a thread looks once a second, because the client keeps what it has to
    say (that a broker is gone, say) until somebody asks.

    :param poll: the client's method: takes seconds, and calls back for each report.
    """

    def __init__(self, poll: Callable[[float], Any]) -> None:
        self._poll = poll
        self._mutex = threading.Lock()
        self._led = False
        self._followers: dict[int, Waiting] = {}
        self._busy = 0
        self._closed = threading.Event()
        self._housekeeper = threading.Thread(
            target=_keep_house, args=(weakref.ref(self), self._closed), name="kser-delivery-reports", daemon=True
        )
        self._housekeeper.start()

    def wait(self, waiting: Waiting, deadline: float) -> None:
        """Wait until it is done, or until ``deadline`` by the monotonic clock."""
        try:
            while not waiting.done() and remaining(deadline):
                if self._take_lead(waiting):
                    self._lead(waiting, deadline)
                elif waiting.wake is not None and not waiting.done():
                    waiting.wake.wait(remaining(deadline))
        finally:
            if waiting.wake is not None:
                self._leave(waiting)

    def serve(self, seconds: float = 0) -> bool:
        """Take what there is, waiting for it for some seconds; False when another thread does that."""
        with self._mutex:
            if self._led:
                return False
            self._led = True
        try:
            self._poll(seconds)
        finally:
            self._resign()
        return True

    def __enter__(self) -> None:
        """Somebody sends: the reports are not the housekeeper's.

        It would have to ask for the interpreter at each of them, while that thread works.
        """
        with self._mutex:
            self._busy += 1

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            self._busy -= 1

    def keep_house(self) -> None:
        """Take what there is, unless somebody sends."""
        if not self._busy:
            self.serve()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        # A callback of the user's that closes its producer may run in that very thread.
        if threading.current_thread() is not self._housekeeper:
            self._housekeeper.join()

    def _take_lead(self, waiting: Waiting) -> bool:
        with self._mutex:
            if not self._led:
                self._led = True
                return True
            waiting.wake = threading.Event()
            self._followers[id(waiting)] = waiting
        return False

    def _lead(self, waiting: Waiting, deadline: float) -> None:
        try:
            while not waiting.done() and (left := remaining(deadline)):
                self._poll(min(left, SLICE))
        finally:
            self._resign()

    def _resign(self) -> None:
        with self._mutex:
            self._led = False
            self._call_next()

    def _leave(self, waiting: Waiting) -> None:
        """Wait no longer: whoever was called to lead and had its report already calls the next one."""
        with self._mutex:
            self._followers.pop(id(waiting), None)
            if not self._led:
                self._call_next()

    def _call_next(self) -> None:
        if self._followers:
            follower = self._followers.pop(next(iter(self._followers)))
            assert follower.wake is not None
            follower.wake.set()


def _keep_house(reports: weakref.ref[Reports], closed: threading.Event) -> None:
    """Without holding them: who forgets to close a producer has no thread that lives for ever."""
    while not closed.wait(HOUSEKEEPING):
        found = reports()
        if found is None:
            return
        found.keep_house()
        del found
