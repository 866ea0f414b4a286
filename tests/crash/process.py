"""Simulated processes that start, die, stall and wake up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kser.consumer.client import ConsumerClient
from kser.controller import Controller
from kser.dummy.consumer import Consumer
from kser.sequencing.registry import OperationRegistry
from tests.consumer.harness import MANUAL_COMMIT
from tests.crash.faults import QUEUE, FaultyClient, FaultyProducer, FaultyStore, ProcessKilled
from tests.crash.shop import TOPIC, classes_of
from tests.store.harness import LEASE
from tests.support import WAIT_SECONDS

if TYPE_CHECKING:
    from tests.crash.simulation import Simulation

#: Seconds between two heartbeats, the default of ``KSER_HEARTBEAT``.
HEARTBEAT_INTERVAL: Final = LEASE / 5


class SimulatedConsumer(Consumer):
    """A consumer whose client has faults."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.is_stopping = False
        super().__init__(MANUAL_COMMIT, [TOPIC])
        self.host = self._kser_services._host
        put = self.host.put
        self.host.put = lambda *args: process.queue_takeover(lambda: put(*args))  # type: ignore[method-assign]

    def _kser_may_take_over(self) -> bool:
        return self._process.simulation.scenario.takes_over and super()._kser_may_take_over()

    def _kser_connect(self) -> ConsumerClient:
        self.faulty_client = FaultyClient(self._process, self.client)
        return self.faulty_client

    def stop(self) -> None:
        self.is_stopping = True
        super().stop()


class Process:
    """A process with its own classes and registry.

    :param name: the name in the ledger.
    :param consumes: whether the process has a consumer; without one it only sends.
    """

    consumer: SimulatedConsumer | None = None

    def __init__(self, simulation: Simulation, name: str, *, consumes: bool) -> None:
        self.simulation = simulation
        self.name = name
        self.is_dead = self.is_stalled = self.is_reaping = False
        self._wake_up, self._paused = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        controller = type("Controller", (Controller,), {"ENTRYPOINTS": {}})
        self.store = FaultyStore(self, simulation.store)
        self.registry = OperationRegistry(
            controller_class=controller,
            store=self.store,  # type: ignore[arg-type]
            producer=FaultyProducer(self),
        )
        self.classes = [self.registry.subscribe(cls) for cls in classes_of(self)]
        self.background_service = self.registry.background_service
        assert self.background_service is not None
        self.background_service.clock = lambda: simulation.now
        self.background_service._context.sleep = lambda seconds: None
        if consumes:
            self.consumer = SimulatedConsumer(self)
            self.consumer.REGISTRY = controller

    # -- calls ---------------------------------------------------------------------------------------------------------

    def crash_point(self, name: str, call: Callable[[], Any], make_error: Callable[[], Exception] | None = None) -> Any:
        """Make a call, or inject the fault that is planned for it.

        :param make_error: creates the error of a failed call; without it the call cannot fail.
        :raises ProcessKilled: the process is dead.
        """
        if self.is_dead:
            raise ProcessKilled
        return self.simulation.crash_point(self, name, call, make_error)

    def step(self) -> bool:
        """Poll, handle the messages, run heartbeat and reaper; return whether a message was handled or sent.

        :raises ProcessKilled: the process died, or has shut down.
        """
        consumer = self.consumer
        assert consumer is not None
        handled = consumer.step(timeout=0)
        if consumer.is_stopping:
            # The graceful shutdown gives reservations back and records the sent steps, and the process is gone.
            consumer._kser_worker_pool.shutdown()
            self.background_service.close(consumer.host)
            raise ProcessKilled
        return self.tick_background_service() or handled > 0

    def tick_background_service(self) -> bool:
        """Run heartbeat and reaper; return whether a record was sent."""
        sent_before = self.simulation.sent_records
        self.is_reaping, was_reaping = True, self.is_reaping
        try:
            self.background_service.tick()
        finally:
            self.is_reaping = was_reaping
        return self.simulation.sent_records > sent_before

    def queue_takeover(self, put: Callable[[], bool]) -> bool:
        """Queue a takeover. In one scenario, the first consumer that queues a takeover ends before it begins."""
        is_queued: bool = self.crash_point(QUEUE, put)
        simulation = self.simulation
        if simulation.scenario.stopped_in == QUEUE and not simulation.has_stopped_consumer and self.consumer:
            simulation.has_stopped_consumer = True
            self.consumer.stop()
        return is_queued

    def heartbeat(self) -> None:
        """Let the time of a heartbeat pass while a task runs, and renew the lease."""
        self.simulation.now += HEARTBEAT_INTERVAL
        self.tick_background_service()

    # -- death and stalls ----------------------------------------------------------------------------------------------

    def run_until_stalled(self, call: Callable[[], Any]) -> Any:
        """Make a call, and return its result.

        :raises ProcessKilled: the process died or stalled.
        """
        if not self.simulation.may_stall_soon:
            return call()
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:
                self._error = error
            finally:
                self._paused.set()

        self._error = None
        self._thread = threading.Thread(target=run, name="kser-crash")
        self._thread.start()
        self._wait_until_paused()
        if self.is_stalled:
            raise ProcessKilled
        if self._error is not None:
            raise self._error
        return results[0]

    def _wait_until_paused(self) -> None:
        assert self._paused.wait(WAIT_SECONDS), f"{self.name} neither stalls nor returns"
        self._paused.clear()
        if not self.is_stalled and self._thread is not None:
            self._thread.join(WAIT_SECONDS)

    def stall(self) -> None:
        """Stop the thread of this process until :meth:`wake_up`."""
        self.is_stalled = True
        self._wake_up.clear()
        self._paused.set()
        assert self._wake_up.wait(WAIT_SECONDS), f"{self.name} is not woken up"

    def wake_up(self) -> None:
        """Continue after a stall until the call returns or stalls again; then kill the process."""
        self.is_stalled = False
        self._wake_up.set()
        self._wait_until_paused()
        if self.is_stalled:
            return
        self.kill()
        if self._error is not None and not isinstance(self._error, ProcessKilled):
            raise self._error

    def kill(self) -> None:
        """Kill the process: none of its later calls takes effect."""
        self.is_dead = True
        self.expel_from_group()
        if self.consumer is not None:
            self.consumer._kser_release_running_file()

    def expel_from_group(self) -> None:
        """Remove the consumer from its group, as the broker does after the session timeout."""
        if self.consumer is not None:
            self.consumer.faulty_client.expel()
