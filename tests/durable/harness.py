"""Shared harness of the durable operation tests: a store, the processes that share it, and their clocks.

Each process has its own classes, registry and consumer. A consumer of another group gets every record again, as after a
rebalance or a duplicate send.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

import pytest
from cdumay_result import Result

from kser.consumer.work_queue import WorkQueue
from kser.controller import BaseProducer, Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.durable.recovery import RecoveryService
from kser.errors import StoreUnavailable
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from kser.status import is_final
from kser.store.base import Store
from kser.store.model import MAX_TAKEOVER_DELAY, Claim, OperationSnapshot
from tests.consumer.harness import MANUAL_COMMIT, ConsumerThread, FaultyConsumer, ScriptedTask
from tests.store.harness import LEASE, StoreHarness, claim_request
from tests.support import WAIT_SECONDS, Clock, message, wait_until

#: Seconds between two ticks of the background service, when a test lets time pass.
TICK_INTERVAL = 5.0
#: Seconds after which a lease without a renewal has expired.
LEASE_EXPIRED = LEASE + 1
#: Seconds after which a step may be taken over, however many consumers died during the step.
TAKEOVER_DUE = LEASE_EXPIRED + MAX_TAKEOVER_DELAY

TaskClass = TypeVar("TaskClass", bound=type[Task])


class Sale(Operation):
    """A local operation of the three scripted tasks ``<uuid>.a``, ``<uuid>.b`` and ``<uuid>.c``."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.{name}") for name in "abc"]


class DistributedSale(Sale):
    """A distributed operation of the same three tasks."""

    DISTRIBUTED = True


class HookedSale(Sale):
    """A sale whose end hooks record their calls; see the fixture ``hooked_classes``."""

    #: The name of each called hook, and the uuid of its operation.
    hook_calls: ClassVar[list[tuple[str, str]]] = []
    #: A function that each hook calls with its name and the result; its value is the value of the hook.
    on_hook: ClassVar[Callable[[str, Result], Any] | None] = None

    def onsuccess(self, result: Result) -> Any:
        return self._record_call("onsuccess", result)

    def onerror(self, result: Result) -> Any:
        return self._record_call("onerror", result)

    def _record_call(self, name: str, result: Result) -> Any:
        self.hook_calls.append((name, self.uuid))
        on_hook = HookedSale.on_hook
        return on_hook(name, result) if on_hook else result


class DistributedHookedSale(HookedSale):
    """The distributed form of :class:`HookedSale`."""

    DISTRIBUTED = True


MODES = ("local", "distributed")
#: Run a test with a local and with a distributed operation.
BOTH_MODES = pytest.mark.parametrize("cls", [Sale, DistributedSale], ids=MODES)
HOOKED = pytest.mark.parametrize("cls", [HookedSale, DistributedHookedSale], ids=MODES)


class StoredAttempt(NamedTuple):
    """A stored attempt: the position of its task, its number and its status."""

    position: int
    number: int
    status: str


class WrappedStore:
    """A store that forwards each call to another store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class RecordingStore(WrappedStore):
    """A store that records the names of its calls."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return super().__getattr__(name)


