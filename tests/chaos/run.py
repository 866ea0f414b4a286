"""One run: a topic that is fed, groups that consume it and are watched, faults, and in the end their histories."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos import ledger, promises
from tests.chaos.cluster import Cluster
from tests.chaos.fleet import Fleet, Settings
from tests.chaos.history import (
    BROKER_KILL,
    BROKER_STOP,
    JOIN,
    KILL,
    LEADER_KILL,
    MORE_PARTITIONS,
    STOP,
    TERM,
    DeadLetter,
    Fault,
    History,
    Logged,
)
from tests.chaos.hits import hits
from tests.chaos.messages import Order
from tests.chaos.monkey import Action
from tests.chaos.observer import SUBJECT, Feeder, Found, Sampler, read_topic
from tests.kafka.broker import Kafka, KafkaBroker

#: Seconds that a group has to finish everything once no more is sent and all faults are over.
DRAINING = 90.0
#: Seconds that a group may need to begin.
BEGINNING = 20.0
#: Messages that a group may be behind while more are sent all the time.
LITTLE = 200
#: Seconds that a fault waits for its target to be at work: after a kill the others wait until its session is over.
AIM = 7.0
#: Kills until one finds a process at work.
TRIES = 4


class GaveUp(Exception):
    """A group is stuck, or one of its processes ended by itself; the histories tell the rest."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run for one group."""

    name: str
    seed: int
    seconds: float
    transport: str
    processes: int
    history: History
    #: What processes did that nobody did to them.
    problems: Sequence[str]
    #: What processes wrote last.
    last_words: Sequence[str]

    @cached_property
    def broken(self) -> list[str]:
        """Everything that must not be."""
        found = promises.broken(self.history)
        if self.problems:
            # It was cut short: of course something is missing.
            found = [violation for violation in found if violation.promise != 1]
        return [*self.problems, *map(str, found)]

    @cached_property
    def hits(self) -> Counter[str]:
        return hits(self.history)


