"""Peer of test_published_peer.py: a consumer and a producer for kser 0.8.27, which runs them.

``published_peer.py consume`` is a consumer with two tasks and an operation; ``published_peer.py send TOPIC`` sends a
JSON list of messages from its standard input, the last three of them by ``bulk_send``.
"""

import json
import os
import sys

from cdumay_result import Result

import kser
from kser.controller import Controller
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task

assert kser.__version__ == "0.8.27", kser.__version__

CONFIG = json.loads(os.environ["PEER_CONFIG"])


def record(kind, uuid, params):
    with open(os.environ["LEDGER"], "a") as ledger:
        ledger.write(json.dumps({"kind": kind, "uuid": uuid, "params": params}) + "\n")


class Work(Task):
    REQUIRED_FIELDS = ["name"]  # noqa: RUF012

    def run(self):
        record("work", self.uuid, self.params)
        return Result(uuid=self.uuid, stdout="worked")


class Job(Operation):
    def prerun(self):
        # kser 0.8.27 does not build the tasks of an operation that it received as a message.
        if not self.tasks:
            self.build(**self.params)

    def build_tasks(self, **kwargs):
        return [Work(params=kwargs), Work(params=kwargs)]

    def onsuccess(self, result):
        record("job", self.uuid, self.params)
        return result


Controller.register("peer.Work", Work)
Controller.register("peer.Job", Job)


def send(topic):
    messages = [Message(**fields) for fields in json.load(sys.stdin)]
    producer = Producer(CONFIG)
    results = [producer.send(topic, message) for message in messages[:-3]]
    results.append(producer.bulk_send(topic, messages[-3:]))
    producer.client.close()
    print(json.dumps([[result.retcode, str(result)] for result in results]))


def consume():
    Consumer(CONFIG, [os.environ["TOPIC"]]).run()


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(sys.argv[2])
    else:
        consume()
