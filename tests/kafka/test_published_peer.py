"""Tests of messages between this package and the published one, in both directions, over a real Kafka."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

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
from tests.kafka.helpers import HERE, Program, config, consuming, message, step_until, stored, wait_until

PEER = HERE / "published_peer.py"

#: Text that is easily spoilt on the way.
PARAMS = {"name": "Zoë \U0001f980 \ud800", "nested": {"list": [1, 2.5, None, True, {"a": "b"}]}, "text": 'a "b" \\ \n'}


@pytest.fixture(scope="session")
def published() -> Path:
    """The interpreter of the published package."""
    try:
        return published_python()
    except PublishedPackageMissing as problem:
        needs("kser 0.8.27", problem)


def peer_environment(folder: Path, options: dict[str, Any], topic: str) -> dict[str, str]:
    # Nothing of this package is on its path.
    return {"PEER_CONFIG": json.dumps(options), "TOPIC": topic, "LEDGER": str(folder / "ledger"), "PYTHONPATH": ""}


def test_messages_of_the_published_producer_are_handled(
    kafka: Kafka, topic: Callable[..., str], published: Path, tmp_path: Path
) -> None:
    handled: list[tuple[str, Any, Any, Any]] = []

    class Work(Task):
        def run(self) -> Result:
            handled.append((self.uuid, self.params, self.metadata, self.result.retval))
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
    fields = [json.loads(each.dumps()) for each in messages]
    sent = subprocess.run(
        [published, PEER, "send", name],
        input=json.dumps(fields),
        env=os.environ | peer_environment(tmp_path, {"bootstrap_servers": kafka.bootstrap_servers}, name),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert sent.returncode == 0, sent.stderr
    texts = [f"Message {each.entrypoint}[{each.uuid}] sent in {name}" for each in messages[:2]]
    assert json.loads(sent.stdout) == [*([0, text] for text in texts), [0, "3 message(s) sent"]]
    assert stored(kafka, name) == [each.dumps().encode() for each in messages], "the same bytes"

    with consuming(Consumer(config(kafka), [name])) as consumer:
        step_until(consumer, lambda: len(handled) == 6, "all are handled")
    assert handled[0] == ("1", PARAMS, {"k": "v"}, retval)
    assert [params for _, params, _, _ in handled[1:3]] == [PARAMS] * 2
    assert [uuid for uuid, _, _, _ in handled[3:]] == ["3", "4", "5"]


def test_messages_of_this_producer_are_handled_by_the_published_consumer(
    kafka: Kafka, topic: Callable[..., str], published: Path, tmp_path: Path
) -> None:
    name = topic()
    single, job, refused = message("peer.Work", **PARAMS), message("peer.Job", **PARAMS), message("peer.Work")
    single.result = Result(uuid=single.uuid, retval={"before": ["é"]})
    bulk = [message("peer.Work", name=str(number)) for number in range(20)]
    with closing(Producer({"bootstrap_servers": kafka.bootstrap_servers})) as producer:
        for each in (single, refused, job):
            assert producer.send(name, each).retcode == 0
        assert producer.bulk_send(name, bulk).retcode == 0
    options = config(kafka, auto_offset_reset="earliest", enable_auto_commit=False)
    ledger = tmp_path / "ledger"

    def noted() -> list[dict[str, Any]]:
        return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []

    environment = peer_environment(tmp_path, options, name)
    with Program([published, PEER, "consume"], environment, tmp_path / "peer.txt"):
        wait_until(lambda: len(noted()) >= 24, "all are handled")
    first, inner, second_inner, outer, *rest = noted()
    assert first == {"kind": "work", "uuid": single.uuid, "params": PARAMS}
    assert [each["params"] for each in (inner, second_inner)] == [PARAMS] * 2
    assert outer == {"kind": "job", "uuid": job.uuid, "params": PARAMS}
    assert [each["uuid"] for each in rest] == [each.uuid for each in bulk]
