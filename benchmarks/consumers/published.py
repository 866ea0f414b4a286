"""Measure kser 0.8.27: ``python published.py ADDRESS TOPIC COUNT`` prints messages per second.

The script needs an environment with kser 0.8.27. It uses the default mode, which commits before the task runs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid

from cdumay_result import Result

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer

address, topic, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
logging.basicConfig(level=logging.WARNING)
handled = 0
start = 0.0


class Noop(Entrypoint):
    """A task that does nothing."""

    def run(self) -> Result:
        global handled, start
        if not handled:
            start = time.perf_counter()
        handled += 1
        if handled == count:
            print((count - 1) / (time.perf_counter() - start), flush=True)
            os._exit(0)
        return Result(uuid=self.uuid)


Controller.register("bench.Noop", Noop)
Consumer({"bootstrap_servers": address, "group_id": str(uuid.uuid4()), "auto_offset_reset": "earliest"}, [topic]).run()
