"""Operations of the chaos run, shared by the consumers and the client."""

from __future__ import annotations

import json
import time
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote, unquote
from uuid import uuid4

from cdumay_result import Result

from kser.controller import Controller
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.chaos import ledger
from tests.chaos_operations.orders import ATTEMPTS, FAILING, SHAKY, SIZE, value

#: Whether a task stands still shows in slices of this.
SLICE = 0.5


class Apart(Controller):
    """These classes are nobody else's."""

    ENTRYPOINTS: ClassVar[dict[Any, Any]] = {}


class Told(NamedTuple):
    """What a task writes down about itself, at its start and at its end."""

    operation: str
    position: int
    attempt: int
    task: str
    #: Of this run of it.
    nonce: str
    #: What it saw: value and nonce of each task before it, by position.
    seen: dict[str, Any]

    def dump(self) -> str:
        """As one word."""
        seen = quote(json.dumps(self.seen, separators=(",", ":"), sort_keys=True))
        return "/".join(map(str, (*self[:5], seen)))

    @classmethod
    def load(cls, text: str) -> Told:
        """From that word."""
        operation, position, attempt, task, nonce, seen = text.split("/")
        return cls(operation, int(position), int(attempt), task, nonce, json.loads(unquote(seen)))


class Shop:
    """The registry with the classes.

    :param notes: where tasks write; None where none is run.
    """

    def __init__(self, notes: ledger.Ledger | None = None, **given: Any) -> None:
        # A list of their own, for each.
        controller = type("Controller", (Apart,), {"ENTRYPOINTS": {}})
        self.registry = OperationRegistry(controller_class=controller, **given)

        @self.registry.subscribe
        class Step(Task):
            """Takes its time, and adds a number."""

            def run(self) -> Result:
                return _run(self, notes)

        @self.registry.subscribe
        class Shaky(Step):
            """Is tried again when it fails."""

            RETRY = Retry(max_attempts=ATTEMPTS, delay=0.3, backoff=2, jitter=True)

        @self.registry.subscribe
        class Local(Operation):
            """Runs in one consumer, unless it is launched."""

            def build_tasks(self, **params: Any) -> list[Task]:
                given = [{**params, "position": position, "seconds": params["seconds"][position]} for position in RANGE]
                shaky = [params["kind"] == SHAKY and position == params["where"] for position in RANGE]
                return [(Shaky if each else Step)(params=one) for one, each in zip(given, shaky, strict=True)]

        @self.registry.subscribe
        class Spread(Local):
            """Runs over the consumers, however it arrives."""

            DISTRIBUTED = True

        self.local, self.spread = Local, Spread


RANGE = range(SIZE)


def _run(task: Any, notes: ledger.Ledger | None) -> Result:
    assert notes is not None
    given, seen = task.params, task.result.retval
    told = Told(task.operation_uuid, given["position"], task.attempt, task.uuid, uuid4().hex[:12], seen).dump()
    notes.note(ledger.START, told)
    _take(given["seconds"])
    if given["position"] == given["where"] and task.attempt < {SHAKY: ATTEMPTS, FAILING: 2}.get(given["kind"], 1):
        notes.note(ledger.FAIL, told)
        raise ValueError("as it was told")
    before = [seen[str(position)][0] for position in range(given["position"])]
    number = value(given["number"], given["position"], before)
    notes.note(ledger.END, told)
    return Result(uuid=task.uuid, retval={str(given["position"]): [number, Told.load(told).nonce]})


def _take(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, SLICE))
