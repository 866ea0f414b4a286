"""A worker: it consumes the topics of KSER_TOPICS. Start as many workers as you like."""

import logging

from shop import oregistry

from kser.python_kafka.consumer import Consumer

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-8s %(message)s")
consumer = Consumer()
consumer.REGISTRY = oregistry.controller
consumer.run()
