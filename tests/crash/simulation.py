"""One database and one in-memory broker, with the outcome of an operation under a plan of faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from uuid import uuid4

from kser.attempt import current_attempt
from kser.dummy.broker import InMemoryBroker
from kser.errors import StoreUnavailable
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.operation import Operation
from kser.store.model import ClaimRefused, OperationSnapshot
from tests.crash.faults import (
    BEFORE,
    CHECKPOINT,
    CLAIM,
    KILLED,
    LOST,
    MOMENTS,
    POINTS,
    RELEASED,
    RETRY,
    SAVE,
    SLEPT,
    TAKE_UP,
    TERMINAL,
    Call,
    Fault,
    Killed,
)
from tests.crash.process import Process
from tests.crash.shop import TOPIC, Entry, Scenario

#: Seconds that pass when nothing happens.
IDLE: Final = 5.0
#: Turns in which nothing happens, after which something is wrong: what is lost again and again is sent once an hour.
LONGEST: Final = 1500
#: Calls that a turn makes at the most.
TURN: Final = 60
#: When those wake up whose moment never came.
LAST: Final = "at last"


class Story:
    """What became of a fault.

    :param stored: what was in the database then.
    :param process: whom it hit.
    :param last: offset of the last record then.
    """

    def __init__(self, fault: Fault, stored: str, process: str, last: int) -> None:
        self.fault = fault
        self.stored = stored
        self.process = process
        self.last = last
        #: What came next, once that is known.
        self.next = ""


class Simulation:
    """Runs a scenario, with everything that a plan says.

    :param store: the database.
    :param pass_by: puts its clock forward, to so many seconds.
    """

    def __init__(
        self, store: Any, set_clock: Callable[[float], None], scenario: Scenario, plan: Sequence[Fault]
    ) -> None:
        self.store = store
        self.scenario = scenario
        self.uuid = str(uuid4())
        self.plan: Mapping[int, Fault] = {fault.at: fault for fault in plan}
        self._naps = [fault.at for fault in plan if fault.kind in SLEPT]
        self._set_clock = set_clock
        self._now = 0.0
        #: What was called, what hit, and what ran.
        self.calls: list[Call] = []
        self.hits: list[tuple[Fault, Call]] = []
        self.ledger: list[Entry] = []
        #: Numbers of calls that only repeat others, in turns in which nothing happens.
        self.dull: set[int] = set()
        #: At what sleepers woke.
        self.wakings: list[str] = []
        #: What is wrong, as soon as it is seen.
        self.wrong: list[str] = []
        #: How often whoever sends it got an error.
        self.unsent = 0
        #: What is told of each fault that hit, for the table: what was stored, and what came next.
        self.stories: list[Story] = []
        self.sends = self._idle = self._marks = 0
        self._asleep: list[tuple[Process, str]] = []
        #: Why the reaper took it up last, and why it sent the records that it sent, by their offset.
        self._reason = ""
        self._reasons: dict[int, str] = {}
        self._count = 0
        self.bus = InMemoryBroker.at("")

    @property
    def may_sleep_soon(self) -> bool:
        """Whether what is done next may fall asleep, and so needs a thread of its own."""
        return any(len(self.calls) <= at < len(self.calls) + TURN for at in self._naps)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self._now

    @now.setter
    def now(self, seconds: float) -> None:
        self._now = seconds
        self._set_clock(seconds)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> Simulation:
        """Bring the operation to its end."""
        self._begin()
        process, done, turns = self._new(), 0, 0
        while done < 2:
            before = len(self.calls)
            try:
                busy = process.do(process.turn)
            except Killed:
                self._retire(process)
                process, busy = self._new(), True
            self._idle = 0 if busy else self._idle + 1
            if self._idle:
                self.now += IDLE
            if self._idle > 1:
                self.dull.update(range(before, len(self.calls)))
            turns += 1
            if self._idle > LONGEST or turns > 2 * LONGEST:
                self.wrong.append(f"it does not end: {self.look()}")
                break
            # One more turn, for what is only done then.
            done = 0 if busy or not self._has_ended() else done + 1
            if done and self._asleep:
                self._rouse(LAST, *MOMENTS)
                done = 0
        self._rouse(LAST, *MOMENTS)
        process.die()
        return self

    def _new(self, *, consumes: bool = True) -> Process:
        self._count += 1
        return Process(self, f"process {self._count}", consumes=consumes)

    def _retire(self, process: Process) -> None:
        process.expel() if process.sleeps else process.die()

    def _begin(self) -> None:
        """The operation is sent, and sent again by somebody else as long as nobody has accepted it."""
        if self.scenario.by_message:
            process = self._new(consumes=False)
            message = Message(uuid=self.uuid, entrypoint=process.classes[-1].path, params={"order": 42})
            self.bus.send(TOPIC, message.dumps().encode())
            return
        while self.store.get_operation(self.uuid) is None:
            process = self._new(consumes=False)
            try:
                process.do(lambda: self._send(process))  # noqa: B023  it is called at once
            except StoreUnavailable:
                # After three attempts; whoever sends it hears of it.
                self.unsent += 1
            except Killed:
                self._retire(process)

    def _send(self, process: Process) -> None:
        order: Any = process.classes[-1]
        operation = order(uuid=self.uuid, params={"order": 42}).build()
        operation.send() if self.scenario.way == "send" else operation.launch()

    def _has_ended(self) -> bool:
        row = self.store.get_operation(self.uuid)
        return row is not None and row.ended_at is not None

    def look(self) -> OperationSnapshot | None:
        """What is stored."""
        found: OperationSnapshot | None = self.store.snapshot(self.uuid)
        return found

    # -- points --------------------------------------------------------------------------------------------------------

    def at(self, process: Process, point: str, act: Callable[[], Any], trouble: Callable[[], Exception] | None) -> Any:
        """A process calls something."""
        call = Call(len(self.calls), point, process.name)
        self.calls.append(call)
        fault = self.plan.get(call.number)
        if fault is None or fault.kind not in POINTS[point]:
            return self._done(process, point, act())
        self.hits.append((fault, call))
        if fault.kind in BEFORE:
            self._strike(process, fault, trouble)
        if fault.kind == LOST:
            # As if it had been sent.
            return None
        try:
            answer = self._done(process, point, act())
        except Exception:
            self._strike_after(process, fault, trouble)
            raise
        self._strike_after(process, fault, trouble)
        return answer

    def _strike_after(self, process: Process, fault: Fault, trouble: Callable[[], Exception] | None) -> None:
        if fault.kind not in BEFORE:
            self._strike(process, fault, trouble)

    def _strike(self, process: Process, fault: Fault, trouble: Callable[[], Exception] | None) -> None:
        """What is to go wrong does; returns when the process goes on."""
        self._tell(process, fault)
        if fault.kind in KILLED:
            process.die()
            raise Killed
        if fault.kind in SLEPT:
            self._fall_asleep(process, fault)
        elif trouble is not None and fault.kind != LOST:
            raise trouble()

    def _fall_asleep(self, process: Process, fault: Fault) -> None:
        self._asleep.append((process, fault.moment))
        process.sleep()

    def _done(self, process: Process, point: str, answer: Any) -> Any:
        """A call of a process took effect: those wake who wait for that."""
        if point in (CLAIM, SAVE) and not isinstance(answer, ClaimRefused):
            self._continue(process)
            if answer is not None:
                self._rouse("claimed", but=process)
        elif point in (CHECKPOINT, RETRY, RELEASED):
            self._continue(process)
            self._rouse("recorded", but=process)
        elif point == TERMINAL:
            self._continue(process)
            self._rouse("ended", but=process)
        elif point == TAKE_UP and answer:
            self._reason = answer[0].reason
            self._rouse("reaped", but=process)
        return answer

    def _rouse(self, *moments: str, but: Process | None = None) -> None:
        for process, moment in list(self._asleep):
            if moment in moments and process is not but:
                self._asleep.remove((process, moment))
                self.wakings.append(moments[0])
                before = self.look()
                process.wake()
                self._check_zombie(process, before)

    def _check_zombie(self, process: Process, before: OperationSnapshot | None) -> None:
        """What nobody but its owner may change, a process that has just woken up has not changed."""
        held = before is not None and before.operation.owner not in (None, process.owner)
        ended = before is not None and before.operation.ended_at is not None
        if (held or ended) and before != self.look():
            self.wrong.append(f"{process.name} woke up and changed {before} to {self.look()}")

    # -- what is watched -----------------------------------------------------------------------------------------------

    def note(self, process: Process, what: str, entry: Any) -> str:
        """Something of the user's runs; returns what it gives."""
        self._marks += 1
        found = self.look()
        stored = [(task.status, task.result) for task in found.tasks] if found else []
        seen = dict(entry.result.retval)
        mark = f"{what} {self._marks}"
        attempt = 1 if isinstance(entry, Operation) else entry.attempt
        self.ledger.append(Entry(process.name, what, entry.uuid, attempt, seen, mark, tuple(stored)))
        return mark

    def put(self, process: Process) -> None:
        """A record was put on the bus."""
        self.sends += 1
        last = sum(len(log) for log in self.bus.topics[TOPIC]) - 1
        if process.reaps:
            self._reasons[last] = self._reason

    def check_commits(self) -> None:
        """What is committed, the database answers for."""
        for (_group, place), commit in self.bus.committed.items():
            for record in self.bus.topics[place.topic][place.partition][: commit.offset]:
                message = json.loads(record.value or b"")
                root = message["metadata"].get(OPERATION_KEY, message["uuid"])
                if self.store.get_operation(root) is None:
                    self.wrong.append(f"offset {record.offset} is committed, and nobody answers for it")

    def _tell(self, process: Process, fault: Fault) -> None:
        """Begin the story of a fault: what is stored now."""
        row = self.store.get_operation(self.uuid)
        if row is None:
            text = "nothing"
        elif row.ended_at is not None:
            text = row.status
        elif row.owner is not None:
            text = "claimed"
        else:
            text = "ready, later" if row.due_at > self._clock_of_store(row) else "ready"
        last = sum(len(log) for log in self.bus.topics.get(TOPIC, [])) - 1
        self.stories.append(Story(fault, text, process.name, last))

    def _clock_of_store(self, row: Any) -> float:
        # Nobody is told the time of the store: a step that waits is looked at when it is due.
        return -1.0 if row.next_check_at == row.due_at else row.due_at

    def _continue(self, process: Process) -> None:
        """Somebody goes on: that is what came of all faults that were waiting for it."""
        for story in self.stories:
            if story.next:
                continue
            offset = _offset_in_hand()
            if offset > story.last and offset in self._reasons:
                story.next = f"the reaper sends the step: {self._reasons[offset]}"
            elif story.process == process.name or offset > story.last:
                story.next = "the operation continues normally"
            elif process.consumer is None:
                story.next = "the sender received no confirmation and sends it again"
            else:
                story.next = "Kafka redelivers the message"


def _offset_in_hand() -> int:
    """The record that this thread handles; -1 for none."""
    attempt = current_attempt.get()
    return -1 if attempt is None or attempt.record is None else int(attempt.record.offset)
