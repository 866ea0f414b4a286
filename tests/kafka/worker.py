"""Consumer that records its tasks and assignments in a ledger; tests start it as a program of its own.

``LEDGER`` is the file, ``TRANSPORT`` the package of the consumer, ``COMMIT`` the commit mode. ``COOPERATIVE`` selects
the cooperative rebalance of kafka-python. Settings of kser, such as ``KSER_CONFIG`` and ``KSER_TOPICS``, apply too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from importlib import import_module
from typing import Any

from cdumay_result import Result

from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

Consumer: Any = import_module(f"kser.{os.environ.get('TRANSPORT', 'python_kafka')}.consumer").Consumer

oregistry = OperationRegistry()


def record_event(event: str, subject: Any = "") -> None:
    """Append a line to the ledger with one system call, so that a kill leaves no incomplete line."""
    descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{event} {subject} {os.getpid()} {time.monotonic()}\n".encode())
    finally:
        os.close(descriptor)


@oregistry.subscribe
class Work(Task):
    """A task that runs for ``seconds`` and fails at its first ``times`` attempts.

    The param ``then`` ends the task with ``interrupt`` (KeyboardInterrupt), ``exit`` (SystemExit) or ``fail``; ``die``
    kills the process.
    """

    def run(self) -> Result:
        record_event("start", self.uuid)
        record_event("attempt", f"{self.uuid}/{self.attempt}")
        deadline = time.monotonic() + self.params.get("seconds", 0)
        # A signal handler can end a sleep early.
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        then = self.params.get("then")
        if then == "interrupt":
            raise KeyboardInterrupt
        if then == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if then == "exit":
            sys.exit(7)
        if then == "fail" or self.attempt <= self.params.get("times", 0):
            raise ValueError("scripted failure")
        record_event("end", self.uuid)
        return Result(uuid=self.uuid, stdout="worked")


@oregistry.subscribe
class Job(Operation):
    """An operation with two tasks."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Work(params=kwargs), Work(params=kwargs)]


@oregistry.subscribe
class SpreadJob(Job):
    """An operation with two tasks, each of which any consumer may run."""

    DISTRIBUTED = True


@oregistry.subscribe
class RetriedWork(Work):
    """A task that is retried one second after each failed attempt."""

    RETRY = Retry(max_attempts=4, delay=1, backoff=1, jitter=False)


@oregistry.subscribe
class RetriedJob(Operation):
    """An operation with one task that is retried."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [RetriedWork(params=kwargs)]


class Worker(Consumer):  # type: ignore[misc]
    """A consumer that records each change of its assignment, and each revocation."""

    REGISTRY = oregistry.controller

    def run(self) -> None:
        threading.Thread(target=self._record_assignments, daemon=True).start()
        # A revoked partition may return at once, so polling the assignment could miss the revocation.
        revoke = self._kser_partitions.on_revoke

        def record_and_revoke(partitions: Any) -> Any:
            record_event("revoked", len(partitions))
            return revoke(partitions)

        self._kser_partitions.on_revoke = record_and_revoke  # type: ignore[method-assign]
        super().run()

    def _record_assignments(self) -> None:
        recorded: frozenset[Any] = frozenset()
        while True:
            assignment = self.assignment
            if assignment != recorded:
                recorded = assignment
                record_event("assigned", len(assignment))
            time.sleep(0.01)


def _config() -> dict[str, Any] | None:
    """Return the client options for a cooperative rebalance; None for the options in ``KSER_CONFIG``.

    kafka-python expects the class of an assignor, which a JSON setting cannot contain.
    """
    if "COOPERATIVE" not in os.environ:
        return None
    from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

    options: dict[str, Any] = json.loads(os.environ["KSER_CONFIG"])
    return options | {"partition_assignment_strategy": [CooperativeStickyAssignor]}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    Worker(_config(), commit=os.environ.get("COMMIT", "after")).run()