class UnavailableStore(WrappedStore):
    """A store whose calls fail while ``error`` is set."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        #: The text of the error, empty while the database works.
        self.error = ""
        #: The number of failed calls.
        self.failed_calls = 0

    def __getattr__(self, name: str) -> Any:
        method = super().__getattr__(name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.error:
                self.failed_calls += 1
                raise StoreUnavailable(self.error)
            return method(*args, **kwargs)

        return call


class UnreachableProducer:
    """A producer whose broker does not respond: each send returns a failed result."""

    error: ClassVar[str] = "no broker answers"

    def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Result:
        return Result(uuid=kmsg.uuid, retcode=500, stderr=self.error)

    def bulk_send(self, topic: str, kmsgs: Any, timeout: float) -> Result:
        return Result(retcode=500, retval={"failed": {kmsg.uuid: self.error for kmsg in kmsgs}})


class Process:
    """A process: its classes, its registry and its consumer.

    :param store: the shared store, None for a process without a database.
    :param classes: the subscribed classes, in addition to :class:`ScriptedTask`.
    :param producer: the producer of the registry.
    :param opens_store: False if the first call opens the store, and not this constructor.
    :param options: options of the consumer; also ``group``, ``consumer_clock``, and ``app`` for the registry.
    """

    def __init__(
        self,
        store: Store | None,
        *classes: type[Task],
        producer: BaseProducer | type[Producer] | None = Producer,
        opens_store: bool = True,
        **options: Any,
    ) -> None:
        group, app = options.pop("group", "dummy"), options.pop("app", None)
        self.clock = Clock()
        #: The lock that a thread holds while the clock must not change.
        self.clock_lock = threading.RLock()
        clock = options.pop("consumer_clock", self.clock)

        class ProcessController(Controller):
            ENTRYPOINTS: ClassVar[dict[Any, Any]] = {}

        own_producer: Any = Producer({}) if producer is Producer else producer
        self.registry = OperationRegistry(app, ProcessController, producer=own_producer, store=store)
        self.consumer = FaultyConsumer({**MANUAL_COMMIT, "group_id": group}, clock=clock, **options)
        self.consumer.REGISTRY = self.registry.controller
        for cls in (ScriptedTask, *classes):
            self.subscribe_copy(cls)
        if store is not None and opens_store:
            self.background_service.clock = self.clock
            self.background_service._context.sleep = lambda seconds: None
            self._hold_clock_during_looks()

    def _hold_clock_during_looks(self) -> None:
        """Let no time pass during a look for due steps.

        Otherwise, a reservation could expire at once, and the next look would not come before the next step of the
        clock.
        """
        service, look = self.background_service, self.background_service.look

        def hold_clock(host: Any) -> None:
            with self.clock_lock:
                look(host)

        service.look = hold_clock  # type: ignore[method-assign]

    # -- classes -------------------------------------------------------------------------------------------------------

    def subscribe_copy(self, cls: TaskClass) -> TaskClass:
        """Subscribe a subclass with the same path in this process, and return it."""
        copy = type(cls)(cls.__name__, (cls,), {"__module__": cls.__module__})
        return self.registry.subscribe(copy)  # type: ignore[return-value]

    def class_of(self, cls: type[Task]) -> Any:
        """Return this process's subscribed copy of a class."""
        return self.registry.controller.ENTRYPOINTS[cls.path]

    def unsubscribe(self, cls: type[Task]) -> None:
        """Remove a class from this process's registry."""
        del self.registry.controller.ENTRYPOINTS[cls.path]

    # -- messages ------------------------------------------------------------------------------------------------------

    def send(self, cls: type[Task], uuid: str = "1", **params: Any) -> Any:
        """Send an operation whose tasks are not built yet, and return it."""
        return self.class_of(cls)(uuid=uuid, params=params).send()

    def handle(self) -> int:
        """Handle messages until none are left, and return their number."""
        return self.consumer.run_until_idle()

    def step(self) -> int:
        """Handle the messages that exist now, but not the ones that they send."""
        return self.consumer.step(timeout=0)

    def poll(self) -> int:
        """Poll once, without handling a message: take part in a rebalance while a task runs."""
        return self.consumer._kser_poller.poll_once(0)

    def look(self) -> int:
        """Let the consumer look once, without running what it takes; return the number of its takeovers."""
        self.background_service.look(self.host)
        return len(self.work_queue.takeovers)

    def run(self, kmsg: Message) -> Result:
        """Run a message that does not come from Kafka."""
        result: Result = self.registry.controller.run(kmsg.dumps())
        return result

    def stop_gracefully(self) -> None:
        """Stop the consumer, which runs in another thread, and wait for the start of its graceful shutdown."""
        self.consumer.stop()
        wait_until(lambda: self.consumer._kser_poller.shutting_down)

    def stop_during(self, task: str, gate: threading.Event) -> BaseException | None:
        """Run the consumer until a task waits for ``gate``, stop the consumer gracefully, and then let the task end.

        :param task: uuid of the task, whose script waits for ``gate``.
        :return: the exception that ended ``run()``.
        """
        with ConsumerThread(self.consumer) as thread:
            wait_until(lambda: task in ScriptedTask.ran)
            self.stop_gracefully()
            gate.set()
            return thread.join()

    @property
    def work_queue(self) -> WorkQueue:
        """The work queue of the consumer, with the running attempts."""
        return self.consumer._kser_work_queue

    @contextlib.contextmanager
    def producer_replaced(self, producer: Any) -> Iterator[None]:
        """Send with another producer, of any class, inside the ``with`` block."""
        original, self.registry._kser_producer = self.registry._kser_producer, producer
        try:
            yield
        finally:
            self.registry._kser_producer = original

    # -- background service --------------------------------------------------------------------------------------------

    @property
    def background_service(self) -> RecoveryService:
        """The heartbeat and the reaper of this process."""
        service = self.registry.background_service
        assert service is not None
        return service

    @property
    def host(self) -> Any:
        """What the consumer of this process offers to its background service."""
        return self.consumer._kser_services._host

    def disable_background_service(self) -> None:
        """Stop heartbeat, takeovers and reaper, as on a machine that gives their threads no time."""
        service = self.background_service
        service.start = lambda host: None  # type: ignore[method-assign]
        service.tick = lambda host=None: LEASE  # type: ignore[method-assign]
        service.look = lambda host: None  # type: ignore[method-assign]


