"""The operations whose consumers die, and the ledger of the runs of their tasks and hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cdumay_result import Result

from kser import status as states
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.crash.faults import END_HOOK, QUEUE, RUN

if TYPE_CHECKING:
    from tests.crash.process import Process

#: The tasks of an operation, in their order; the first attempt at the second one fails.
TASK_NAMES: Final = ("first", "second", "third")
TOPIC: Final = "steps"
#: Seconds between two attempts.
RETRY_DELAY: Final = 10.0


class Scenario(NamedTuple):
    """An operation, and the way in which it is sent."""

    #: ``send``, ``message`` (both local), ``launch`` or ``distributed message``.
    sent_by: str
    #: True if its class has ``onsuccess`` and ``onerror``.
    has_hooks: bool
    #: True if its last task fails permanently.
    fails: bool = False
    #: The task during which the consumer is stopped; or :data:`QUEUE` to stop the first consumer with a takeover.
    stopped_in: str = ""
    #: False if no consumer takes over steps, for example because their workers are always busy.
    takes_over: bool = True

    @property
    def is_distributed(self) -> bool:
        """True if each task may run on another consumer."""
        return self.sent_by in ("launch", "distributed message")

    @property
    def is_raw_message(self) -> bool:
        """True if a sender without a store sends it."""
        return self.sent_by in ("message", "distributed message")

    @property
    def final_status(self) -> str:
        """The status with which the operation must end."""
        return states.FAILED if self.fails else states.SUCCESS

    def __str__(self) -> str:
        parts = (
            self.sent_by,
            "hooks" if self.has_hooks else "",
            "fails" if self.fails else "",
            f"stops in {self.stopped_in}" if self.stopped_in else "",
            "" if self.takes_over else "no takeovers",
        )
        return ", ".join(part for part in parts if part)


#: Every scenario.
SCENARIOS: Final = tuple(
    Scenario(sent_by, has_hooks, fails, stopped_in, takes_over)
    for sent_by in ("send", "message", "launch", "distributed message")
    for has_hooks, fails, stopped_in, takes_over in (
        (False, False, "", True),
        (True, False, "", True),
        (True, True, "", True),
        (False, False, "first", True),
        (False, False, QUEUE, True),
        (True, False, "", False),
    )
)


class LedgerEntry(NamedTuple):
    """A run of a task, a hook or a build, recorded at its start."""

    process: str
    #: The name of the task or hook, or ``build``.
    name: str
    #: The uuid of the task or operation.
    uuid: str
    attempt: int
    #: The results of earlier tasks that the run receives.
    received: Mapping[str, Any]
    #: The value that the run returns; no other run returns it.
    value: str
    #: Status and result of each task in the store at the start of the run.
    stored_tasks: tuple[tuple[str, Any], ...]


def classes_of(process: Process) -> list[type]:
    """Return the classes of a process, the operation last."""
    step, last_step = _task_classes(process)
    return [step, last_step, _operation_class(process, step, last_step)]


def _task_classes(process: Process) -> tuple[type[Task], type[Task]]:
    simulation, scenario = process.simulation, process.simulation.scenario

    class Step(Task):
        TOPIC = TOPIC
        RETRY = Retry(max_attempts=3, delay=RETRY_DELAY, jitter=False)

        def run(self) -> Result:
            return process.crash_point(RUN, self._perform)

        def _perform(self) -> Result:
            name = self.params["name"]
            value = simulation.record_run(process, name, self)
            if name == scenario.stopped_in and process.consumer is not None:
                process.consumer.stop()
            if name == "third":
                # In a real consumer a background thread sends the heartbeat while the task runs.
                process.heartbeat()
            if name == "second" and self.attempt == 1:
                raise ConnectionError("the first attempt fails")
            if name == "third" and scenario.fails:
                return Result(retcode=3, stderr="permanent failure")
            return Result(retval={name: value})

    class LastStep(Step):
        RETRY = Retry(max_attempts=1)

    return Step, LastStep


def _operation_class(process: Process, step: type[Task], last_step: type[Task]) -> type[Operation]:
    simulation, scenario = process.simulation, process.simulation.scenario

    class Order(Operation):
        TOPIC = TOPIC
        DISTRIBUTED = scenario.is_distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            simulation.record_run(process, "build", self)
            return [(last_step if name == "third" else step)(params={"name": name}) for name in TASK_NAMES]

    class HookedOrder(Order):
        def onsuccess(self, result: Result) -> Result:
            return process.crash_point(END_HOOK, lambda: self._run_hook("onsuccess", result))

        def onerror(self, result: Result) -> Result:
            return process.crash_point(END_HOOK, lambda: self._run_hook("onerror", result))

        def _run_hook(self, name: str, result: Result) -> Result:
            result.retval = {**result.retval, name: simulation.record_run(process, name, self)}
            return result

    return HookedOrder if scenario.has_hooks else Order