class Run:
    """To be used in a ``with``: whatever happens, no process and no thread is left after it."""

    def __init__(
        self, kafka: Kafka, folder: Path, name: str, seed: int, settings: Sequence[Settings], partitions: int = 6
    ) -> None:
        self.name, self.seed, self.kafka, self.partitions = name, seed, kafka, partitions
        self.topic = f"chaos-{uuid.uuid4()}"
        self.kafka.create_topic(self.topic, partitions)
        self.fleets = [Fleet(each, kafka.bootstrap_servers, self.topic, self._dead(each), folder) for each in settings]
        self._begun = time.monotonic()
        self._feeders: list[Feeder] = []
        self._samplers = [self._sampler(fleet) for fleet in self.fleets]
        self._stack = ExitStack()
        #: Faults of Kafka, which all groups share.
        self.faults: list[Fault] = []

    def _dead(self, settings: Settings) -> str | None:
        if not settings.rules.dead_letters:
            return None
        name = f"{self.topic}.{settings.transport}.dead"
        self.kafka.create_topic(name)
        return name

    def _sampler(self, fleet: Fleet) -> Sampler:
        return Sampler(
            self.kafka.bootstrap_servers,
            fleet.group,
            self.topic,
            delivered=lambda: sum(feeder.delivered for feeder in self._feeders),
            path=fleet.ledger,
            dead_topic=fleet.dead_topic,
            patience=fleet.settings.rules.patience,
        )

    def __enter__(self) -> Self:
        for fleet, sampler in zip(self.fleets, self._samplers, strict=True):
            self._stack.enter_context(fleet)
            sampler.start()
            self._stack.callback(sampler.stop)
        self._stack.callback(self.stop_feeding)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- what is done --------------------------------------------------------------------------------------------------

    def feed(self, orders: Iterable[Order], rate: float) -> None:
        """Send these, so many a second, from now on."""
        feeder = Feeder(self.kafka.bootstrap_servers, self.topic, iter(orders), rate)
        self._feeders.append(feeder)
        feeder.start()

    def stop_feeding(self) -> None:
        """Send no more, and wait until everything has arrived."""
        for feeder in self._feeders:
            feeder.stop()
            assert not feeder.problems, f"not sent, which is no fault of a consumer: {feeder.problems[:3]}"

    def wait_for_feeding(self, seconds: float) -> None:
        """Wait until everything was sent."""
        fed = self.wait_until(lambda: not any(feeder.is_alive() for feeder in self._feeders), seconds)
        assert fed, f"not everything was sent within {seconds} s"

    def wait_for_beginning(self) -> None:
        """Wait until each group runs tasks."""
        for fleet in self.fleets:
            if not self.wait_until(partial(fleet.has_noted, ledger.START), BEGINNING):
                fleet.problems.append(f"{fleet.group} began nothing within {BEGINNING} s")
                raise GaveUp(fleet.problems[-1])

    def wait_for_work(self, fleet: Fleet, name: str, seconds: float = AIM) -> None:
        """Wait for a process to be at work, but not for long: what is done to an idle one shows nothing."""
        self.wait_until(lambda: fleet.is_busy(name), seconds)

    def kill_at_work(self, fleet: Fleet) -> None:
        """Kill a process and start another one, again if it ended its task just before."""
        for _ in range(TRIES):
            name = fleet.names[0]
            self.wait_for_work(fleet, name)
            fleet.kill(name)
            at, cut_off = fleet.faults[-1].at, fleet.running(name)
            fleet.start()
            if any(since <= at for since in cut_off.values()):
                return

    def grow(self, partitions: int) -> None:
        """Add partitions to the topic."""
        at = time.monotonic()
        self.kafka.grow_topic(self.topic, partitions)
        self.partitions = partitions
        self.faults.append(Fault(MORE_PARTITIONS, "", at, time.monotonic()))

    def start(self, count: int) -> None:
        """Start so many consumers in each group."""
        for fleet in self.fleets:
            for _ in range(count):
                fleet.start(guest=False)

    def wait(self, seconds: float) -> None:
        """Let things go on.

        :raises GaveUp: that makes no sense any more.
        """
        self.wait_until(lambda: False, seconds)

    def wait_until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Let things go on until something is true, but not longer than this; returns whether it is."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            for fleet, sampler in zip(self.fleets, self._samplers, strict=True):
                fleet.look()
                assert sampler.is_alive(), "nobody watches"
                if sampler.stuck:
                    fleet.report_stuck()
                if fleet.problems:
                    raise GaveUp(fleet.problems[0])
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(0.02, left))
        return bool(found)

    def drain(self) -> None:
        """Send no more, wait until everything is committed, and end all consumers."""
        self.stop_feeding()
        at = time.monotonic()
        if not self.wait_until(lambda: not any(sampler.lag_since(at) for sampler in self._samplers), DRAINING):
            for fleet, sampler in zip(self.fleets, self._samplers, strict=True):
                fleet.report_stuck()
                fleet.problems.append(f"{fleet.group} still had a lag of {sampler.lag_since(at)} after {DRAINING} s")
        for fleet in self.fleets:
            fleet.finish()

    def catch_up(self) -> None:
        """Wait until no group lags behind what is sent by more than a moment."""
        # What could not be sent comes first, or there would seem to be no lag.
        self.wait_until(lambda: all(feeder.waiting < LITTLE for feeder in self._feeders), DRAINING)
        at = time.monotonic()
        self.wait_until(lambda: all(sampler.lag_since(at) < LITTLE for sampler in self._samplers), DRAINING)

    def execute(self, actions: Sequence[Action]) -> None:
        """Carry out a plan, in each group at the same times."""
        slots = [dict(enumerate(fleet.names)) for fleet in self.fleets]
        begun = time.monotonic()
        steps = [(each.at, number, True) for number, each in enumerate(actions)]
        steps += [(each.until, number, False) for number, each in enumerate(actions)]
        for due, number, begins in sorted(steps):
            self.wait(max(0, begun + due - time.monotonic()))
            action = actions[number]
            if action.kind in (BROKER_STOP, BROKER_KILL):
                if begins:
                    at = time.monotonic()
                    self.lose_broker(action.kind, action.seconds)
                    # What follows is as much later as starting and catching up took.
                    begun += time.monotonic() - at - action.seconds
                continue
            for fleet, names in zip(self.fleets, slots, strict=True):
                at = time.monotonic()
                if begins and action.kind != JOIN:
                    self.wait_for_work(fleet, names[action.slot])
                begun += time.monotonic() - at
                (_begin if begins else _end)(fleet, names, action)

    def lose_broker(self, kind: str, seconds: float) -> None:
        """Stop or kill the broker, and start it again so much later."""
        broker = self.kafka
        assert isinstance(broker, KafkaBroker)
        at = time.monotonic()
        broker.stop() if kind == BROKER_STOP else broker.kill()
        self.wait(seconds)
        broker.start()
        self.faults.append(Fault(kind, "", at, time.monotonic()))
        self.catch_up()

    def lose_leader(self, topic: str, seconds: float) -> None:
        """Kill the node that leads the first partition of a topic, and start it again so much later."""
        cluster = self.kafka
        assert isinstance(cluster, Cluster)
        number = cluster.leaders(topic)[0]
        at = time.monotonic()
        cluster.nodes[number].kill()
        self.wait(seconds)
        assert cluster.leaders(topic)[0] not in (number, -1), "nobody leads in its place"
        cluster.nodes[number].start()
        self.faults.append(Fault(LEADER_KILL, "", at, time.monotonic()))
        self.catch_up()

    # -- what came of it -----------------------------------------------------------------------------------------------

    def outcomes(self) -> list[Outcome]:
        """To be asked for when the run is over, and Kafka still there."""
        found = read_topic(self.kafka.bootstrap_servers, self.topic)
        log = [_logged(record) for record in found]
        assert len({record.subject for record in log}) == len(log), "something was sent twice: no fault of a consumer"
        seconds = time.monotonic() - self._begun
        return [
            Outcome(
                name=self.name,
                seed=self.seed,
                seconds=seconds,
                transport=fleet.settings.transport,
                processes=fleet.started,
                history=self._history(fleet, sampler, log),
                problems=fleet.problems,
                last_words=fleet.last_words(),
            )
            for fleet, sampler in zip(self.fleets, self._samplers, strict=True)
        ]

    def _history(self, fleet: Fleet, sampler: Sampler, log: list[Logged]) -> History:
        places = {(record.partition, record.offset): record.subject for record in log}
        dead = read_topic(self.kafka.bootstrap_servers, fleet.dead_topic) if fleet.dead_topic else []
        return History(
            rules=fleet.settings.rules,
            log=log,
            entries=ledger.read(fleet.ledger),
            samples=sampler.samples,
            faults=[*fleet.faults, *self.faults],
            dead=[_dead_letter(record, places, fleet.pids) for record in dead],
        )