class DurableHarness:
    """A store and the processes that share it.

    :param store_harness: the store with its clock.
    """

    def __init__(self, store_harness: StoreHarness) -> None:
        self.store_harness = store_harness
        self.processes: list[Process] = []
        #: The only process of most tests.
        self.first = self.start_process(Sale, DistributedSale)
        self.registry = self.first.registry

    def start_process(self, *classes: type[Task], **options: Any) -> Process:
        """Start another process, with these classes and options."""
        store = self.store_harness.other if self.processes else self.store_harness.store
        self.processes.append(Process(options.pop("store", store), *classes, **options))
        return self.processes[-1]

    @property
    def store(self) -> Store:
        """The store, accessed without a process."""
        return self.store_harness.store

    def advance(self, seconds: float) -> None:
        """Let time pass, for the store and for all processes."""
        with contextlib.ExitStack() as locks:
            for process in self.processes:
                locks.enter_context(process.clock_lock)
            self.store_harness.advance(seconds)
            for process in self.processes:
                process.clock.advance(seconds)

    def advance_with_reaper(self, seconds: float, process: Process | None = None) -> None:
        """Let time pass while heartbeat and reaper run; the messages that the reaper sends are not handled."""
        passed = 0.0
        while passed < seconds:
            (process or self.first).background_service.tick()
            self.advance(TICK_INTERVAL)
            passed += TICK_INTERVAL
        (process or self.first).background_service.tick()

    def leave_expired_claim(self, cls: type[Sale], process: Process | None = None, uuid: str = "1") -> Claim:
        """Leave an operation whose consumer died one lease ago, and whose record is lost.

        :param process: the process that trusts leases then; by default, the first one.
        """
        self.first.class_of(cls)(uuid).build().send()
        self.advance_with_reaper(2 * LEASE, process)
        lose_records()
        claim = self.claim_and_die(uuid)
        self.advance_with_reaper(LEASE - 5, process)
        self.advance(6)
        return claim

    def operation(self, uuid: str = "1") -> Any:
        """Return an operation as the registry of the first process loads it."""
        operation = self.registry.get(uuid)
        assert operation is not None
        return operation

    def snapshot(self, uuid: str = "1") -> OperationSnapshot:
        """Return the stored snapshot of an operation."""
        snapshot = self.store.snapshot(uuid)
        assert snapshot is not None
        return snapshot

    def status(self, uuid: str = "1") -> str:
        """Return the stored status of an operation."""
        return self.snapshot(uuid).operation.status

    def has_ended(self, uuid: str = "1") -> bool:
        """Return whether an operation is stored and has ended."""
        row = self.store.get_operation(uuid)
        return row is not None and is_final(row.status)

    def task_statuses(self, uuid: str = "1") -> list[str]:
        """Return the stored status of each task of an operation."""
        return [task.status for task in self.snapshot(uuid).tasks]

    def event_kinds(self, uuid: str = "1") -> list[str]:
        """Return the kinds of the stored events of an operation."""
        return [event.kind for event in self.snapshot(uuid).events]

    def attempts(self, uuid: str = "1") -> list[StoredAttempt]:
        """Return the stored attempts of an operation."""
        return [StoredAttempt(row.position, row.number, row.status) for row in self.snapshot(uuid).attempts]

    def claim_and_die(self, uuid: str = "1") -> Claim:
        """Claim an operation for a consumer that then dies."""
        row = self.snapshot(uuid).operation
        claim = self.store.claim(uuid, row.target.uuid, claim_request("a dead consumer"))
        assert isinstance(claim, Claim), claim
        return claim

    def close(self) -> None:
        """Close all consumers and the store."""
        for process in self.processes:
            process.consumer.close()
        self.store_harness.close()


def in_other_thread(*calls: Callable[[], Any]) -> Callable[[], None]:
    """Return an action for a script that makes calls in another thread and waits for their end."""

    def action() -> None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                for call in calls:
                    call()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the calls in the other thread do not end"
        if errors:
            raise errors[0]

    return action


def send_raw_message(cls: type[Task], uuid: str = "1", **arguments: Any) -> None:
    """Send a message without a class and without a store, as a script that imports neither does."""
    InMemoryBroker.at("").send("dice", message(cls, uuid=uuid, **arguments).dumps().encode())


def sent_messages(topic: str = "dice") -> list[Message]:
    """Return the messages in a topic."""
    return [Message.loads(value) for value in InMemoryBroker.at("").values(topic)]


def lose_records(topic: str = "dice") -> None:
    """Delete the records of a topic, as if they had been lost."""
    for log in InMemoryBroker.at("").topics.get(topic, []):
        log.clear()


def worker_threads() -> list[threading.Thread]:
    """Return the threads of all worker pools, also those that were replaced."""
    return [thread for thread in threading.enumerate() if thread.name == "kser-worker"]
