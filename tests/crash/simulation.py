"""One database and one in-memory broker, and the life of one operation under a plan of faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from uuid import uuid4

from kser.attempt import current_attempt
from kser.dummy.broker import InMemoryBroker
from kser.errors import StateConflict, StoreUnavailable
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.operation import Operation
from kser.store.model import ClaimRefused, DueReason, DueStep, OperationRow, OperationSnapshot
from tests.crash.faults import (
    BEFORE_THE_CALL,
    CHECKPOINT,
    CLAIM,
    CRASH_POINTS,
    END_CHECKPOINT,
    KILLED,
    REAPER_TAKE,
    RECORD_LOST,
    RELEASE,
    RESERVE,
    RETRY_CHECKPOINT,
    SAVE,
    STALLED,
    TAKEOVER_CHECKPOINT,
    TAKEOVER_CLAIM,
    WAKE_EVENTS,
    Call,
    Fault,
    ProcessKilled,
)
from tests.crash.process import Process
from tests.crash.shop import TOPIC, LedgerEntry, Scenario

#: Seconds that pass after a step in which the process had nothing to do.
IDLE_SECONDS: Final = 5.0
#: Idle steps in a row after which the operation counts as stuck: the longest resend delay of a lost step is an hour.
MAX_IDLE_STEPS: Final = 1500
#: An upper bound of the number of calls in one step.
MAX_CALLS_PER_STEP: Final = 60
#: The wake event of processes whose own wake event never happened.
END_OF_RUN: Final = "end of run"


class Recovery:
    """A fault that was injected, and the recovery from it.

    :param stored_state: the state of the operation in the database at the fault.
    :param process: the name of the process with the fault.
    :param last_offset: offset of the last record in the topic at the fault.
    """

    def __init__(self, fault: Fault, stored_state: str, process: str, last_offset: int) -> None:
        self.fault = fault
        self.stored_state = stored_state
        self.process = process
        self.last_offset = last_offset
        #: The event that continued the operation, empty until it is known.
        self.continued_by = ""


class Simulation:
    """The life of one operation under a plan of faults.

    :param store: the database.
    :param set_clock: sets the clock of the database to a number of seconds.
    """

    def __init__(
        self, store: Any, set_clock: Callable[[float], None], scenario: Scenario, plan: Sequence[Fault]
    ) -> None:
        self.store = store
        self.scenario = scenario
        self.uuid = str(uuid4())
        self.plan: Mapping[int, Fault] = {fault.call_number: fault for fault in plan}
        self._stall_numbers = [fault.call_number for fault in plan if fault.kind in STALLED]
        self._set_clock = set_clock
        self._now = 0.0
        #: All calls, and the faults that were injected into them.
        self.calls: list[Call] = []
        self.injected: list[tuple[Fault, Call]] = []
        #: The runs of tasks and hooks.
        self.ledger: list[LedgerEntry] = []
        #: Numbers of the calls in idle steps, which only repeat the calls of earlier steps.
        self.idle_calls: set[int] = set()
        #: The events at which stalled processes woke up.
        self.wake_events: list[str] = []
        #: Violations of the invariants that were seen during the run.
        self.violations: list[str] = []
        #: The number of errors that ``send`` or ``launch`` raised.
        self.failed_sends = 0
        #: The recovery from each injected fault, for the table.
        self.recoveries: list[Recovery] = []
        #: True after the consumer was stopped that had queued the first takeover.
        self.has_stopped_consumer = False
        #: The reason of the step that was reserved last.
        self._takeover_reason = ""
        self.sent_records = self._idle_steps = self._value_count = 0
        self._stalled: list[tuple[Process, str]] = []
        #: The reason of the step that the reaper took last, and of each record that it sent, by the offset.
        self._due_reason = ""
        self._due_reasons: dict[int, str] = {}
        self._process_count = 0
        self.bus = InMemoryBroker.at("")

    @property
    def may_stall_soon(self) -> bool:
        """True if the next step may stall, and so needs its own thread."""
        return any(len(self.calls) <= number < len(self.calls) + MAX_CALLS_PER_STEP for number in self._stall_numbers)

    @property
    def now(self) -> float:
        """Seconds since the start of the run."""
        return self._now

    @now.setter
    def now(self, seconds: float) -> None:
        self._now = seconds
        self._set_clock(seconds)

    def snapshot(self) -> OperationSnapshot | None:
        """Return the stored operation, None if there is none."""
        stored: OperationSnapshot | None = self.store.snapshot(self.uuid)
        return stored

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> Simulation:
        """Send the operation, and start one process after the other until the operation has ended."""
        self._send_operation()
        process, steps, steps_after_end = self._start_process(), 0, 0
        while steps_after_end < 2:
            first_call = len(self.calls)
            try:
                is_busy = process.run_until_stalled(process.step)
            except ProcessKilled:
                self._remove_from_group(process)
                process, is_busy = self._start_process(), True
            self._idle_steps = 0 if is_busy else self._idle_steps + 1
            if self._idle_steps:
                self.now += IDLE_SECONDS
            if self._idle_steps > 1:
                self.idle_calls.update(range(first_call, len(self.calls)))
            steps += 1
            if self._idle_steps > MAX_IDLE_STEPS or steps > 2 * MAX_IDLE_STEPS:
                self.violations.append(f"the operation does not end: {self.snapshot()}")
                break
            # Run one step more, because sent steps are recorded after the end.
            steps_after_end = 0 if is_busy or not self._has_ended() else steps_after_end + 1
            if steps_after_end and self._stalled:
                self._wake_stalled(END_OF_RUN, *WAKE_EVENTS)
                steps_after_end = 0
        self._wake_stalled(END_OF_RUN, *WAKE_EVENTS)
        process.kill()
        return self

    def _start_process(self, *, consumes: bool = True) -> Process:
        self._process_count += 1
        return Process(self, f"process {self._process_count}", consumes=consumes)

    def _remove_from_group(self, process: Process) -> None:
        process.expel_from_group() if process.is_stalled else process.kill()

    def _send_operation(self) -> None:
        """Send the operation; a sender without a confirmation is followed by another one."""
        if self.scenario.is_raw_message:
            process = self._start_process(consumes=False)
            message = Message(uuid=self.uuid, entrypoint=process.classes[-1].path, params={"order": 42})
            self.bus.send(TOPIC, message.dumps().encode())
            return
        while self.store.get_operation(self.uuid) is None:
            process = self._start_process(consumes=False)
            try:
                process.run_until_stalled(lambda: self._send_from(process))  # noqa: B023  it is called at once
            except StoreUnavailable:
                # The store was tried three times, so the sender gets the error.
                self.failed_sends += 1
            except ProcessKilled:
                self._remove_from_group(process)

    def _send_from(self, process: Process) -> None:
        order: Any = process.classes[-1]
        operation = order(uuid=self.uuid, params={"order": 42}).build()
        # A sender that wakes up after the end is told that the operation has ended.
        with suppress(StateConflict):
            operation.send() if self.scenario.sent_by == "send" else operation.launch()

    def _has_ended(self) -> bool:
        row = self.store.get_operation(self.uuid)
        return row is not None and row.ended_at is not None

    # -- faults --------------------------------------------------------------------------------------------------------

    def crash_point(
        self, process: Process, name: str, call: Callable[[], Any], make_error: Callable[[], Exception] | None
    ) -> Any:
        """Number a call of a process, make it, and inject the fault that is planned for it."""
        numbered = Call(len(self.calls), name, process.name)
        self.calls.append(numbered)
        fault = self.plan.get(numbered.number)
        if fault is None or fault.kind not in CRASH_POINTS[name]:
            return self._take_effect(process, name, call())
        self.injected.append((fault, numbered))
        if fault.kind in BEFORE_THE_CALL:
            self._inject(process, fault, make_error)
        if fault.kind == RECORD_LOST:
            # Return as after a delivery.
            return None
        try:
            result = self._take_effect(process, name, call())
        except Exception:
            self._inject_after(process, fault, make_error)
            raise
        self._inject_after(process, fault, make_error)
        return result

    def _inject_after(self, process: Process, fault: Fault, make_error: Callable[[], Exception] | None) -> None:
        if fault.kind not in BEFORE_THE_CALL:
            self._inject(process, fault, make_error)

    def _inject(self, process: Process, fault: Fault, make_error: Callable[[], Exception] | None) -> None:
        """Inject a fault; return if the process survives it."""
        self._start_recovery(process, fault)
        if fault.kind in KILLED:
            process.kill()
            raise ProcessKilled
        if fault.kind in STALLED:
            self._stalled.append((process, fault.wake_event))
            process.stall()
        elif make_error is not None and fault.kind != RECORD_LOST:
            raise make_error()

    def _take_effect(self, process: Process, crash_point: str, result: Any) -> Any:
        """Record that a call took effect, and wake the stalled processes whose wake event it is."""
        if crash_point in (CLAIM, TAKEOVER_CLAIM, SAVE) and not isinstance(result, ClaimRefused):
            self._continue_operation(process)
            if result is not None:
                self._wake_stalled("claimed", but=process)
        elif crash_point in (CHECKPOINT, TAKEOVER_CHECKPOINT, RETRY_CHECKPOINT, RELEASE):
            self._continue_operation(process)
            self._wake_stalled("recorded", but=process)
        elif crash_point == END_CHECKPOINT:
            self._continue_operation(process)
            self._wake_stalled("ended", but=process)
        elif crash_point == REAPER_TAKE and result:
            self._due_reason = result[0].reason
            self._wake_stalled("reaped", but=process)
        elif crash_point == RESERVE and result:
            # A takeover reserves several steps, and a record reserves its own step.
            self._takeover_reason = (result if isinstance(result, DueStep) else result[0]).reason
            self._wake_stalled("reserved", but=process)
        return result

    def _wake_stalled(self, *events: str, but: Process | None = None) -> None:
        for process, wake_event in list(self._stalled):
            if wake_event in events and process is not but:
                self._stalled.remove((process, wake_event))
                self.wake_events.append(events[0])
                before = self.snapshot()
                process.wake_up()
                self._check_fencing(process, before, events[0])

    def _check_fencing(self, process: Process, before: OperationSnapshot | None, wake_event: str) -> None:
        """Check that a process that woke up changed neither an ended operation nor one that another process owns."""
        after = self.snapshot()
        if before is None or after is None or before == after:
            return
        # A step that is sent or reserved is due: its owner, if the row still names one, has lost its lease.
        is_due = wake_event in ("reaped", "reserved")
        # If the lease of the owner has expired, the process may claim the operation, which increments the epoch.
        lease_until = before.operation.lease_until or 0
        is_claimed = lease_until <= self.now and after.operation.epoch > before.operation.epoch
        is_owned = not (is_due or is_claimed) and before.operation.owner not in (None, process.store.owner)
        if is_owned or before.operation.ended_at is not None:
            self.violations.append(f"{process.name} woke up and changed {before} to {after}")

    # -- records -------------------------------------------------------------------------------------------------------

    def record_run(self, process: Process, name: str, entrypoint: Any) -> str:
        """Enter the run of a task or hook in the ledger, and return the value that it returns."""
        self._value_count += 1
        stored = self.snapshot()
        stored_tasks = [(task.status, task.result) for task in stored.tasks] if stored else []
        value = f"{name} {self._value_count}"
        self.ledger.append(
            LedgerEntry(
                process=process.name,
                name=name,
                uuid=entrypoint.uuid,
                attempt=1 if isinstance(entrypoint, Operation) else entrypoint.attempt,
                received=dict(entrypoint.result.retval),
                value=value,
                stored_tasks=tuple(stored_tasks),
            )
        )
        return value

    def on_record_sent(self, process: Process) -> None:
        """Count a record that was appended to the topic."""
        self.sent_records += 1
        if process.is_reaping:
            self._due_reasons[self._last_offset()] = self._due_reason

    def check_committed_offsets(self) -> None:
        """Check that the database contains the operation of every committed record."""
        for (_group, partition), commit in self.bus.committed.items():
            for record in self.bus.topics[partition.topic][partition.partition][: commit.offset]:
                message = json.loads(record.value or b"")
                root = message["metadata"].get(OPERATION_KEY, message["uuid"])
                if self.store.get_operation(root) is None:
                    self.violations.append(f"offset {record.offset} is committed, and operation {root} is not stored")

    def _last_offset(self) -> int:
        return sum(len(log) for log in self.bus.topics.get(TOPIC, [])) - 1

    def _start_recovery(self, process: Process, fault: Fault) -> None:
        """Record the state of the operation at a fault."""
        row = self.store.get_operation(self.uuid)
        self.recoveries.append(Recovery(fault, _state_of(row), process.name, self._last_offset()))

    def _continue_operation(self, process: Process) -> None:
        """Record that a process continued the operation after the faults before it."""
        for recovery in self.recoveries:
            if recovery.continued_by:
                continue
            offset = _current_offset()
            if offset > recovery.last_offset and offset in self._due_reasons:
                recovery.continued_by = f"the reaper sends the step: {self._due_reasons[offset]}"
            elif recovery.process != process.name and _is_takeover():
                recovery.continued_by = f"a consumer takes the step over: {self._takeover_reason}"
            elif recovery.process == process.name or offset > recovery.last_offset:
                recovery.continued_by = "the operation continues normally"
            elif process.consumer is None:
                recovery.continued_by = "the sender received no confirmation and sends it again"
            else:
                recovery.continued_by = "Kafka redelivers the message"


def _state_of(row: OperationRow | None) -> str:
    """Return the state of an operation in the words of the table."""
    if row is None:
        return "nothing"
    if row.ended_at is not None:
        return row.status
    if row.owner is not None:
        return "claimed"
    # A step that waits for a retry is due when the reaper looks at it next.
    return "ready, later" if row.due_reason == DueReason.RETRY else "ready"


def _is_takeover() -> bool:
    """Return whether this thread runs a takeover."""
    attempt = current_attempt.get()
    return attempt is not None and attempt.takeover is not None


def _current_offset() -> int:
    """Return the offset of the record that this thread handles, -1 outside an attempt."""
    attempt = current_attempt.get()
    return -1 if attempt is None or attempt.record is None else int(attempt.record.offset)
