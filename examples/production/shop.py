"""The production consumer of the shop: all settings come from the environment."""

import logging
import os
import sys
from pathlib import Path

from cdumay_result import Result

from kser import OperationRegistry, Task
from kser.consumer.exit_status import ExitStatus
from kser.errors import SettingError
from kser.python_kafka.consumer import Consumer
from kser.retry import Retry

ALIVE = Path(os.environ["LOCK_PATH"]) / "alive"
oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    RETRY = Retry(max_attempts=5, on=(ConnectionError, TimeoutError))
    TIME_LIMIT = 600

    def run(self):
        return Result(stdout="charged")


class ShopConsumer(Consumer):
    @staticmethod
    def is_active():
        ALIVE.touch()  # every second, for the probes
        return Consumer.is_active()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(threadName)s %(name)s %(message)s")
    logging.getLogger("kafka").setLevel(logging.WARNING)
    try:
        consumer = ShopConsumer()
    except SettingError as error:
        logging.error(error.message)
        sys.exit(ExitStatus.SETTING)  # a restart would not help
    consumer.REGISTRY = oregistry.controller
    consumer.run()
