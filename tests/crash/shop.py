"""The operations whose consumers die, and the ledger of what ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cdumay_result import Result

from kser import status as states
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.crash.faults import HOOK, RUN

if TYPE_CHECKING:
    from tests.crash.process import Process

#: The tasks of an operation, in their order; the second one fails the first time.
STEPS: Final = ("first", "second", "third")
TOPIC: Final = "steps"
#: Seconds between two attempts.
DELAY: Final = 10.0


class Scenario(NamedTuple):
    """An operation, and how it comes."""

    #: ``send``, ``message`` (in one consumer), ``launch`` or ``distributed message`` (over the consumers).
    way: str
    #: Whether its class has ``onsuccess`` and ``onerror``.
    hooks: bool
    #: Whether its last task fails for good.
    fails: bool = False
    #: The task in which the consumer is told to end.
    stops: str = ""

    @property
    def over_consumers(self) -> bool:
        """Whether each task may run elsewhere."""
        return self.way in ("launch", "distributed message")

    @property
    def by_message(self) -> bool:
        """Whether it comes from somebody without a database."""
        return self.way in ("message", "distributed message")

    @property
    def status(self) -> str:
        """What it ends with."""
        return states.FAILED if self.fails else states.SUCCESS

    def __str__(self) -> str:
        parts = (self.way, "hooks" if self.hooks else "", "fails" if self.fails else "", self.stops and "stops")
        return ", ".join(part for part in parts if part)


#: All of them.
SCENARIOS: Final = tuple(
    Scenario(way, hooks, fails, stops)
    for way in ("send", "message", "launch", "distributed message")
    for hooks, fails, stops in ((False, False, ""), (True, False, ""), (True, True, ""), (False, False, "first"))
)


class Entry(NamedTuple):
    """Something that ran, or began to."""

    process: str
    what: str
    #: The task's, or the operation's.
    uuid: str
    attempt: int
    #: What the tasks before it gave, as it saw that.
    seen: Mapping[str, Any]
    #: What it gives, which no other run does.
    mark: str
    #: What was stored when it began: status and result of the tasks.
    stored: tuple[tuple[str, Any], ...]


def classes_of(process: Process) -> list[type]:
    """The classes as a process has them, the operation last."""
    step, last = _tasks_of(process)
    return [step, last, _operation_of(process, step, last)]


def _tasks_of(process: Process) -> tuple[type[Task], type[Task]]:
    simulation, scenario = process.simulation, process.simulation.scenario

    class Step(Task):
        TOPIC = TOPIC
        RETRY = Retry(max_attempts=3, delay=DELAY, jitter=False)

        def run(self) -> Result:
            return process.at(RUN, self._work)

        def _work(self) -> Result:
            name = self.params["name"]
            mark = simulation.note(process, name, self)
            if name == scenario.stops and process.consumer is not None:
                process.consumer.stop()
            if name == "third":
                # As the thread beside the worker does while a task takes its time.
                process.beat()
            if name == "second" and self.attempt == 1:
                raise ConnectionError("not the first time")
            if name == "third" and scenario.fails:
                return Result(retcode=3, stderr="never")
            return Result(retval={name: mark})

    class Last(Step):
        RETRY = Retry(max_attempts=1)

    return Step, Last


def _operation_of(process: Process, step: type[Task], last: type[Task]) -> type[Operation]:
    simulation, scenario = process.simulation, process.simulation.scenario

    class Order(Operation):
        TOPIC = TOPIC
        DISTRIBUTED = scenario.over_consumers

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            simulation.note(process, "build", self)
            return [(last if name == "third" else step)(params={"name": name}) for name in STEPS]

    class HookedOrder(Order):
        def onsuccess(self, result: Result) -> Result:
            return process.at(HOOK, lambda: self._told("onsuccess", result))

        def onerror(self, result: Result) -> Result:
            return process.at(HOOK, lambda: self._told("onerror", result))

        def _told(self, what: str, result: Result) -> Result:
            result.retval = {**result.retval, what: simulation.note(process, what, self)}
            return result

    return HookedOrder if scenario.hooks else Order
