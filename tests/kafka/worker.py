"""A consumer whose tasks write into a ledger what they do; tests start it as a program of its own.

``LEDGER`` is the file, ``COMMIT`` the commit mode; the rest comes from ``KSER_CONFIG`` and ``KSER_TOPICS``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from cdumay_result import Result

from kser.python_kafka.consumer import Consumer
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

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
    """Takes ``seconds``, then does what ``then`` says."""

    def run(self) -> Result:
        note("start", self.uuid)
        deadline = time.monotonic() + self.params.get("seconds", 0)
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        then = self.params.get("then")
        if then == "interrupt":
            raise KeyboardInterrupt
        if then == "exit":
            sys.exit(7)
        if then == "fail":
            raise ValueError("as it was told")
        note("end", self.uuid)
        return Result(uuid=self.uuid, stdout="worked")


@oregistry.subscribe
class Job(Operation):
    """Works twice."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Work(params=kwargs), Work(params=kwargs)]


class Worker(Consumer):
    """Notes when it has got its partitions, each time they change."""

    REGISTRY = oregistry.controller
    had: frozenset[Any] = frozenset()

    def step(self, *arguments: Any) -> int:
        handled = super().step(*arguments)
        has = frozenset(self.client.assignment())
        if has != self.had:
            self.had = has
            note("assigned", len(has))
        return handled


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    Worker(commit=os.environ.get("COMMIT", "after")).run()
