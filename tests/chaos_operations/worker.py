"""A consumer of operations; the faults are aimed at processes that run this program.

``KSER_TEST_WORKER`` says as JSON: the ``transport``, the ``process``'s name, the ``ledger``, the ``config`` of the
client, the ``topic``, and the ``options`` of the consumer. Database and times of claims are kser's own settings.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import os
import signal
import threading
import time
from typing import Any

from tests.chaos import ledger
from tests.chaos_operations.shop import Shop

#: A process that should have run did not, for so many seconds: it is no fault of ours.
LATE = "late"
#: Seconds between two looks at the clock, and from which on one is late.
PULSE, TOO_LATE = 0.1, 0.8


def watch(notes: ledger.Ledger) -> None:
    """Write down when this process did not get to run."""
    before = time.monotonic()
    while True:
        time.sleep(PULSE)
        now = time.monotonic()
        if now - before > TOO_LATE:
            notes.note(LATE, f"{now - before:.3f}")
        before = now


def main() -> None:
    given = json.loads(os.environ["KSER_TEST_WORKER"])
    logging.basicConfig(level=given.get("level", "WARNING"), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # For whoever wants to know where it hangs.
    faulthandler.register(signal.SIGUSR1)
    notes = ledger.Ledger(given["ledger"], given["process"])
    transport: Any = importlib.import_module(f"kser.{given['transport']}.consumer")
    worker = type("Worker", (transport.Consumer,), {"REGISTRY": Shop(notes).registry.controller})(
        given["config"], [given["topic"]], **given["options"]
    )
    threading.Thread(target=watch, args=(notes,), daemon=True).start()
    notes.note(ledger.UP)
    worker.run()


if __name__ == "__main__":
    main()
