"""Tests of messages between this package and kser 0.8.27, in both directions, on Apache Kafka."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.conftest import needs
from tests.differential.published_package import PublishedPackageMissing, published_python
from tests.kafka.broker import Kafka
from tests.kafka.helpers import HERE, Program, config, message, read_values, step_until, uuids, wait_until

PEER = HERE / "published_peer.py"

#: Params with text and numbers that an incompatible encoding would change.
PARAMS = {"name": "Zoë \U0001f980 \ud800", "nested": {"list": [1, 2.5, None, True, {"a": "b"}]}, "text": 'a "b" \\ \n'}


class Handled(NamedTuple):
    """A task as it ran in this package."""

    uuid: str
    params: Any
    metadata: Any
    retval: Any


@pytest.fixture(scope="session")
def published() -> Path:
    """Return the Python interpreter of an environment with kser 0.8.27."""
    try:
        return published_python()
    except PublishedPackageMissing as problem:
        needs("kser 0.8.27", problem)


def peer_environment(folder: Path, options: dict[str, Any], topic: str) -> dict[str, str]:
    """Return the environment variables of the peer; the empty PYTHONPATH hides this package from it."""
    return {"PEER_CONFIG": json.dumps(options), "TOPIC": topic, "LEDGER": str(folder / "ledger"), "PYTHONPATH": ""}


def test_messages_of_the_published_producer_are_handled(
    kafka: Kafka, topic: Callable[..., str], published: Path, tmp_path: Path
) -> None:
    handled: list[Handled] = []

    class Work(Task):
        def run(self) -> Result:
            handled.append(Handled(self.uuid, self.params, self.metadata, self.result.retval))
            return Result(uuid=self.uuid, stdout="worked")

    class Job(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Work(params=kwargs), Work(params=kwargs)]

    Controller.register("peer.Work", Work)
    Controller.register("peer.Job", Job)
    name = topic()
    retval = {"before": ["é"]}
    messages = [
        Message("1", "peer.Work", params=PARAMS, metadata={"k": "v"}, result=Result(uuid="r", retval=retval)),
        Message("2", "peer.Job", params=PARAMS),
        *(Message(str(number), "peer.Work") for number in (3, 4, 5)),
    ]
    fields = [json.loads(message.dumps()) for message in messages]
    sent = subprocess.run(
        [published, PEER, "send", name],
        input=json.dumps(fields),
        env=os.environ | peer_environment(tmp_path, {"bootstrap_servers": kafka.bootstrap_servers}, name),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout) == [
        [0, f"Message peer.Work[1] sent in {name}"],
        [0, f"Message peer.Job[2] sent in {name}"],
        [0, "3 message(s) sent"],
    ]
    assert read_values(kafka, name) == [message.dumps().encode() for message in messages]

    with closing(Consumer(config(kafka), [name])) as consumer:
        step_until(consumer, lambda: len(handled) == 6, "all messages are handled")
    single, first_task, second_task, *bulk = handled
    assert single == Handled("1", PARAMS, {"k": "v"}, retval)
    assert (first_task.params, second_task.params) == (PARAMS, PARAMS)
    assert [work.uuid for work in bulk] == ["3", "4", "5"]


def test_messages_of_this_producer_are_handled_by_the_published_consumer(
    kafka: Kafka, topic: Callable[..., str], published: Path, tmp_path: Path
) -> None:
    name = topic()
    # The peer rejects the last message, because its required param is missing.
    single, job, rejected = message("peer.Work", **PARAMS), message("peer.Job", **PARAMS), message("peer.Work")
    single.result = Result(uuid=single.uuid, retval={"before": ["é"]})
    bulk = [message("peer.Work", name=str(number)) for number in range(20)]
    with closing(Producer({"bootstrap_servers": kafka.bootstrap_servers})) as producer:
        for sent in (single, rejected, job):
            assert producer.send(name, sent).retcode == 0
        assert producer.bulk_send(name, bulk).retcode == 0
    options = config(kafka, auto_offset_reset="earliest", enable_auto_commit=False)
    ledger = tmp_path / "ledger"

    def recorded() -> list[dict[str, Any]]:
        return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []

    environment = peer_environment(tmp_path, options, name)
    with Program([published, PEER, "consume"], environment, tmp_path / "peer.txt"):
        wait_until(lambda: len(recorded()) >= 24, "all messages are handled")
    work, first_task, second_task, operation, *rest = recorded()
    assert work == {"kind": "work", "uuid": single.uuid, "params": PARAMS}
    assert (first_task["params"], second_task["params"]) == (PARAMS, PARAMS)
    assert operation == {"kind": "job", "uuid": job.uuid, "params": PARAMS}
    assert [entry["uuid"] for entry in rest] == uuids(bulk)
