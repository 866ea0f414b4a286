"""Shared harness of the durable operation tests: a store, the processes that share it, and their clocks.

Each process has its own classes, registry and consumer. A consumer of another group gets every record again, as after a
rebalance or a duplicate send.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.durable.recovery import RecoveryService
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from kser.status import is_final
from kser.store.base import Store
from kser.store.model import Claim, OperationSnapshot
from tests.consumer.harness import MANUAL_COMMIT, ScriptedTask, new_consumer
from tests.store.harness import LEASE, StoreHarness, claim_request
from tests.support import WAIT_SECONDS, Clock, message

#: Seconds between two ticks of the background service, when a test lets time pass.
TURN = 5.0
#: Seconds after which a lease that nobody renews has expired.
LEASE_EXPIRED = LEASE + 1

TaskClass = TypeVar("TaskClass", bound=type[Task])


class Sale(Operation):
    """A local operation of the three scripted tasks ``<uuid>.a``, ``<uuid>.b`` and ``<uuid>.c``."""

    names: ClassVar[str] = "abc"

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask(f"{self.uuid}.{name}") for name in self.names]


class Spread(Sale):
    """A distributed operation of the same three tasks."""

    DISTRIBUTED = True


#: Run a test with a local and with a distributed operation.
BOTH_WAYS = pytest.mark.parametrize("cls", [Sale, Spread], ids=["in one consumer", "over the consumers"])


class Process:
    """A process: its classes, its registry and its consumer.

    :param store: the shared store, None for a process without a database.
    :param classes: the subscribed classes, in addition to :class:`ScriptedTask`.
    :param options: options of the consumer; also ``group``, ``consumer_clock``, and ``app`` for the registry.
    """

    def __init__(self, store: Store | None, *classes: type[Task], **options: Any) -> None:
        group, app = options.pop("group", "dummy"), options.pop("app", None)
        self.clock = Clock()
        clock = options.pop("consumer_clock", self.clock)

        class Own(Controller):
            ENTRYPOINTS: ClassVar[dict[Any, Any]] = {}

        self.registry = OperationRegistry(app, Own, producer=Producer({}), store=store)
        self.consumer = new_consumer({**MANUAL_COMMIT, "group_id": group}, clock=clock, **options)
        self.consumer.REGISTRY = self.registry.controller
        for cls in (ScriptedTask, *classes):
            self.subscribe_copy(cls)
        if store is not None:
            self.background_service.clock = self.clock

    def subscribe_copy(self, cls: TaskClass) -> TaskClass:
        """Subscribe a subclass with the same path in this process, and return it."""
        own = type(cls)(cls.__name__, (cls,), {"__module__": cls.__module__})
        return self.registry.subscribe(own)  # type: ignore[return-value]

    def class_of(self, cls: type[Task]) -> Any:
        """Return this process's subscribed copy of a class."""
        return self.registry.controller.ENTRYPOINTS[cls.path]

    def unsubscribe(self, cls: type[Task]) -> None:
        """Remove a class from this process's registry."""
        del self.registry.controller.ENTRYPOINTS[cls.path]

    @property
    def background_service(self) -> RecoveryService:
        """The heartbeat and the reaper of this process."""
        found = self.registry.background_service
        assert found is not None
        return found

    def disable_background_service(self) -> None:
        """Stop heartbeat and reaper, as on a machine that gives their thread no time."""
        self.background_service.tick = lambda: None  # type: ignore[method-assign]

    def send(self, cls: type[Task], uuid: str = "1", **params: Any) -> Any:
        """Send an operation whose tasks are not built yet, and return it."""
        return self.class_of(cls)(uuid=uuid, params=params).send()

    def handle(self) -> int:
        """Handle messages until none are left, and return their number."""
        return self.consumer.run_until_idle()

    def run(self, kmsg: Message) -> Result:
        """Run a message that does not come from Kafka."""
        found: Result = self.registry.controller.run(kmsg.dumps())
        return found

    def step(self) -> int:
        """Handle the messages that exist now, but not the ones that they send."""
        return self.consumer.step(timeout=0)


class DurableHarness:
    """A store and the processes that share it.

    :param store_harness: the store with its clock.
    """

    def __init__(self, store_harness: StoreHarness) -> None:
        self.store_harness = store_harness
        self.processes: list[Process] = []
        #: The only process of most tests.
        self.first = self.process(Sale, Spread)
        self.registry = self.first.registry

    def process(self, *classes: type[Task], **options: Any) -> Process:
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
        self.store_harness.advance(seconds)
        for process in self.processes:
            process.clock.advance(seconds)

    def advance_with_reaper(self, seconds: float, process: Process | None = None) -> None:
        """Let time pass while heartbeat and reaper run; the messages that the reaper sends are not handled."""
        passed = 0.0
        while passed < seconds:
            (process or self.first).background_service.tick()
            self.advance(TURN)
            passed += TURN
        (process or self.first).background_service.tick()

    def stored(self, uuid: str = "1") -> OperationSnapshot:
        """Return the stored snapshot of an operation."""
        found = self.store.snapshot(uuid)
        assert found is not None
        return found

    def status(self, uuid: str = "1") -> str:
        """Return the stored status of an operation."""
        return self.stored(uuid).operation.status

    def has_ended(self, uuid: str = "1") -> bool:
        """Return whether an operation is stored and has ended."""
        row = self.store.get_operation(uuid)
        return row is not None and is_final(row.status)

    def tasks(self, uuid: str = "1") -> list[str]:
        """Return the stored status of each task of an operation."""
        return [task.status for task in self.stored(uuid).tasks]

    def event_kinds(self, uuid: str = "1") -> list[str]:
        """Return the kinds of the stored events of an operation."""
        return [event.kind for event in self.stored(uuid).events]

    def attempts(self, uuid: str = "1") -> list[tuple[int, int, str]]:
        """Return the stored attempts of an operation: position of the task, number and status."""
        return [(each.position, each.number, each.status) for each in self.stored(uuid).attempts]

    def claim_and_die(self, uuid: str = "1") -> Claim:
        """Claim an operation for a consumer that then does nothing."""
        row = self.stored(uuid).operation
        claim = self.store.claim(uuid, row.target.uuid, claim_request("a dead consumer"))
        assert isinstance(claim, Claim), claim
        return claim

    def close(self) -> None:
        """Close all consumers and the store."""
        for process in self.processes:
            process.consumer.close()
        self.store_harness.close()


def in_other_thread(*calls: Callable[[], Any]) -> Callable[[], None]:
    """Return an action for a script that runs calls in another thread and waits for their end."""

    def act() -> None:
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

    return act


def send_raw_message(cls: type[Task], uuid: str = "1", **arguments: Any) -> None:
    """Send a message without a class and without a store, as a script that imports neither does."""
    InMemoryBroker.at("").send("dice", message(cls, uuid=uuid, **arguments).dumps().encode())


def sent_messages(topic: str = "dice") -> list[Message]:
    """Return the messages in a topic."""
    return [Message.loads(value) for value in InMemoryBroker.at("").values(topic)]
