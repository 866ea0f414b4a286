"""Operations of the chaos run, shared by the consumers and the client."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple
from urllib.parse import quote, unquote
from uuid import uuid4

from cdumay_result import Result

from kser.controller import Controller
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.chaos import ledger
from tests.chaos_operations.orders import ATTEMPTS, FAILING, SHAKY, task_result

#: The longest sleep of a task in seconds.
MAX_SLEEP = 0.5


class RunInfo(NamedTuple):
    """The facts about one run of a task: its subject in the ledger."""

    #: The uuid of the operation.
    operation: str
    position: int
    attempt: int
    #: The uuid of the task.
    task: str
    #: A random text that identifies the run.
    nonce: str
    #: The number and the nonce of each earlier task, by position.
    earlier_results: dict[str, Any]

    def dump(self) -> str:
        """Return the facts as one word."""
        results = quote(json.dumps(self.earlier_results, separators=(",", ":"), sort_keys=True))
        return f"{self.operation}/{self.position}/{self.attempt}/{self.task}/{self.nonce}/{results}"

    @classmethod
    def load(cls, word: str) -> RunInfo:
        """Return the facts of a word of :meth:`dump`."""
        operation, position, attempt, task, nonce, results = word.split("/")
        return cls(operation, int(position), int(attempt), task, nonce, json.loads(unquote(results)))


class Shop:
    """The registry with the operations.

    :param task_ledger: the ledger of the tasks; None in the client, which runs no task.
    :param options: arguments of the registry.
    """

    def __init__(self, task_ledger: ledger.Ledger | None = None, **options: Any) -> None:
        # Each shop registers the same paths, so it needs its own list of entrypoints.
        controller = type("ShopController", (Controller,), {"ENTRYPOINTS": {}})
        self.registry = OperationRegistry(controller_class=controller, **options)

        @self.registry.subscribe
        class Step(Task):
            """Task that takes some time, and returns a number."""

            def run(self) -> Result:
                return _run(self, task_ledger)

        @self.registry.subscribe
        class Shaky(Step):
            """Task that is retried after a failure."""

            RETRY = Retry(max_attempts=ATTEMPTS, delay=0.3, backoff=2, jitter=True)

        @self.registry.subscribe
        class Local(Operation):
            """Operation that runs in one consumer, unless it is launched."""

            def build_tasks(self, **params: Any) -> list[Task]:
                tasks: list[Task] = []
                for position, seconds in enumerate(params["seconds"]):
                    is_shaky = params["kind"] == SHAKY and position == params["failing_task"]
                    cls = Shaky if is_shaky else Step
                    tasks.append(cls(params={**params, "position": position, "seconds": seconds}))
                return tasks

        @self.registry.subscribe
        class Distributed(Local):
            """Operation whose tasks always run in different consumers."""

            DISTRIBUTED = True

        self.local, self.distributed = Local, Distributed


def _run(task: Any, task_ledger: ledger.Ledger | None) -> Result:
    """Run a task: write its start and end to the ledger, and fail as the order requests."""
    assert task_ledger is not None
    params, results = task.params, task.result.retval
    position, kind = params["position"], params["kind"]
    nonce = uuid4().hex[:12]
    subject = RunInfo(task.operation_uuid, position, task.attempt, task.uuid, nonce, results).dump()
    task_ledger.write(ledger.START, subject)
    _take(params["seconds"])
    if position == params["failing_task"] and task.attempt < {SHAKY: ATTEMPTS, FAILING: 2}.get(kind, 1):
        task_ledger.write(ledger.FAIL, subject)
        raise ValueError("the order requests a failure")
    earlier = [number for number, _nonce in (results[str(index)] for index in range(position))]
    number = task_result(params["number"], position, earlier)
    task_ledger.write(ledger.END, subject)
    return Result(uuid=task.uuid, retval={str(position): [number, nonce]})


def _take(seconds: float) -> None:
    """Sleep in short steps."""
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        time.sleep(min(remaining, MAX_SLEEP))
