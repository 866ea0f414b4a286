"""Measure FastStream: ``python faststream_nack.py ADDRESS TOPIC COUNT`` prints messages per second.

FastStream runs on aiokafka with ten workers and NACK_ON_ERROR, which commits after the handler. The script needs
``faststream[kafka]``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import uuid

from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker

address, topic, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
logging.basicConfig(level=logging.WARNING)
broker = KafkaBroker(address, log_level=logging.WARNING)
handled = 0
start = 0.0


@broker.subscriber(
    topic,
    group_id=str(uuid.uuid4()),
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.NACK_ON_ERROR,
    max_workers=10,
)
async def noop(message: dict) -> None:
    global handled, start
    if not handled:
        start = time.perf_counter()
    handled += 1
    if handled == count:
        print((count - 1) / (time.perf_counter() - start), flush=True)
        os._exit(0)


asyncio.run(FastStream(broker).run())
