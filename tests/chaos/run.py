"""One chaos run: it feeds a topic, lets groups consume it, samples their offsets, and causes faults."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    FENCED,
    JOIN,
    KILL,
    LEADER_KILL,
    MORE_PARTITIONS,
    MOVED,
    NEW_TOPIC,
    STOP,
    TERM,
    DeadLetter,
    Fault,
    History,
    LoggedRecord,
    Sample,
)
from tests.chaos.hits import hits
from tests.chaos.messages import GATED, HOSTILE, POISON, OutgoingRecord, hostile_subject, payload_name
from tests.chaos.observer import (
    SUBJECT,
    Feeder,
    GroupOffsets,
    HostileFeeder,
    ReadRecord,
    Sampler,
    finished_above,
    move_offsets,
    read_topic,
)
from tests.chaos.plan import Action
from tests.kafka.broker import Kafka, KafkaBroker
from tests.kafka.hostile import HostileRecord

#: Seconds that a group has to finish all records after the last one was sent and the last fault has ended.
DRAIN_SECONDS = 90.0
#: Seconds that a group may need to start its first task.
START_SECONDS = 20.0
#: The lag in records that a group may have while records are sent all the time.
SMALL_LAG = 200
#: Seconds that a fault waits until its target is busy: after a kill the others are idle until the session is over.
AIM_SECONDS = 7.0
#: The number of kills after which none has hit a busy process.
KILL_TRIES = 4


class RunAborted(Exception):
    """A group is stalled, or one of its processes ended by itself; the histories contain the evidence."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run for one group."""

    name: str
    seed: int
    seconds: float
    transport: str
    processes: int
    history: History
    #: Texts about processes that ended without a fault, with a wrong status or too late.
    problems: Sequence[str]
    #: The last lines that each process wrote.
    last_output: Sequence[str]

    @cached_property
    def violations(self) -> list[str]:
        """The problems, and the violations of promises."""
        violations = promises.violations(self.history)
        if self.problems:
            # The run was aborted, so unfinished messages are expected.
            violations = [violation for violation in violations if violation.promise != 1]
        return [*self.problems, *map(str, violations)]

    @cached_property
    def hits(self) -> Counter[str]:
        """The number of faults that hit, by kind."""
        return hits(self.history)


