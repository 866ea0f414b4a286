"""Shared harness of the durable operation tests: a shop with a database, its processes, and a clock.

Each process has classes, a registry and a consumer of its own. A consumer of another group gets each record once more:
as after a rebalance, or from a producer that sent it twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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
from tests.consumer.harness import AT_ONCE, PATIENCE, Act, consumer_of
from tests.store.harness import LEASE, World, me
from tests.support import Clock, message

#: Seconds between two turns of what runs beside a consumer, when a test lets time pass.
TURN = 5.0

Learnt = TypeVar("Learnt", bound=type[Task])


class Sale(Operation):
    """Three tasks that do what the test says: ``<uuid>.a``, ``.b`` and ``.c``. It runs in one consumer."""

    names: ClassVar[str] = "abc"

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Act(f"{self.uuid}.{name}") for name in self.names]


class Spread(Sale):
    """The same over the consumers."""

    DISTRIBUTED = True


#: Both ways to run an operation.
BOTH_WAYS = pytest.mark.parametrize("cls", [Sale, Spread], ids=["in one consumer", "over the consumers"])


class Process:
    """What one process has: its classes, its registry and its consumer.

    :param store: the shared database, None for a process that has none.
    :param options: of its consumer; ``group``, and ``app`` for its registry.
    """

    def __init__(self, store: Store | None, *classes: type[Task], **options: Any) -> None:
        group, app = options.pop("group", "dummy"), options.pop("app", None)

        class Own(Controller):
            ENTRYPOINTS: ClassVar[dict[Any, Any]] = {}

        self.registry = OperationRegistry(app, Own, producer=Producer({}), store=store)
        self.consumer = consumer_of({**AT_ONCE, "group_id": group}, **options)
        self.consumer.REGISTRY = self.registry.controller
        self.clock = Clock(self.consumer)
        for cls in (Act, *classes):
            self.learn(cls)
        if store is not None:
            self.companion._clock = self.clock

    def learn(self, cls: Learnt) -> Learnt:
        """Subscribe a class of this process's own, which is otherwise like ``cls``; returns it."""
        own = type(cls)(cls.__name__, (cls,), {"__module__": cls.__module__})
        return self.registry.subscribe(own)  # type: ignore[return-value]

    def known(self, cls: type[Task]) -> Any:
        """This process's own class that is like ``cls``."""
        return self.registry.controller.ENTRYPOINTS[cls.path]

    def forget(self, cls: type[Task]) -> None:
        """Be a process that does not know a class."""
        del self.registry.controller.ENTRYPOINTS[cls.path]

    @property
    def companion(self) -> RecoveryService:
        """What runs beside its consumer."""
        found = self.registry._kser_background_service
        assert found is not None
        return found

    def stop_its_heart(self) -> None:
        """Nothing runs beside its consumer from now on, as where a thread is given no time."""
        self.companion.tick = lambda: None  # type: ignore[method-assign]

    def send(self, cls: type[Task], uuid: str = "1", **params: Any) -> Any:
        """Send an operation that is not built yet; returns it."""
        return self.known(cls)(uuid=uuid, params=params).send()

    def handle(self) -> int:
        """Handle all messages that there are; returns how many."""
        return self.consumer.run_until_idle()

    def run(self, kmsg: Message) -> Result:
        """Handle a message that Kafka knows nothing of."""
        found: Result = self.registry.controller.run(kmsg.dumps())
        return found

    def step(self) -> int:
        """Handle the messages that there are now, but for those that come of them."""
        return self.consumer.step(timeout=0)


class Shop:
    """A database and the processes that share it.

    :param world: the database.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.processes: list[Process] = []
        #: The one that most tests need.
        self.first = self.process(Sale, Spread)
        self.registry = self.first.registry

    def process(self, *classes: type[Task], **options: Any) -> Process:
        """One more process, which knows these classes."""
        store = self.world.other if self.processes else self.world.store
        self.processes.append(Process(options.pop("store", store), *classes, **options))
        return self.processes[-1]

    @property
    def store(self) -> Store:
        """The database, as nobody's."""
        return self.world.store

    def pass_by(self, seconds: float) -> None:
        """Let time pass, for the database and for all processes."""
        self.world.pass_by(seconds)
        for process in self.processes:
            process.clock.pass_by(seconds)

    def live(self, seconds: float, process: Process | None = None) -> None:
        """Let time pass in which what runs beside a consumer has its turns; what it sends is left on Kafka."""
        passed = 0.0
        while passed < seconds:
            (process or self.first).companion.tick()
            self.pass_by(TURN)
            passed += TURN
        (process or self.first).companion.tick()

    def stored(self, uuid: str = "1") -> OperationSnapshot:
        """What is stored of an operation."""
        found = self.store.snapshot(uuid)
        assert found is not None
        return found

    def status(self, uuid: str = "1") -> str:
        """The status of an operation."""
        return self.stored(uuid).operation.status

    def has_ended(self, uuid: str = "1") -> bool:
        """Whether an operation has ended; also for one that is not there yet."""
        row = self.store.get_operation(uuid)
        return row is not None and is_final(row.status)

    def tasks(self, uuid: str = "1") -> list[str]:
        """The status of each of its tasks."""
        return [task.status for task in self.stored(uuid).tasks]

    def kinds(self, uuid: str = "1") -> list[str]:
        """What happened to it."""
        return [event.kind for event in self.stored(uuid).events]

    def attempts(self, uuid: str = "1") -> list[tuple[int, int, str]]:
        """The position of the task, the number and what came of it, for each attempt at its tasks."""
        return [(each.position, each.number, each.status) for each in self.stored(uuid).attempts]

    def seize(self, uuid: str = "1") -> Claim:
        """Claim an operation for a process that dies the next moment."""
        row = self.stored(uuid).operation
        claim = self.store.claim(uuid, row.target.uuid, me("the dead"))
        assert isinstance(claim, Claim), claim
        return claim

    def close(self) -> None:
        """The end of all processes."""
        for process in self.processes:
            process.consumer.close()
        self.world.close()


def meanwhile(*calls: Callable[[], Any]) -> Callable[[], None]:
    """What a task does while other threads do something else: it waits for them."""

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
        thread.join(PATIENCE)
        assert not thread.is_alive(), "what happens meanwhile does not end"
        if errors:
            raise errors[0]

    return act


def bare(cls: type[Task], uuid: str = "1", **arguments: Any) -> None:
    """Send a message as a script does that knows no class and has no database."""
    InMemoryBroker.at("").send("dice", message(cls, uuid=uuid, **arguments).dumps().encode())


def sent(topic: str = "dice") -> list[Message]:
    """What was sent to a topic."""
    return [Message.loads(value) for value in InMemoryBroker.at("").values(topic)]


def expire() -> float:
    """Seconds after which a lease is over that nobody prolongs."""
    return LEASE + 1


def shops(world: World) -> Iterator[Shop]:
    """A shop that is closed after the test."""
    shop = Shop(world)
    yield shop
    shop.close()
