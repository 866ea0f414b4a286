"""Program of the consumer processes that faults hit; its tasks write to a ledger.

``KSER_TEST_WORKER`` is a JSON object: the ``transport``, the name of the ``process``, the path of the ``ledger``, the
``config`` of the client, the ``topic``, and the ``options`` of the consumer.
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

SETTINGS = json.loads(os.environ["KSER_TEST_WORKER"])
LEDGER = ledger.Ledger(SETTINGS["ledger"], SETTINGS["process"])
Consumer: Any = importlib.import_module(f"kser.{SETTINGS['transport']}.consumer").Consumer

oregistry = OperationRegistry()


@oregistry.subscribe
class Work(Task):
    """Task that takes ``seconds``, waits for the file ``gate``, and then fails as ``failure`` requests or succeeds."""

    RETRY = Retry(max_attempts=3, delay=0.1, backoff=2, max_delay=1, jitter=True)

    _exited: set[str] = set()  # noqa: RUF012
    _lock = threading.Lock()

    def run(self) -> Result:
        # Hostile records have messages without params.
        subject = self.params.get("subject", self.uuid)
        LEDGER.write(ledger.START, subject)
        deadline = time.monotonic() + self.params.get("seconds", 0)
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        while (gate := self.params.get("gate")) and not os.path.exists(gate):
            time.sleep(0.02)
        self._fail(subject, self.params.get("failure"))
        LEDGER.write(ledger.END, subject)
        return Result(uuid=self.uuid, stdout="worked")

    def _fail(self, subject: str, failure: str | None) -> None:
        """Raise the requested exception, if any; SystemExit only at the first attempt in this process."""
        with self._lock:
            exits = failure == messages.EXIT and subject not in self._exited
            self._exited.add(subject)
        if exits:
            LEDGER.write(ledger.EXIT, subject)
            sys.exit(7)
        if failure == messages.POISON:
            LEDGER.write(ledger.FAIL, subject)
            raise ValueError("the message requests a failure")


def on_message_refused(_sender: Any, raw_data: Any, **_: Any) -> None:
    """Write the rejection of a payload to the ledger."""
    LEDGER.write(ledger.REFUSED, messages.payload_name(raw_data))


class Worker(Consumer):
    """The consumer under test, unchanged."""

    REGISTRY = oregistry.controller


if __name__ == "__main__":
    logging.basicConfig(level=SETTINGS.get("level", "WARNING"), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # The test requests the stacks of all threads with SIGUSR1 if the consumer hangs.
    faulthandler.register(signal.SIGUSR1)
    message_refused.connect(on_message_refused)
    worker = Worker(SETTINGS["config"], [SETTINGS["topic"]], **SETTINGS["options"])
    LEDGER.write(ledger.UP)
    worker.run()
