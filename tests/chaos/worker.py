"""A consumer whose tasks write into a ledger; the faults are aimed at processes that run this program.

``KSER_TEST_WORKER`` says as JSON: the ``transport``, the ``process``'s name, the ``ledger``, the ``config`` of the
client, the ``topic``, and the ``options`` of the consumer.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from cdumay_result import Result

from kser.retry import Retry
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from kser.signals import message_refused
from tests.chaos import ledger, messages

GIVEN = json.loads(os.environ["KSER_TEST_WORKER"])
LEDGER = ledger.Ledger(GIVEN["ledger"], GIVEN["process"])
Consumer: Any = importlib.import_module(f"kser.{GIVEN['transport']}.consumer").Consumer

oregistry = OperationRegistry()


@oregistry.subscribe
class Work(Task):
    """Takes ``seconds``, then does what ``then`` says."""

    RETRY = Retry(max_attempts=3, delay=0.1, backoff=2, max_delay=1, jitter=True)

    _exited: set[str] = set()  # noqa: RUF012
    _lock = threading.Lock()

    def run(self) -> Result:
        subject = self.params["subject"]
        LEDGER.note(ledger.START, subject)
        deadline = time.monotonic() + self.params["seconds"]
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        self._fail(subject, self.params["then"])
        LEDGER.note(ledger.END, subject)
        return Result(uuid=self.uuid, stdout="worked")

    def _fail(self, subject: str, then: str | None) -> None:
        with self._lock:
            exits = then == messages.EXIT and subject not in self._exited
            self._exited.add(subject)
        if exits:
            LEDGER.note(ledger.EXIT, subject)
            sys.exit(7)
        if then == messages.POISON:
            LEDGER.note(ledger.FAIL, subject)
            raise ValueError("as it was told")


def refused(_sender: Any, raw_data: Any, **_: Any) -> None:
    LEDGER.note(ledger.REFUSED, messages.payload_name(raw_data))


class Worker(Consumer):
    """The consumer under test, unchanged."""

    REGISTRY = oregistry.controller


if __name__ == "__main__":
    logging.basicConfig(level=GIVEN.get("level", "WARNING"), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # For whoever wants to know where it hangs.
    faulthandler.register(signal.SIGUSR1)
    message_refused.connect(refused)
    worker = Worker(GIVEN["config"], [GIVEN["topic"]], **GIVEN["options"])
    LEDGER.note(ledger.UP)
    worker.run()
