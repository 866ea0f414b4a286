"""One run: a client sends operations, consumers run them, faults hit, and the promises are checked at the end."""

from __future__ import annotations

import dataclasses
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from tests.chaos import ledger
from tests.chaos.fleet import CONFLUENT, PYTHON_KAFKA, Fleet, Settings
from tests.chaos.history import BROKER_KILL, BROKER_STOP, KILL, STOP, TERM, Fault
from tests.chaos.history import Rules as GroupRules
from tests.chaos.monkey import Action
from tests.chaos_operations import promises
from tests.chaos_operations.customer import Customer
from tests.chaos_operations.databases import Faulty
from tests.chaos_operations.history import OUTAGES, History, Kept, Look, Rules
from tests.chaos_operations.orders import orders
from tests.chaos_operations.plan import HELD, plan
from tests.chaos_operations.shop import Told
from tests.kafka.broker import KafkaBroker

CONSUMERS, WORKERS, PARTITIONS = 4, 2, 6
#: Seconds in which everything has to end once nothing is done any more, for each hundred operations.
DRAINING = 60.0
#: Seconds from one look at what moves to the next.
LOOK = 0.5
#: Seconds that a fault waits for somebody to be at work: the first one of a kind, and the others.
AIM = (10.0, 0.3)
#: Seconds that a task has to go on for a fault to hit it surely.
SURE = 0.1
#: Seconds that consumers have to begin.
BEGINNING = 30.0
#: Seconds that a long task takes beyond a lease.
LONGER = 0.6

RULES = Rules()
#: What is left of a lease when it was prolonged last decides when another consumer goes on: everything else is quick.
SETTINGS = {
    "KSER_LEASE": RULES.lease,
    "KSER_HEARTBEAT": RULES.heartbeat,
    "KSER_REAPER": 0.5,
    "KSER_RESEND": 5,
}
GROUP = Settings(
    rules=GroupRules(session=3, commit_interval=0.5, shutdown_timeout=RULES.shutdown_timeout, revoke_timeout=1),
    workers=WORKERS,
)


