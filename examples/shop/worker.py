"""A worker: it consumes the topics in KSER_TOPICS. You can start several workers."""

import logging

from shop import oregistry

from kser.python_kafka.consumer import Consumer

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-8s %(message)s")
consumer = Consumer()
consumer.REGISTRY = oregistry.controller
consumer.run()