class Run:
    """A chaos run; leaving its ``with`` block ends all processes and threads."""

    def __init__(
        self, kafka: Kafka, folder: Path, name: str, seed: int, settings: Sequence[Settings], partitions: int = 6
    ) -> None:
        self.name, self.seed, self.kafka, self.partitions = name, seed, kafka, partitions
        self.topic = f"chaos-{uuid.uuid4()}"
        self.kafka.create_topic(self.topic, partitions)
        self.fleets = [
            Fleet(each, kafka.bootstrap_servers, self.topic, self._new_dead_topic(each), folder) for each in settings
        ]
        self._started = time.monotonic()
        self._feeders: list[Feeder | HostileFeeder] = []
        self._samplers = [self._sampler(fleet) for fleet in self.fleets]
        self._stack = ExitStack()
        #: Faults of Kafka, which all groups share.
        self.faults: list[Fault] = []

    def _new_dead_topic(self, settings: Settings) -> str | None:
        """Create the dead-letter topic of a group that needs one, and return its name."""
        if not settings.rules.dead_letters:
            return None
        name = f"{self.topic}.{settings.transport}.dead"
        self.kafka.create_topic(name)
        return name

    def _sampler(self, fleet: Fleet) -> Sampler:
        """Return the sampler of a group."""
        return Sampler(
            self.kafka.bootstrap_servers,
            fleet.group,
            self.topic,
            delivered=lambda: self.delivered,
            path=fleet.ledger,
            dead_topic=fleet.dead_topic,
            stall_seconds=fleet.settings.rules.stall_seconds,
        )

    @property
    def delivered(self) -> int:
        """The number of delivered records of the topic."""
        return sum(feeder.delivered for feeder in self._feeders)

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

    # -- records and faults --------------------------------------------------------------------------------------------

    def feed(self, records: Iterable[OutgoingRecord], rate: float) -> None:
        """Start to send records.

        :param rate: records per second.
        """
        feeder = Feeder(self.kafka.bootstrap_servers, self.topic, iter(records), rate)
        self._feeders.append(feeder)
        feeder.start()

    def feed_hostile_records(self, records: Sequence[HostileRecord], rate: float) -> None:
        """Start to send hostile records to random partitions.

        :param rate: records per second.
        """
        hostile = HostileFeeder(self.kafka, self.topic, records, self.partitions, rate, self.seed)
        self._feeders.append(hostile)
        hostile.start()

    def stop_feeding(self) -> None:
        """Stop sending, and wait until all sent records are delivered."""
        for feeder in self._feeders:
            feeder.stop()
            assert not feeder.problems, f"records could not be sent, so the run proves nothing: {feeder.problems[:3]}"

    def wait_for_feeding(self, seconds: float) -> None:
        """Wait until all records are delivered."""
        is_fed = self.wait_until(lambda: not any(feeder.is_alive() for feeder in self._feeders), seconds)
        assert is_fed, f"not all records were sent within {seconds} s"

    def wait_for_first_task(self) -> None:
        """Wait until each group has started a task."""
        for fleet in self.fleets:
            if not self.wait_until(partial(fleet.has_event, ledger.START), START_SECONDS):
                fleet.problems.append(f"{fleet.group} started no task within {START_SECONDS} s")
                raise RunAborted(fleet.problems[-1])

    def wait_for_tasks_of_all(self) -> None:
        """Wait until each process has started a task."""
        for fleet in self.fleets:
            self.wait_until(lambda: all(map(fleet.has_started_a_task, fleet.names)), START_SECONDS)  # noqa: B023

    def wait_for_gated_tasks(self) -> None:
        """Wait until each group runs the tasks of all gated records, and has finished all other records."""
        for fleet in self.fleets:
            self.wait_until(partial(self._has_only_gated, fleet), DRAIN_SECONDS)

    def wait_for_gated_starts(self) -> None:
        """Wait until each group runs the task of a gated record."""
        for fleet in self.fleets:
            self.wait_until(lambda: self._started_gated(fleet), START_SECONDS)  # noqa: B023

    def _started_gated(self, fleet: Fleet) -> set[str]:
        """Return the subjects of the gated records whose tasks have started."""
        subjects = (entry.subject for entry in ledger.read(fleet.ledger) if entry.event == ledger.START)
        return {subject for subject in subjects if subject.startswith(GATED)}

    def _has_only_gated(self, fleet: Fleet) -> bool:
        gated = self._started_gated(fleet)
        ended = {entry.subject for entry in ledger.read(fleet.ledger) if entry.event == ledger.END}
        return len(gated) == self.partitions and len(ended) == self.delivered - len(gated)

    def wait_until_busy(self, fleet: Fleet, name: str, seconds: float = AIM_SECONDS) -> None:
        """Wait some time for a process to be busy, because a fault of an idle process proves nothing."""
        self.wait_until(lambda: fleet.is_busy(name), seconds)

    def kill_at_work(self, fleet: Fleet) -> None:
        """Replace a busy process by a new one; repeat this if the process had ended its task just before the kill."""
        for _ in range(KILL_TRIES):
            name = fleet.names[0]
            self.wait_until_busy(fleet, name)
            fleet.kill(name)
            killed_at, interrupted = fleet.faults[-1].at, fleet.running(name)
            fleet.start()
            if any(started_at <= killed_at for started_at in interrupted.values()):
                return

    def add_partitions(self, partitions: int) -> None:
        """Add partitions to the topic.

        :param partitions: the new number of partitions.
        """
        at = time.monotonic()
        self.kafka.grow_topic(self.topic, partitions)
        self.partitions = partitions
        self.faults.append(Fault(MORE_PARTITIONS, "", at, time.monotonic()))

    def start(self, count: int) -> None:
        """Start ``count`` consumers in each group."""
        for fleet in self.fleets:
            for _ in range(count):
                fleet.start(joins=False)

    def wait(self, seconds: float) -> None:
        """Let the groups work for some time.

        :raises RunAborted: a group is stalled, or one of its processes ended by itself.
        """
        self.wait_until(lambda: False, seconds)

    def wait_until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Let the groups work until a condition is true, but at most ``seconds``; return whether it is true.

        :raises RunAborted: a group is stalled, or one of its processes ended by itself.
        """
        deadline = time.monotonic() + seconds
        while not (is_met := condition()):
            for fleet, sampler in zip(self.fleets, self._samplers, strict=True):
                fleet.check_processes()
                assert sampler.is_alive(), "the sampler has ended"
                if sampler.stall:
                    fleet.dump_stacks()
                if fleet.problems:
                    raise RunAborted(fleet.problems[0])
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            time.sleep(min(0.02, remaining))
        return bool(is_met)

    def drain(self) -> None:
        """Stop sending, wait until all records are committed, and end all consumers."""
        self.stop_feeding()
        at = time.monotonic()
        if not self.wait_until(lambda: not any(sampler.lag_since(at) for sampler in self._samplers), DRAIN_SECONDS):
            for fleet, sampler in zip(self.fleets, self._samplers, strict=True):
                fleet.dump_stacks()
                fleet.problems.append(
                    f"{fleet.group} still had a lag of {sampler.lag_since(at)} after {DRAIN_SECONDS} s"
                )
        for fleet in self.fleets:
            fleet.finish()

    def catch_up(self) -> None:
        """Wait until the lag of each group is small."""
        # Deliver the records that were sent during the outage first, because undelivered records are no lag.
        self.wait_until(lambda: all(feeder.undelivered < SMALL_LAG for feeder in self._feeders), DRAIN_SECONDS)
        at = time.monotonic()
        self.wait_until(lambda: all(sampler.lag_since(at) < SMALL_LAG for sampler in self._samplers), DRAIN_SECONDS)

    def execute(self, actions: Sequence[Action]) -> None:
        """Carry out a plan, in each group at the same times."""
        slots = [dict(enumerate(fleet.names)) for fleet in self.fleets]
        started = time.monotonic()
        steps = [(action.at, number, True) for number, action in enumerate(actions)]
        steps += [(action.until, number, False) for number, action in enumerate(actions)]
        for due_at, number, is_begin in sorted(steps):
            self.wait(max(0, started + due_at - time.monotonic()))
            action = actions[number]
            if action.kind in (BROKER_STOP, BROKER_KILL):
                if is_begin:
                    at = time.monotonic()
                    self.broker_outage(action.kind, action.seconds)
                    # Delay the rest of the plan by the time for the start of the broker and for catching up.
                    started += time.monotonic() - at - action.seconds
                continue
            for fleet, names in zip(self.fleets, slots, strict=True):
                at = time.monotonic()
                if is_begin and action.kind != JOIN:
                    self.wait_until_busy(fleet, names[action.slot])
                started += time.monotonic() - at
                (_begin if is_begin else _end)(fleet, names, action)

    def broker_outage(self, kind: str, seconds: float) -> None:
        """Stop or kill the broker, start it ``seconds`` later, and let the groups catch up."""
        broker = self.kafka
        assert isinstance(broker, KafkaBroker)
        at = time.monotonic()
        broker.stop() if kind == BROKER_STOP else broker.kill()
        self.wait(seconds)
        broker.start()
        self.faults.append(Fault(kind, "", at, time.monotonic()))
        self.catch_up()

    def leader_outage(self, topic: str, seconds: float) -> None:
        """Kill the leader of a topic's first partition, start it ``seconds`` later, and let the groups catch up."""
        cluster = self.kafka
        assert isinstance(cluster, Cluster)
        number = cluster.leaders(topic)[0]
        at = time.monotonic()
        cluster.nodes[number].kill()
        self.wait(seconds)
        assert cluster.leaders(topic)[0] not in (number, -1), "the partition has no new leader"
        cluster.nodes[number].start()
        self.faults.append(Fault(LEADER_KILL, "", at, time.monotonic()))
        self.catch_up()

    def create_topic_again(self) -> tuple[Fault, list[LoggedRecord]]:
        """Delete the topic with its records, and create it again; return the fault and the log of the deleted topic."""
        self.stop_feeding()
        before = [_logged(record) for record in read_topic(self.kafka.bootstrap_servers, self.topic)]
        self._feeders.clear()
        at = time.monotonic()
        for sampler in self._samplers:
            sampler.forget_topic()
        self.kafka.delete_topic(self.topic)
        self.kafka.create_topic(self.topic, self.partitions)
        return Fault(NEW_TOPIC, "", at, time.monotonic()), before

    def move_offsets(self, fleet: Fleet, distances: Mapping[int, int]) -> tuple[Fault, Sample]:
        """Move the committed offsets of a group without members, and keep their metadata.

        :param distances: the number of records by which the offset of each partition moves; below 0 is back.
        :return: the fault, and a sample of the offsets at which the group continues.
        """
        servers = self.kafka.bootstrap_servers
        with GroupOffsets(servers, fleet.group) as offsets:
            committed = offsets.committed(self.topic)
        assert committed is not None, "Kafka does not respond"
        moved = {
            number: committed[number]._replace(offset=max(0, committed[number].offset + distance))
            for number, distance in distances.items()
        }
        self._samplers[self.fleets.index(fleet)].moved = moved
        at = time.monotonic()
        move_offsets(servers, fleet.group, self.topic, moved)
        fault = Fault(MOVED, "", at, time.monotonic())
        starts = {number: moved.get(number, commit).offset for number, commit in committed.items()}
        above = {
            number: finished_above(commit.offset, commit.metadata)
            for number, commit in committed.items()
            if number not in moved
        }
        return fault, Sample(fault.until, starts, above, 0, 0, self.delivered)

    # -- outcomes ------------------------------------------------------------------------------------------------------

    def outcomes(self) -> list[Outcome]:
        """Return the outcome of each group, after the run and while Kafka still runs."""
        records = read_topic(self.kafka.bootstrap_servers, self.topic)
        log = [_logged(record) for record in records]
        # The ledger names a rejected value. Hostile records share values, so only their dead letters tell them apart.
        shared = {payload_name(record.value) for record in records if SUBJECT not in record.headers}
        assert len({record.subject for record in log}) == len(log), "a record was sent twice, so the run proves nothing"
        seconds = time.monotonic() - self._started
        return [
            Outcome(
                name=self.name,
                seed=self.seed,
                seconds=seconds,
                transport=fleet.settings.transport,
                processes=fleet.started,
                history=self._history(fleet, sampler, log, shared),
                problems=fleet.problems,
                last_output=fleet.last_output(),
            )
            for fleet, sampler in zip(self.fleets, self._samplers, strict=True)
        ]

    def _history(self, fleet: Fleet, sampler: Sampler, log: list[LoggedRecord], shared: set[str]) -> History:
        subjects = {(record.partition, record.offset): record.subject for record in log}
        dead = read_topic(self.kafka.bootstrap_servers, fleet.dead_topic) if fleet.dead_topic else []
        return History(
            rules=fleet.settings.rules,
            log=log,
            entries=[
                entry
                for entry in ledger.read(fleet.ledger)
                if entry.event != ledger.REFUSED or entry.subject not in shared
            ],
            samples=sampler.samples,
            faults=[*fleet.faults, *self.faults],
            dead=[_dead_letter(record, subjects, fleet.pids) for record in dead],
        )


