"""Program of the consumer processes that faults hit; its operations write to a ledger.

``KSER_TEST_WORKER`` is a JSON object: the ``transport``, the name of the ``process``, the path of the ``ledger``, the
``config`` of the client, the ``topic``, and the ``options`` of the consumer. The settings of kser contain the database
and the times of claims.
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

#: A process got no processor time although it had no fault; the subject of the entry is the duration in seconds.
STARVED = "starved"
#: Seconds between two readings of the clock, and seconds from which on the process counts as starved.
INTERVAL, STARVED_SECONDS = 0.1, 0.8


def record_starvation(process_ledger: ledger.Ledger) -> None:
    """Write the periods in which this process got no processor time to the ledger."""
    before = time.monotonic()
    while True:
        time.sleep(INTERVAL)
        now = time.monotonic()
        if now - before > STARVED_SECONDS:
            process_ledger.write(STARVED, f"{now - before:.3f}")
        before = now


def main() -> None:
    settings = json.loads(os.environ["KSER_TEST_WORKER"])
    logging.basicConfig(level=settings.get("level", "WARNING"), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # The run requests the stacks of all threads with SIGUSR1 if the consumer hangs.
    faulthandler.register(signal.SIGUSR1)
    process_ledger = ledger.Ledger(settings["ledger"], settings["process"])
    transport: Any = importlib.import_module(f"kser.{settings['transport']}.consumer")
    worker = type("Worker", (transport.Consumer,), {"REGISTRY": Shop(process_ledger).registry.controller})(
        settings["config"], [settings["topic"]], **settings["options"]
    )
    threading.Thread(target=record_starvation, args=(process_ledger,), daemon=True).start()
    process_ledger.write(ledger.UP)
    worker.run()


if __name__ == "__main__":
    main()
