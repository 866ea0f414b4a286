"""Delivery reports. librdkafka passes them to the thread that polls, while each sender waits for its own report."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from confluent_kafka import KafkaError

from kser.escaping import escape_lines
from kser.producer import time_left

logger = escape_lines(logging.getLogger(__name__))

#: Maximum duration of one poll in seconds. It is short, because signal handlers do not run while a thread polls.
MAX_POLL = 0.1

#: Seconds between two polls of an idle producer.
IDLE_POLL_INTERVAL = 1.0


def guarded(callback: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Wrap a user callback so that its exceptions are logged instead of raised.

    librdkafka runs callbacks in whichever thread polls. An exception of a callback must neither make that thread's send
    fail nor stop the housekeeping thread.
    """

    def call(event: Any) -> None:
        try:
            callback(event)
        except Exception:
            logger.exception("a callback in the producer's configuration raised an exception")

    return call


def report_error(error: Any, record: Any, *, has_offset: bool) -> Any:
    """Return the error of a delivery report; None if the report confirms the delivery.

    librdkafka also reports a record without an error if the broker has confirmed only a later record of the partition.
    Such a report contains no offset, and the record may be lost, so this function returns a timeout error.

    :param has_offset: True if the report of each delivered record contains an offset, which requires ``acks``.
    """
    if error is None and has_offset and record.offset() is None:
        return KafkaError(KafkaError._MSG_TIMED_OUT)
    return error


class LastError:
    """The last error that the client reported.

    The client calls an instance of this class as its ``error_cb``, and the instance calls the user's ``error_cb``.
    """

    def __init__(self, user_callback: Callable[[Any], Any] | None) -> None:
        self._forward = None if user_callback is None else guarded(user_callback)
        self._text = ""
        self._at = 0.0

    def __call__(self, error: Any) -> None:
        """Record the error and call the user's ``error_cb``. librdkafka calls this method."""
        self.remember(error)
        if self._forward is not None:
            self._forward(error)

    def remember(self, error: Any) -> None:
        """Record the last error, except ALL_BROKERS_DOWN and TIMED_OUT, because these two hide the cause."""
        if error.code() not in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT):
            self._text = error.str()
            self._at = time.monotonic()

    def text_since(self, began: float) -> str:
        """Return the last error in the form ``" (last error of the client: <text>)"``, to append to an error text.

        :param began: the start of the failed call, by the monotonic clock. If the last error is older, the result is
            empty.
        """
        return f" (last error of the client: {self._text})" if self._text and self._at >= began else ""


class Waiter:
    """A waiting thread and the condition that ends its wait. A delivery report can make the condition true."""

    #: The event that wakes the waiting thread. None if the thread has not waited yet while another thread polled.
    wake: threading.Event | None = None

    def done(self) -> bool:
        """Return whether the wait is over."""
        raise NotImplementedError

    def reported(self) -> None:
        """Wake the waiting thread if its wait is over. Call this method after each delivery report."""
        if self.wake is not None and self.done():
            self.wake.set()


class DeliveryWaiter(Waiter):
    """A waiter for the delivery report of one record.

    :param has_offset: see :func:`report_error`.
    """

    def __init__(self, *, has_offset: bool) -> None:
        self.error: Any = None
        self._has_offset = has_offset
        self._arrived = False

    def __call__(self, error: Any, record: Any) -> None:
        """Store the report. librdkafka calls this method."""
        self.error = report_error(error, record, has_offset=self._has_offset)
        self._arrived = True
        self.reported()

    def done(self) -> bool:
        return self._arrived


class DeliveryReportPoller:
    """Leader/follower polling: one of the waiting threads, the leader, polls for all waiting threads.

    When the delivery report of the leader arrives, another waiting thread becomes the leader.

    A leader gets its own report without a thread switch. A separate thread that only polls would add two thread
    switches to each message. While no thread sends, a housekeeping thread polls once a second, because librdkafka
    delivers its events (for example that a broker is down) only during a poll.

    :param poll: the client's ``poll``, which takes a timeout in seconds and runs the callback of each report.
    """

    def __init__(self, poll: Callable[[float], Any]) -> None:
        self._poll_client = poll
        self._mutex = threading.Lock()
        self._has_leader = False
        self._followers: dict[int, Waiter] = {}
        self._busy = 0
        self._closed = threading.Event()
        self._idle_thread = threading.Thread(
            target=_poll_while_idle, args=(weakref.ref(self), self._closed), name="kser-delivery-reports", daemon=True
        )
        self._idle_thread.start()

    def wait(self, waiting: Waiter, deadline: float) -> None:
        """Wait until ``waiting`` is done, or until ``deadline`` by the monotonic clock."""
        try:
            while not waiting.done() and time_left(deadline):
                if self._take_lead(waiting):
                    self._lead(waiting, deadline)
                elif waiting.wake is not None and not waiting.done():
                    waiting.wake.wait(time_left(deadline))
        finally:
            if waiting.wake is not None:
                self._remove(waiting)

    def poll(self, seconds: float = 0) -> bool:
        """Poll for up to ``seconds``; return False without polling if another thread is already polling."""
        with self._mutex:
            if self._has_leader:
                return False
            self._has_leader = True
        try:
            self._poll_client(seconds)
        finally:
            self._release_lead()
        return True

    def __enter__(self) -> None:
        """Register a thread that sends, so that the housekeeping thread does not poll.

        A sending thread polls by itself. If the housekeeping thread polled too, the two threads would compete for the
        GIL at each delivery report.
        """
        with self._mutex:
            self._busy += 1

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            self._busy -= 1

    def poll_if_idle(self) -> None:
        """Poll once, unless a thread is sending."""
        if not self._busy:
            self.poll()

    def close(self) -> None:
        """Stop the housekeeping thread."""
        self._closed.set()
        # A user callback that closes the producer may run in the housekeeping thread, which cannot join itself.
        if threading.current_thread() is not self._idle_thread:
            self._idle_thread.join()

    def _take_lead(self, waiting: Waiter) -> bool:
        with self._mutex:
            if not self._has_leader:
                self._has_leader = True
                return True
            waiting.wake = threading.Event()
            self._followers[id(waiting)] = waiting
        return False

    def _lead(self, waiting: Waiter, deadline: float) -> None:
        try:
            while not waiting.done() and (left := time_left(deadline)):
                self._poll_client(min(left, MAX_POLL))
        finally:
            self._release_lead()

    def _release_lead(self) -> None:
        with self._mutex:
            self._has_leader = False
            self._call_next()

    def _remove(self, waiting: Waiter) -> None:
        """Remove a waiting thread from the followers, and wake the next follower if no thread polls.

        The leader is the thread that polls. When it stops, it wakes one follower to become the next leader. This
        follower ends its wait without polling if its own report has arrived meanwhile, or if its deadline has passed.
        No thread would then poll for the remaining followers, so this method wakes the next of them.
        """
        with self._mutex:
            self._followers.pop(id(waiting), None)
            if not self._has_leader:
                self._call_next()

    def _call_next(self) -> None:
        if self._followers:
            follower = self._followers.pop(next(iter(self._followers)))
            assert follower.wake is not None
            follower.wake.set()


def _poll_while_idle(reference: weakref.ref[DeliveryReportPoller], closed: threading.Event) -> None:
    """Poll once a second while the producer is idle.

    Between polls, this function holds only a weak reference to the poller. So Python can garbage-collect a producer
    that was never closed, and this thread then ends.
    """
    while not closed.wait(IDLE_POLL_INTERVAL):
        poller = reference()
        if poller is None:
            return
        poller.poll_if_idle()
        del poller
