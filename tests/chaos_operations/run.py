"""One chaos run: a client sends operations, consumers run them, and faults hit consumers, Kafka and the database."""

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
from tests.chaos.plan import Action
from tests.chaos_operations import promises
from tests.chaos_operations.customer import Customer
from tests.chaos_operations.databases import FaultyDatabase
from tests.chaos_operations.history import OUTAGES, History, ProgressSample, Rules, StoredOperation
from tests.chaos_operations.orders import orders
from tests.chaos_operations.plan import LOCKED, fault_plan
from tests.chaos_operations.shop import RunInfo
from tests.kafka.broker import KafkaBroker

CONSUMERS, WORKERS, PARTITIONS = 4, 2, 6
#: Seconds after the last fault within which all operations must end, per hundred operations.
DRAIN_SECONDS = 60.0
#: Seconds between two samples of the progress.
SAMPLE_INTERVAL = 0.5
#: Seconds that the first fault of a kind waits for a busy process, and seconds that later faults wait.
FIRST_AIM_SECONDS, AIM_SECONDS = 10.0, 0.3
#: Seconds that a task must still take so that a fault certainly hits it.
REMAINING_SECONDS = 0.1
#: Seconds that the consumers may need to start.
START_SECONDS = 30.0
#: Seconds by which a long task is longer than a lease.
BEYOND_LEASE = 0.6

RULES = Rules()
#: The other intervals are short, so that the lease decides when another consumer continues an operation.
SETTINGS = {
    "KSER_LEASE": RULES.lease,
    "KSER_HEARTBEAT": RULES.heartbeat,
    "KSER_REAPER": 0.5,
    "KSER_RESEND": 5,
}
GROUP = Settings(
    rules=GroupRules(session_timeout=3, commit_interval=0.5, shutdown_timeout=RULES.shutdown_timeout, revoke_timeout=1),
    workers=WORKERS,
)