def perform(run: Run, scenario: Callable[[Run], None]) -> list[Outcome]:
    """Perform a scenario, let the groups finish, and return the outcome of each group."""
    with run:
        try:
            scenario(run)
            run.drain()
        except RunAborted as problem:
            # The abort is a problem of every group, because none could finish.
            reason = str(problem).partition("\n")[0]
            for fleet in run.fleets:
                fleet.problems = fleet.problems or [f"aborted because of another group: {reason}"]
    return run.outcomes()


def _begin(fleet: Fleet, names: dict[int, str], action: Action) -> None:
    """Begin a fault of the process in a slot."""
    if action.kind == JOIN:
        names[action.slot] = fleet.start()
    elif action.kind == KILL:
        fleet.kill(names[action.slot])
    elif action.kind == TERM:
        fleet.terminate(names[action.slot])
    elif action.kind == STOP:
        fleet.sigstop(names[action.slot])
    elif action.kind == FENCED:
        names[action.slot] = fleet.fence(names[action.slot])


def _end(fleet: Fleet, names: dict[int, str], action: Action) -> None:
    """End a fault: continue the process, or start another one in its slot."""
    if action.kind == JOIN:
        fleet.terminate(names.pop(action.slot))
    elif action.kind == STOP:
        fleet.sigcont(names[action.slot])
    elif action.kind != FENCED:
        names[action.slot] = fleet.start(instead_of=names[action.slot])


def _logged(record: ReadRecord) -> LoggedRecord:
    key = None if record.key is None else record.key.decode()
    if SUBJECT in record.headers:
        subject = record.headers[SUBJECT].decode()
        succeeds = not subject.startswith("x") and f'"failure": "{POISON}"'.encode() not in (record.value or b"")
    else:
        header_bytes = sum(len(name.encode()) + len(value) for name, value in record.headers.items())
        subject = hostile_subject(record.partition, record.offset, record.value, header_bytes)
        succeeds = not subject.startswith(HOSTILE)
    return LoggedRecord(subject, record.partition, record.offset, key, succeeds)


def _dead_letter(record: ReadRecord, subjects: dict[tuple[int, int], str], processes: dict[int, str]) -> DeadLetter:
    """Return a dead letter of the history; its timestamp is converted to the clock of the ledger."""
    headers = {name: record.headers[f"kser-dlq-{name}"].decode() for name in ("partition", "offset", "consumer")}
    return DeadLetter(
        subject=subjects[int(headers["partition"]), int(headers["offset"])],
        process=processes[int(headers["consumer"].split()[-1])],
        at=record.timestamp - time.time() + time.monotonic(),
        position=record.offset,
    )
