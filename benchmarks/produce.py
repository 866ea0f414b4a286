"""Measure messages per second of kser's producer and of kafka-python's producer, on Apache Kafka.

Both programs check all deliveries. ``bulk_send`` of kser is compared with ``send`` of encoded bytes, ``flush`` and a
check of each future. ``send`` of kser is compared with ``send().get()``.

Usage: ``python benchmarks/produce.py [COUNT]``. COUNT is 50,000 messages by default. A tenth of COUNT is used for
``send``.
"""

from __future__ import annotations

import logging
import sys
import time

from bench import compare, kafka, message, new_topic
from kafka import KafkaProducer

from kser.python_kafka.producer import Producer


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    logging.basicConfig(level=logging.WARNING)
    messages = [message() for _ in range(count)]
    ready = [kmsg.dumps().encode() for kmsg in messages]
    with kafka() as address:
        topic = new_topic(address)
        ours = Producer({"bootstrap_servers": address})
        bare = KafkaProducer(bootstrap_servers=address)

        def bulk() -> float:
            start = time.perf_counter()
            outcome = ours.bulk_send(topic, messages, timeout=600)
            if outcome.retcode:
                sys.exit(outcome.stderr)
            return count / (time.perf_counter() - start)

        def bare_bulk() -> float:
            start = time.perf_counter()
            futures = [bare.send(topic, data) for data in ready]
            bare.flush(timeout=600)
            for future in futures:
                future.get(timeout=0)
            return count / (time.perf_counter() - start)

        def single() -> float:
            start = time.perf_counter()
            for kmsg in messages[: count // 10]:
                if ours.send(topic, kmsg).retcode:
                    sys.exit("not delivered")
            return count / 10 / (time.perf_counter() - start)

        def bare_single() -> float:
            start = time.perf_counter()
            for data in ready[: count // 10]:
                bare.send(topic, data).get(timeout=60)
            return count / 10 / (time.perf_counter() - start)

        compare(f"bulk_send {count:,} messages", bulk, bare_bulk)
        compare(f"send {count // 10:,} messages", single, bare_single)
        ours.close()
        bare.close()


if __name__ == "__main__":
    main()
