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
from tests.chaos_operations.orders import FAILING, LAUNCH, MESSAGE, SEND, SPREAD, Order
from tests.chaos_operations.shop import Shop

#: Seconds until something is tried again.
AGAIN = 0.5
THREADS = 4


class Customer:
    """Works in threads of its own, from a list of what is to be done when.

    :param uri: where the database is.
    :param servers: where Kafka is.
    """

    def __init__(self, uri: str, servers: str, topic: str, orders: Sequence[Order]) -> None:
        self.orders = orders
        self._topic = topic
        self._store = open_store(uri)
        self._producer = Producer({**QUIET, "bootstrap.servers": servers})
        self._shop = Shop(store=self._store, producer=self._producer, app=_App({"KSER_TOPICS": [topic]}))
        self._made: dict[str, Any] = {}
        self._lock = threading.Condition()
        self._counter = itertools.count()
        self._due: list[tuple[float, int, Callable[[Order], bool], Order]] = []
        self._at_work = 0
        self._over = False
        self._threads = [threading.Thread(target=self._work, name=f"customer {n}") for n in range(THREADS)]
        #: By uuid: what was handed in, and what cancel() answered.
        self.accepted: dict[str, float] = {}
        self.cancelled: dict[str, str] = {}
        self.resumed: set[str] = set()
        #: What nobody expects.
        self.problems: list[str] = []

    # -- what is to be done --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Hand everything in, each at its time from now on."""
        now = time.monotonic()
        for order in self.orders:
            self._plan(now + order.at, self._hand_in, order)
            if order.again is not None:
                self._plan(now + order.at + order.again, self._hand_in, order)
            if order.cancel is not None:
                self._plan(now + order.at + order.cancel, self._cancel, order)
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        """Resume what has failed, each as soon as it has."""
        for order in self.orders:
            if order.kind == FAILING:
                self._plan(time.monotonic(), self._resume, order)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        with self._lock:
            return not self._due and not self._at_work

    def _plan(self, at: float, what: Callable[[Order], bool], order: Order) -> None:
        with self._lock:
            heapq.heappush(self._due, (at, next(self._counter), what, order))
            self._lock.notify()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._over and (not self._due or self._due[0][0] > time.monotonic()):
                    self._lock.wait(max(self._due[0][0] - time.monotonic(), 0.001) if self._due else None)
                if self._over:
                    return
                _, _, what, order = heapq.heappop(self._due)
                self._at_work += 1
            done = False
            try:
                done = what(order)
            except KserError:
                # Servers come back.
                pass
            except Exception as error:
                self.problems.append(f"{what.__name__} of {order.uuid} raised {error!r}")
                done = True
            if not done:
                self._plan(time.monotonic() + AGAIN, what, order)
            with self._lock:
                self._at_work -= 1

    # -- doing it ------------------------------------------------------------------------------------------------------

    def _hand_in(self, order: Order) -> bool:
        if order.way in (MESSAGE, SPREAD):
            cls = self._shop.spread if order.way == SPREAD else self._shop.local
            message = Message(uuid=order.uuid, entrypoint=cls.path, params=order.params)
            accepted = self._producer.send(self._topic, message).retcode == 0
        else:
            accepted = self._accept(order)
        if accepted:
            self.accepted.setdefault(order.uuid, time.monotonic())
        return accepted

    def _accept(self, order: Order) -> bool:
        with self._lock:
            made = self._made.get(order.uuid)
            if made is None:
                made = self._made[order.uuid] = self._shop.local(uuid=order.uuid, params=order.params).build()
        try:
            if order.way == SEND:
                made.send()
            else:
                assert order.way == LAUNCH
                made.launch()
        except StateConflict:
            # It was handed in before, and has ended.
            return self._shop.registry.get(order.uuid) is not None
        return True

    def _cancel(self, order: Order) -> bool:
        stored = self._shop.registry.get(order.uuid)
        if stored is None:
            return False
        self.cancelled[order.uuid] = stored.cancel("nobody wants it")
        return True

    def _resume(self, order: Order) -> bool:
        stored = self._shop.registry.get(order.uuid)
        if stored is None or stored.status != FAILED:
            return stored is not None and stored.status in FINAL
        with suppress(StateConflict):
            # One whose answer was lost.
            stored.resume()
        self.resumed.add(order.uuid)
        return True

    # -- looking -------------------------------------------------------------------------------------------------------

    def open(self) -> int | None:
        """How many operations were accepted and have not ended; None when the database is away."""
        accepted = set(self.accepted)
        try:
            return len(accepted - self._ended())
        except KserError:
            return None

    def _ended(self) -> set[str]:
        found: set[str] = set()
        cursor = None
        while True:
            page = self._shop.registry.find(status=FINAL, limit=500, after=cursor)
            found |= {each.uuid for each in page if each.status != FAILED or each.uuid not in self.resumed}
            cursor = page.cursor
            if cursor is None:
                return found

    def stored(self) -> list[Any]:
        """All operations that there are, with everything that is known about them."""
        found, cursor = [], None
        while True:
            page = self._shop.registry.find(limit=500, after=cursor)
            found += [self._shop.registry.get(each.uuid) for each in page]
            cursor = page.cursor
            if cursor is None:
                return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
            self._lock.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._producer.close()
        self._store.close()


class _App:
    """What kser reads settings from."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
