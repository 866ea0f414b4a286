"""Client that sends, cancels and resumes operations, and retries during outages."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from kser.confluent.producer import Producer
from kser.errors import KserError, StateConflict
from kser.schemas import Message
from kser.status import FAILED, FINAL
from kser.store import open_store
from tests.chaos.observer import QUIET
from tests.chaos_operations.orders import FAILING, LAUNCH, MESSAGE, MESSAGE_DISTRIBUTED, SEND, Order
from tests.chaos_operations.shop import Shop

#: Seconds between two tries.
RETRY_SECONDS = 0.5
THREADS = 4


class Customer:
    """Client whose threads send, cancel and resume operations at planned times.

    :param uri: the URI of the database.
    :param servers: the addresses of Kafka.
    """

    def __init__(self, uri: str, servers: str, topic: str, orders: Sequence[Order]) -> None:
        self.orders = orders
        self._topic = topic
        self._store = open_store(uri)
        self._producer = Producer({**QUIET, "bootstrap.servers": servers})
        self._shop = Shop(store=self._store, producer=self._producer, app=_App({"KSER_TOPICS": [topic]}))
        self._operations: dict[str, Any] = {}
        self._lock = threading.Condition()
        self._counter = itertools.count()
        #: A heap of requests: the due time, a number that makes the order unique, the method and the order.
        self._requests: list[tuple[float, int, Callable[[Order], bool], Order]] = []
        self._running_requests = 0
        self._stopping = False
        self._threads = [threading.Thread(target=self._work, name=f"customer {n}") for n in range(THREADS)]
        #: The time of acceptance, by uuid.
        self.accepted: dict[str, float] = {}
        #: The status that ``cancel()`` returned, by uuid.
        self.cancelled: dict[str, str] = {}
        self.resumed: set[str] = set()
        #: Texts about unexpected exceptions.
        self.problems: list[str] = []

    # -- plan of requests ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to send, repeat and cancel the orders, each at its time from now."""
        now = time.monotonic()
        for order in self.orders:
            self._schedule(now + order.at, self._send, order)
            if order.repeat_after is not None:
                self._schedule(now + order.at + order.repeat_after, self._send, order)
            if order.cancel_after is not None:
                self._schedule(now + order.at + order.cancel_after, self._cancel, order)
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        """Resume each failing order as soon as it has failed."""
        for order in self.orders:
            if order.kind == FAILING:
                self._schedule(time.monotonic(), self._resume, order)

    @property
    def is_idle(self) -> bool:
        """True if no request is scheduled or running."""
        with self._lock:
            return not self._requests and not self._running_requests

    def _schedule(self, at: float, request: Callable[[Order], bool], order: Order) -> None:
        with self._lock:
            heapq.heappush(self._requests, (at, next(self._counter), request, order))
            self._lock.notify()

    def _seconds_to_next_request(self) -> float | None:
        """Return the seconds until the next request is due; None if there is none."""
        if not self._requests:
            return None
        due_at, *_ = self._requests[0]
        return due_at - time.monotonic()

    def _work(self) -> None:
        """Perform due requests; a request that fails during an outage is tried again."""
        while True:
            with self._lock:
                while not self._stopping and ((seconds := self._seconds_to_next_request()) is None or seconds > 0):
                    self._lock.wait(None if seconds is None else max(seconds, 0.001))
                if self._stopping:
                    return
                _, _, request, order = heapq.heappop(self._requests)
                self._running_requests += 1
            is_done = False
            try:
                is_done = request(order)
            except KserError:
                # A server is unavailable, so the request is tried again.
                pass
            except Exception as error:
                self.problems.append(f"{request.__name__} of {order.uuid} raised {error!r}")
                is_done = True
            if not is_done:
                self._schedule(time.monotonic() + RETRY_SECONDS, request, order)
            with self._lock:
                self._running_requests -= 1

    # -- requests ------------------------------------------------------------------------------------------------------

    def _send(self, order: Order) -> bool:
        """Send an order in its way; return whether it was accepted."""
        if order.way in (MESSAGE, MESSAGE_DISTRIBUTED):
            cls = self._shop.distributed if order.way == MESSAGE_DISTRIBUTED else self._shop.local
            message = Message(uuid=order.uuid, entrypoint=cls.path, params=order.params)
            accepted = self._producer.send(self._topic, message).retcode == 0
        else:
            accepted = self._accept(order)
        if accepted:
            self.accepted.setdefault(order.uuid, time.monotonic())
        return accepted

    def _accept(self, order: Order) -> bool:
        """Save an operation with ``send()`` or ``launch()``; return whether it is stored."""
        with self._lock:
            operation = self._operations.get(order.uuid)
            if operation is None:
                operation = self._shop.local(uuid=order.uuid, params=order.params).build()
                self._operations[order.uuid] = operation
        try:
            if order.way == SEND:
                operation.send()
            else:
                assert order.way == LAUNCH
                operation.launch()
        except StateConflict:
            # The operation was sent before, and has ended.
            return self._shop.registry.get(order.uuid) is not None
        return True

    def _cancel(self, order: Order) -> bool:
        """Cancel an operation; return False if it is not stored yet."""
        stored = self._shop.registry.get(order.uuid)
        if stored is None:
            return False
        self.cancelled[order.uuid] = stored.cancel("the order was withdrawn")
        return True

    def _resume(self, order: Order) -> bool:
        """Resume a failed operation; return False if it has not ended yet."""
        stored = self._shop.registry.get(order.uuid)
        if stored is None or stored.status != FAILED:
            return stored is not None and stored.status in FINAL
        with suppress(StateConflict):
            # An earlier resume succeeded, but its reply was lost.
            stored.resume()
        self.resumed.add(order.uuid)
        return True

    # -- stored operations ---------------------------------------------------------------------------------------------

    def open_operations(self) -> int | None:
        """Return the number of accepted operations that have not ended; None if the database is unavailable."""
        accepted = set(self.accepted)
        try:
            return len(accepted - self._ended())
        except KserError:
            return None

    def _ended(self) -> set[str]:
        """Return the uuids of the ended operations, without resumed ones that have not ended again."""
        ended = self._find_all(status=FINAL)
        return {each.uuid for each in ended if each.status != FAILED or each.uuid not in self.resumed}

    def stored_operations(self) -> list[Any]:
        """Return all stored operations with their tasks, attempts and events."""
        return [self._shop.registry.get(operation.uuid) for operation in self._find_all()]

    def _find_all(self, **query: Any) -> list[Any]:
        """Return all results of a query."""
        operations: list[Any] = []
        cursor = None
        while True:
            page = self._shop.registry.find(limit=500, after=cursor, **query)
            operations += page
            cursor = page.cursor
            if cursor is None:
                return operations

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._producer.close()
        self._store.close()


class _App:
    """App with the settings of kser."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