def perform(run: Run, what: Callable[[Run], None]) -> list[Outcome]:
    """Do something to a run, let the groups finish, and tell what came of it."""
    with run:
        try:
            what(run)
            run.drain()
        except GaveUp as problem:
            # What is wrong with the run is in its history; what it was cut short for counts for all of its groups.
            reason = str(problem).partition("\n")[0]
            for fleet in run.fleets:
                fleet.problems = fleet.problems or [f"cut short because of another group: {reason}"]
    return run.outcomes()


def _begin(fleet: Fleet, names: dict[int, str], action: Action) -> None:
    if action.kind == JOIN:
        names[action.slot] = fleet.start()
    elif action.kind == KILL:
        fleet.kill(names[action.slot])
    elif action.kind == TERM:
        fleet.terminate(names[action.slot])
    elif action.kind == STOP:
        fleet.stop(names[action.slot])


def _end(fleet: Fleet, names: dict[int, str], action: Action) -> None:
    if action.kind == JOIN:
        fleet.terminate(names.pop(action.slot))
    elif action.kind == STOP:
        fleet.go_on(names[action.slot])
    else:
        names[action.slot] = fleet.start()


def _logged(record: Found) -> Logged:
    key = None if record.key is None else record.key.decode()
    return Logged(record.headers[SUBJECT].decode(), record.partition, record.offset, key)


def _dead_letter(record: Found, places: dict[tuple[int, int], str], processes: dict[int, str]) -> DeadLetter:
    """Kafka writes down the time of day; the ledger counts from when the machine was started."""
    about = {name: record.headers[f"kser-dlq-{name}"].decode() for name in ("partition", "offset", "consumer")}
    return DeadLetter(
        subject=places[int(about["partition"]), int(about["offset"])],
        process=processes[int(about["consumer"].split()[-1])],
        at=record.written - time.time() + time.monotonic(),
        position=record.offset,
    )