class RunAborted(Exception):
    """The operations are stalled, or a process or the client has a problem."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    database: str
    seed: int
    seconds: float
    processes: int
    history: History
    #: Texts about unexpected ends of processes, and about unexpected exceptions in the client.
    problems: Sequence[str]
    #: The last lines that each process wrote.
    last_output: Sequence[str]

    @cached_property
    def violations(self) -> list[str]:
        """The problems, and the violations of promises."""
        return [*self.problems, *map(str, promises.violations(self.history))]

    @cached_property
    def hits(self) -> Counter[str]:
        """The number of faults that hit, by kind."""
        return promises.hits(self.history)


class OperationFleet(Fleet):
    """Consumer processes of both transports in one group."""

    WORKER = "tests.chaos_operations.worker"
    # A consumer may have to end while both Kafka and the database are unavailable.
    GRACE_SECONDS = 20

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
        """Return whether a process has no fault."""
        return name in self.names and name not in self._stopped

    def _settings(self) -> Settings:
        transports = [PYTHON_KAFKA, CONFLUENT]
        # The first two consumers have different transports.
        transport = transports[self.started % 2] if self.started <= 2 else self._chance.choice(transports)
        return dataclasses.replace(self.settings, transport=transport)


class ChaosRun:
    """A chaos run.

    :param count: the number of operations.
    :param seconds: seconds during which operations are sent and faults hit.
    """

    def __init__(
        self, kafka: KafkaBroker, database: FaultyDatabase, folder: Path, seed: int, count: int, seconds: float
    ) -> None:
        self.seed = seed
        self._kafka, self._database = kafka, database
        topic = f"operations-{uuid.uuid4()}"
        kafka.create_topic(topic, PARTITIONS)
        self.fleet = OperationFleet(seed, database.uri, kafka.bootstrap_servers, topic, folder)
        self._orders = orders(seed, count, seconds, long=RULES.lease + BEYOND_LEASE)
        self._durations = {order.uuid: order.seconds for order in self._orders}
        self._plan = fault_plan(seed, seconds, slots=CONSUMERS, lease=RULES.lease)
        self.customer = Customer(database.uri, kafka.bootstrap_servers, topic, self._orders)
        self.faults: list[Fault] = []
        self._samples: list[ProgressSample] = []
        self._started = time.monotonic()
        #: The start of each running outage, by its number in the plan.
        self._outages: dict[int, float] = {}
        #: The time of the SIGSTOP, by name, of each suspended process that holds a lock in the database.
        self._locked: dict[str, float] = {}
        #: Kinds of faults that hit a busy process.
        self._kinds_that_hit: set[str] = set()

    def perform(self) -> Outcome:
        """Perform the run, and return its outcome."""
        stored: dict[str, StoredOperation] = {}
        with self.fleet, self.customer:
            try:
                self._run()
            except RunAborted:
                self.fleet.dump_stacks()
            finally:
                self._end_outages()
            clock_offset = time.monotonic() - time.time()
            stored = {
                operation.uuid: StoredOperation.from_operation(operation, clock_offset)
                for operation in self.customer.stored_operations()
            }
            self.fleet.finish()
        return Outcome(
            database=self._database.name,
            seed=self.seed,
            seconds=time.monotonic() - self._started,
            processes=self.fleet.started,
            history=self._history(stored),
            problems=[*self.fleet.problems, *self.customer.problems],
            last_output=self.fleet.last_output(),
        )

    def _history(self, stored: dict[str, StoredOperation]) -> History:
        return History(
            rules=RULES,
            orders=self._orders,
            accepted=self.customer.accepted,
            resumed=frozenset(self.customer.resumed),
            stored=stored,
            entries=ledger.read(self.fleet.ledger),
            faults=[*self.fleet.faults, *self.faults],
            samples=self._samples,
        )

    def _run(self) -> None:
        slots = {slot: self.fleet.start(joins=False) for slot in range(CONSUMERS)}
        if not self._wait_until(lambda: self._count(ledger.UP) >= CONSUMERS, START_SECONDS):
            self.fleet.problems.append(f"not all consumers started within {START_SECONDS:g} s")
            raise RunAborted
        self.customer.start()
        self._execute(slots)
        limit = DRAIN_SECONDS * max(1, len(self._orders) / 100)
        if not self._wait_until(self._all_have_ended, limit):
            raise RunAborted
        self.customer.resume()
        if not self._wait_until(self._all_have_ended, limit):
            raise RunAborted

    def _count(self, event: str) -> int:
        return sum(entry.event == event for entry in ledger.read(self.fleet.ledger))

    def _all_have_ended(self) -> bool:
        if not self.customer.is_idle or not self._samples or self._samples[-1].open:
            return False
        # Take a new sample, because the last one may be older than the last request of the customer.
        self._sample()
        return self._samples[-1].open == 0

    # -- faults --------------------------------------------------------------------------------------------------------

    def _execute(self, slots: dict[int, str]) -> None:
        """Carry out the plan."""
        started = time.monotonic()
        steps = [(action.at, number, True) for number, action in enumerate(self._plan)]
        steps += [(action.until, number, False) for number, action in enumerate(self._plan)]
        for due_at, number, is_begin in sorted(steps):
            self._wait_until(lambda: False, max(0, started + due_at - time.monotonic()))
            action = self._plan[number]
            at = time.monotonic()
            if action.slot < 0:
                self._change_server(number, action, is_begin)
                started += time.monotonic() - at
                continue
            if is_begin:
                self._move_busy_process_to_slot(slots, action)
                # Delay the rest of the plan by the time of the wait.
                started += time.monotonic() - at
            self._change_consumer(slots, action, is_begin)

    def _change_consumer(self, slots: dict[int, str], action: Action, is_begin: bool) -> None:
        """Begin or end a fault of the process in a slot."""
        name = slots[action.slot]
        if is_begin:
            at = time.monotonic()
            {KILL: self.fleet.kill, TERM: self.fleet.terminate, STOP: self.fleet.sigstop}[action.kind](name)
            if action.kind == STOP and not self._outages and self._database.is_locked():
                self._locked[name] = at
        elif action.kind == STOP:
            self.fleet.sigcont(name)
            if name in self._locked:
                self.faults.append(Fault(LOCKED, "", self._locked.pop(name), time.monotonic()))
        else:
            slots[action.slot] = self.fleet.start(joins=False)

    def _wait_for_busy(self, kind: str, names: Sequence[str]) -> str | None:
        """Wait some time for one of these processes to be busy, and return its name; None if none is."""
        seconds = AIM_SECONDS if kind in self._kinds_that_hit else FIRST_AIM_SECONDS
        busy: list[str] = []

        def find_busy() -> bool:
            busy[:] = filter(self._is_busy, names)
            return bool(busy)

        if not self._wait_until(find_busy, seconds):
            return None
        self._kinds_that_hit.add(kind)
        return busy[0]

    def _move_busy_process_to_slot(self, slots: dict[int, str], action: Action) -> None:
        """Exchange the process in the slot of a fault with a busy one."""
        others = [name for slot, name in slots.items() if slot != action.slot and self.fleet.is_up(name)]
        name = self._wait_for_busy(action.kind, [slots[action.slot], *others])
        if name is not None:
            slot = next(slot for slot in slots if slots[slot] == name)
            slots[slot], slots[action.slot] = slots[action.slot], name

    def _is_busy(self, name: str) -> bool:
        """Return whether a process runs a task that takes long enough for a fault to hit it."""
        end_at_least = time.monotonic() + REMAINING_SECONDS
        running = [(RunInfo.load(subject), started_at) for subject, started_at in self.fleet.running(name).items()]
        return any(
            started_at + self._durations[info.operation][info.position] > end_at_least for info, started_at in running
        )

    def _change_server(self, number: int, action: Action, is_begin: bool) -> None:
        """Begin or end an outage of the database or of Kafka."""
        if is_begin:
            self._wait_for_busy(action.kind, self.fleet.names)
            self._outages[number] = time.monotonic()
        if action.kind in OUTAGES:
            self._database.start_outage() if is_begin else self._database.end_outage()
        elif not is_begin:
            self._kafka.start()
        else:
            {BROKER_STOP: self._kafka.stop, BROKER_KILL: self._kafka.kill}[action.kind]()
        if not is_begin:
            self.faults.append(Fault(action.kind, "", self._outages.pop(number), time.monotonic()))

    def _end_outages(self) -> None:
        for number in list(self._outages):
            self._change_server(number, self._plan[number], is_begin=False)

    # -- progress ------------------------------------------------------------------------------------------------------

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Let the consumers work until a condition is true, but at most ``seconds``; return whether it is true.

        :raises RunAborted: the operations are stalled, or a process or the client has a problem.
        """
        deadline = time.monotonic() + seconds
        while not (is_met := condition()):
            self.fleet.check_processes()
            self._sample_when_due()
            if self.fleet.problems or self.customer.problems:
                raise RunAborted
            if (remaining := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(0.05, remaining))
        return is_met

    def _sample_when_due(self) -> None:
        if not self._samples or time.monotonic() - self._samples[-1].at >= SAMPLE_INTERVAL:
            self._sample()
            has_open = bool(self._samples[-1].open)
            pause = promises.longest_pause(self._history({}), without_faults=True) if has_open else 0
            if pause > RULES.stall_seconds:
                raise RunAborted

    def _sample(self) -> None:
        # Do not query the database during an outage, because the query and so this loop would block.
        is_unavailable = any(self._plan[number].kind in OUTAGES for number in self._outages)
        open_operations = None if is_unavailable else self.customer.open_operations()
        text = self.fleet.ledger.read_bytes() if self.fleet.ledger.exists() else b""
        task_events = sum(text.count(f"{event} ".encode()) for event in (ledger.START, ledger.END, ledger.FAIL))
        self._samples.append(ProgressSample(time.monotonic(), task_events, open_operations))
