"""A consumer whose tasks write into a ledger what they do; tests start it as a program of its own.

``LEDGER`` is the file, ``TRANSPORT`` the package of the consumer, ``COMMIT`` the commit mode; the rest comes from
``KSER_CONFIG``, ``KSER_TOPICS`` and other settings. With ``COOPERATIVE``, kafka-python gives up only what has to go.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from importlib import import_module
from typing import Any

from cdumay_result import Result

from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

Consumer: Any = import_module(f"kser.{os.environ.get('TRANSPORT', 'python_kafka')}.consumer").Consumer

oregistry = OperationRegistry()


def note(event: str, subject: Any = "") -> None:
    """Append one line to the ledger; whole lines reach it even when this process is killed."""
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{event} {subject} {os.getpid()} {time.monotonic()}\n".encode())
    finally:
        os.close(descriptor)


@oregistry.subscribe
class Work(Task):
    """Takes ``seconds``, then does what ``then`` says; fails so many ``times`` first."""

    def run(self) -> Result:
        note("start", self.uuid)
        note("attempt", f"{self.uuid}/{self.attempt}")
        deadline = time.monotonic() + self.params.get("seconds", 0)
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        then = self.params.get("then")
        if then == "interrupt":
            raise KeyboardInterrupt
        if then == "exit":
            sys.exit(7)
        if then == "fail" or self.attempt <= self.params.get("times", 0):
            raise ValueError("as it was told")
        note("end", self.uuid)
        return Result(uuid=self.uuid, stdout="worked")


@oregistry.subscribe
class Job(Operation):
    """Works twice."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Work(params=kwargs), Work(params=kwargs)]


class Worker(Consumer):  # type: ignore[misc]
    """Notes when it has got its partitions, each time they change."""

    REGISTRY = oregistry.controller

    def run(self) -> None:
        threading.Thread(target=self._note_assignments, daemon=True).start()
        # What is taken away may be back at once, and is not seen by looking now and then.
        revoke = self._kser_partitions.on_revoke

        def noted(partitions: Any) -> Any:
            note("revoked", len(partitions))
            return revoke(partitions)

        self._kser_partitions.on_revoke = noted  # type: ignore[method-assign]
        super().run()

    def _note_assignments(self) -> None:
        had: frozenset[Any] = frozenset()
        while True:
            has = self.assignment
            if has != had:
                had = has
                note("assigned", len(has))
            time.sleep(0.01)


def _config() -> dict[str, Any] | None:
    """None for what the environment says: assignors of kafka-python are classes, which it cannot name."""
    if "COOPERATIVE" not in os.environ:
        return None
    from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

    options: dict[str, Any] = json.loads(os.environ["KSER_CONFIG"])
    return options | {"partition_assignment_strategy": [CooperativeStickyAssignor]}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    Worker(_config(), commit=os.environ.get("COMMIT", "after")).run()