class GaveUp(Exception):
    """It makes no sense to go on."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    database: str
    seed: int
    seconds: float
    processes: int
    history: History
    #: What was not expected of processes, or of whoever hands in.
    problems: Sequence[str]
    #: What processes wrote last.
    last_words: Sequence[str]

    @cached_property
    def broken(self) -> list[str]:
        """Everything that must not be."""
        return [*self.problems, *map(str, promises.broken(self.history))]

    @cached_property
    def hits(self) -> Counter[str]:
        return promises.hits(self.history)


class Crew(Fleet):
    """Consumers of both transports, in one group."""

    WORKER = "tests.chaos_operations.worker"
    # It may end while neither Kafka nor the database is there.
    GRACE = 20

    def __init__(self, seed: int, uri: str, servers: str, topic: str, folder: Path) -> None:
        super().__init__(GROUP, servers, topic, None, folder)
        self.group = "operations"
        self.ledger = folder / "operations.ledger"
        self.environment = {
            "KSER_DATABASE_URI": uri,
            "KSER_TOPICS": topic,
            **{name: str(value) for name, value in SETTINGS.items()},
        }
        self._chance = random.Random(f"crew {seed}")

    def is_up(self, name: str) -> bool:
        """Whether nothing is being done to a process."""
        return name in self.names and name not in self._stopped

    def _settings(self) -> Settings:
        transports = [PYTHON_KAFKA, CONFLUENT]
        # The first two are of different kinds.
        transport = transports[self.started % 2] if self.started <= 2 else self._chance.choice(transports)
        return dataclasses.replace(self.settings, transport=transport)


class Chaos:
    """A run."""

    def __init__(self, kafka: KafkaBroker, database: Faulty, folder: Path, seed: int, count: int, seconds: float):
        self.seed = seed
        self._kafka, self._database = kafka, database
        topic = f"operations-{uuid.uuid4()}"
        kafka.create_topic(topic, PARTITIONS)
        self.crew = Crew(seed, database.uri, kafka.bootstrap_servers, topic, folder)
        self._orders = orders(seed, count, seconds, long=RULES.lease + LONGER)
        self._takes = {order.uuid: order.seconds for order in self._orders}
        self._plan = plan(seed, seconds, slots=CONSUMERS, lease=RULES.lease)
        self.customer = Customer(database.uri, kafka.bootstrap_servers, topic, self._orders)
        self.faults: list[Fault] = []
        self._looks: list[Look] = []
        self._begun = time.monotonic()
        self._away: dict[int, float] = {}
        self._held: dict[str, float] = {}
        #: Kinds of faults that found somebody at work.
        self._hit_by: set[str] = set()

    def perform(self) -> Outcome:
        """Do everything."""
        kept: dict[str, Kept] = {}
        with self.crew, self.customer:
            try:
                self._go()
            except GaveUp:
                self.crew.report_stuck()
            finally:
                self._heal()
            offset = time.monotonic() - time.time()
            kept = {each.uuid: Kept.of(each, offset) for each in self.customer.stored()}
            self.crew.finish()
        return Outcome(
            self._database.name,
            self.seed,
            time.monotonic() - self._begun,
            self.crew.started,
            self._history(kept),
            [*self.crew.problems, *self.customer.problems],
            self.crew.last_words(),
        )

    def _history(self, kept: dict[str, Kept]) -> History:
        return History(
            RULES,
            self._orders,
            self.customer.accepted,
            frozenset(self.customer.resumed),
            kept,
            ledger.read(self.crew.ledger),
            [*self.crew.faults, *self.faults],
            self._looks,
        )

    def _go(self) -> None:
        slots = {slot: self.crew.start(guest=False) for slot in range(CONSUMERS)}
        if not self._wait_until(lambda: self._count(ledger.UP) >= CONSUMERS, BEGINNING):
            self.crew.problems.append(f"not all consumers began within {BEGINNING:g} s")
            raise GaveUp
        self.customer.begin()
        self._execute(slots)
        limit = DRAINING * max(1, len(self._orders) / 100)
        if not self._wait_until(self._nothing_is_open, limit):
            raise GaveUp
        self.customer.resume()
        if not self._wait_until(self._nothing_is_open, limit):
            raise GaveUp

    def _count(self, event: str) -> int:
        return sum(entry.event == event for entry in ledger.read(self.crew.ledger))

    def _nothing_is_open(self) -> bool:
        if not self.customer.is_done or not self._looks or self._looks[-1].open:
            return False
        # What was looked at before the last thing was done tells nothing.
        self._look()
        return self._looks[-1].open == 0

    # -- what is done --------------------------------------------------------------------------------------------------

    def _execute(self, slots: dict[int, str]) -> None:
        begun = time.monotonic()
        steps = [(each.at, number, True) for number, each in enumerate(self._plan)]
        steps += [(each.until, number, False) for number, each in enumerate(self._plan)]
        for due, number, begins in sorted(steps):
            self._wait_until(lambda: False, max(0, begun + due - time.monotonic()))
            action = self._plan[number]
            at = time.monotonic()
            if action.slot < 0:
                self._serve(number, action, begins)
                begun += time.monotonic() - at
                continue
            if begins:
                self._aim_at_slot(slots, action)
                # What follows is as much later.
                begun += time.monotonic() - at
            self._hit(slots, action, begins)

    def _hit(self, slots: dict[int, str], action: Action, begins: bool) -> None:
        name = slots[action.slot]
        if begins:
            at = time.monotonic()
            {KILL: self.crew.kill, TERM: self.crew.terminate, STOP: self.crew.stop}[action.kind](name)
            if action.kind == STOP and not self._away and self._database.is_held():
                self._held[name] = at
        elif action.kind == STOP:
            self.crew.go_on(name)
            if name in self._held:
                self.faults.append(Fault(HELD, "", self._held.pop(name), time.monotonic()))
        else:
            slots[action.slot] = self.crew.start(guest=False)

    def _aim(self, kind: str, names: Sequence[str]) -> str | None:
        """Wait for one of these to be at work, but not for long; returns its name."""
        first = kind not in self._hit_by
        found: list[str] = []

        def look() -> bool:
            found[:] = filter(self._is_at_work, names)
            return bool(found)

        if not self._wait_until(look, AIM[not first]):
            return None
        self._hit_by.add(kind)
        return found[0]

    def _aim_at_slot(self, slots: dict[int, str], action: Action) -> None:
        """Let a process that is at work have the slot that something is to be done to."""
        others = [name for slot, name in slots.items() if slot != action.slot and self.crew.is_up(name)]
        name = self._aim(action.kind, [slots[action.slot], *others])
        if name is not None:
            slot = next(slot for slot in slots if slots[slot] == name)
            slots[slot], slots[action.slot] = slots[action.slot], name

    def _is_at_work(self, name: str) -> bool:
        """Whether a process runs a task that takes longer than a fault does to get there."""
        now = time.monotonic()
        running = [(Told.load(subject), since) for subject, since in self.crew.running(name).items()]
        return any(since + self._takes[told.operation][told.position] > now + SURE for told, since in running)

    def _serve(self, number: int, action: Action, begins: bool) -> None:
        if begins:
            self._aim(action.kind, self.crew.names)
            self._away[number] = time.monotonic()
        if action.kind in OUTAGES:
            self._database.take_away() if begins else self._database.give_back()
        elif not begins:
            self._kafka.start()
        else:
            {BROKER_STOP: self._kafka.stop, BROKER_KILL: self._kafka.kill}[action.kind]()
        if not begins:
            self.faults.append(Fault(action.kind, "", self._away.pop(number), time.monotonic()))

    def _heal(self) -> None:
        """Whatever is away comes back."""
        for number in list(self._away):
            self._serve(number, self._plan[number], False)

    # -- what is looked at ---------------------------------------------------------------------------------------------

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Let things go on until something is true, but not longer than this; returns whether it is."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            self.crew.look()
            self._look_when_due()
            if self.crew.problems or self.customer.problems:
                raise GaveUp
            if (left := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(0.05, left))
        return found

    def _look_when_due(self) -> None:
        if not self._looks or time.monotonic() - self._looks[-1].at >= LOOK:
            self._look()
            pause = promises.longest_pause(self._history({}), healed=True) if self._looks[-1].open else 0
            if pause > RULES.patience:
                raise GaveUp

    def _look(self) -> None:
        # While it is away, the question would wait, and everything here with it.
        away = any(self._plan[number].kind in OUTAGES for number in self._away)
        found = None if away else self.customer.open()
        text = self.crew.ledger.read_bytes() if self.crew.ledger.exists() else b""
        moves = sum(text.count(f"{event} ".encode()) for event in (ledger.START, ledger.END, ledger.FAIL))
        self._looks.append(Look(time.monotonic(), moves, found))
