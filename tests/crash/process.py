"""Simulated processes that start, die, sleep and wake up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kser.consumer.client import ConsumerClient
from kser.controller import Controller
from kser.dummy.consumer import Consumer
from kser.sequencing.registry import OperationRegistry
from tests.consumer.harness import MANUAL_COMMIT
from tests.crash.faults import FaultyClient, FaultyProducer, FaultyStore, Killed
from tests.crash.shop import TOPIC, classes_of
from tests.support import WAIT_SECONDS

if TYPE_CHECKING:
    from tests.crash.simulation import Simulation


class Member(Consumer):
    """A consumer whose client is at hand."""

    def __init__(self, process: Process) -> None:
        self._process = process
        super().__init__(MANUAL_COMMIT, [TOPIC])

    def _kser_connect(self) -> ConsumerClient:
        self.member = FaultyClient(self._process, self.client)
        return self.member


class Process:
    """A process: it has classes, a registry and, unless it only sends, a consumer of its own.

    :param name: for the ledger.
    """

    consumer: Member | None = None

    def __init__(self, simulation: Simulation, name: str, *, consumes: bool) -> None:
        self.simulation = simulation
        self.name = name
        self.is_dead = self.sleeps = self.reaps = False
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._ending: BaseException | None = None
        controller = type("Controller", (Controller,), {"ENTRYPOINTS": {}})
        self.registry = OperationRegistry(
            controller_class=controller,
            store=FaultyStore(self, simulation.store),  # type: ignore[arg-type]
            producer=FaultyProducer(self),
        )
        self.classes = [self.registry.subscribe(cls) for cls in classes_of(self)]
        self.background_service = self.registry._kser_background_service
        assert self.background_service is not None
        self.background_service.clock = lambda: simulation.now
        self.owner = self.registry._kser_operations._context.owner
        if consumes:
            self.consumer = Member(self)
            self.consumer.REGISTRY = controller

    # -- what it does --------------------------------------------------------------------------------------------------

    def at(self, point: str, act: Callable[[], Any], trouble: Callable[[], Exception] | None = None) -> Any:
        """Do something that a process can die at, or whatever the plan has in its place."""
        if self.is_dead:
            raise Killed
        return self.simulation.at(self, point, act, trouble)

    def turn(self) -> bool:
        """Poll, handle what there is, and look for what is due; returns whether anything was done.

        :raises Killed: it died.
        """
        consumer = self.consumer
        assert consumer is not None
        handled = consumer.step(timeout=0)
        if consumer._kser_stopping:
            # It was told to end: what it has given back is sent, and it is gone.
            self.beside()
            raise Killed
        return self.beside() or handled > 0

    def beside(self) -> bool:
        """A turn of what runs beside the consumer; returns whether it sent something."""
        sent = self.simulation.sends
        self.reaps, before = True, self.reaps
        try:
            self.background_service.tick()
        finally:
            self.reaps = before
        return self.simulation.sends > sent

    def beat(self) -> None:
        """Time passes while a task runs, and the claim is kept alive."""
        self.simulation.now += self.background_service._settings.heartbeat
        self.beside()

    # -- how it ends ---------------------------------------------------------------------------------------------------

    def do(self, act: Callable[[], Any]) -> Any:
        """Do something until it is done, dies or falls asleep.

        :raises Killed: it died, or sleeps.
        """
        if not self.simulation.may_sleep_soon:
            return act()
        answers: list[Any] = []

        def body() -> None:
            try:
                answers.append(act())
            except BaseException as exc:
                self._ending = exc
            finally:
                self._stopped.set()

        self._ending = None
        self._thread = threading.Thread(target=body, name="kser-crash")
        self._thread.start()
        self._wait()
        if self.sleeps:
            raise Killed
        if self._ending is not None:
            raise self._ending
        return answers[0]

    def _wait(self) -> None:
        assert self._stopped.wait(WAIT_SECONDS), "it hangs"
        self._stopped.clear()
        if not self.sleeps and self._thread is not None:
            self._thread.join(WAIT_SECONDS)

    def sleep(self) -> None:
        """It is stopped, for longer than anybody believes in it."""
        self.sleeps = True
        self._wake.clear()
        self._stopped.set()
        assert self._wake.wait(WAIT_SECONDS), "nobody wakes it"

    def wake(self) -> None:
        """It goes on where it fell asleep, until what it did is done, or it sleeps again; then it ends."""
        self.sleeps = False
        self._wake.set()
        self._wait()
        if self.sleeps:
            return
        self.die()
        if self._ending is not None and not isinstance(self._ending, Killed):
            raise self._ending

    def die(self) -> None:
        """It is dead: nothing of it does anything any more."""
        self.is_dead = True
        self.expel()
        if self.consumer is not None:
            self.consumer._kser_release_running_file()

    def expel(self) -> None:
        """The group has not heard of it for too long."""
        if self.consumer is not None:
            self.consumer.member.expel()
