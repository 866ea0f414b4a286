"""Log records as JSON, with the message and the result that kser attaches to them."""

import json
import logging

from cdumay_result import Result

from kser import Controller, Message, Task


class JsonFormatter(logging.Formatter):
    KEYS = ("kmsg", "kresult", "error", "kafka_raw_data")

    def format(self, record):
        line = {"logger": record.name, "level": record.levelname, "text": record.getMessage()}
        line.update({key: getattr(record, key) for key in self.KEYS if hasattr(record, key)})
        return json.dumps(line, default=str)


handler = logging.StreamHandler()
handler.setFormatter(JsonFormatter())
logging.basicConfig(level=logging.INFO, handlers=[handler])


class Charge(Task):
    def run(self):
        return Result(stdout="charged")


Controller.register("shop.Charge", Charge)
Controller.run(Message("order-1", "shop.Charge", params={"amount": 42}).dumps())
