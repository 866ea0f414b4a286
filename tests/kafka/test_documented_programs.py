"""Tests of the documented programs: they run as printed in the documentation."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kafka.broker import Kafka, KafkaBroker
from tests.kafka.helpers import REPOSITORY, Program, Worker, config, message, send_records, wait_until

DICE = REPOSITORY / "examples" / "dice"


@pytest.fixture
def run(kafka: Kafka, tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    """Return ``run(name)``: starts a program of ``examples/dice``; the fixture ends it after the test."""
    kafka.create_topic("dice")
    settings = {
        "PYTHONPATH": str(REPOSITORY),
        "KSER_CONFIG": json.dumps(config(kafka)),
        "KSER_TOPICS": "dice",
    }
    programs: list[Program] = []

    def start(name: str) -> Program:
        program = Program([sys.executable, DICE / f"{name}.py"], settings, tmp_path / f"{name}-{len(programs)}.txt")
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.end()
    kafka.delete_topic("dice")


def test_dice_task_rolls_once_and_dice_operation_rolls_three_times(run: Callable[[str], Program]) -> None:
    consumer = run("consumer")
    consumer.wait_for_text("Setting newly assigned partitions")
    for name in ("producer", "launch"):
        program = run(name)
        assert program.wait() == 0, program.text
        assert re.search(r"Producer\.Success: __main__\.Dice\w+\[\S+\]: Message __main__\.Dice\w+\[\S+\] sent in dice",
                         program.text), program.text  # fmt: skip
        assert "Traceback" not in program.text
    wait_until(lambda: consumer.text.count("Controller.Success") == 2, "both messages are handled")
    rolls = re.findall(
        r"DiceRoll\.Success: __main__\.DiceRoll\[\S+\]: You made a ([1-6])$", consumer.text, re.MULTILINE
    )
    assert len(rolls) == 4, consumer.text
    assert re.search(r"DiceLaunch\.Success: __main__\.DiceLaunch\[\S+\]: You made a [1-6]", consumer.text)
    assert "'PENDING' -> 'RUNNING'" in consumer.text and "'RUNNING' -> 'SUCCESS'" in consumer.text
    consumer.send_signal(signal.SIGINT)
    assert consumer.wait() == 0
    assert "Traceback" not in consumer.text


def test_documented_programs_start_in_any_order(run: Callable[[str], Program]) -> None:
    assert run("launch").wait() == 0
    consumer = run("consumer")
    consumer.wait_for_text("DiceLaunch.Success")
    consumer.send_signal(signal.SIGTERM)
    assert consumer.wait() == 0


def test_consumer_may_start_before_its_topic_exists(own_kafka: KafkaBroker, tmp_path: Path) -> None:
    with Worker(config(own_kafka), "late", tmp_path / "ledger") as worker:
        worker.wait_for_text("Worker.Starting...")
        wait_until(lambda: "late" in worker.text, "the missing topic is logged")
        own_kafka.create_topic("late")
        send_records(own_kafka, "late", [message()])
        worker.wait_for("end", 1)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_producer_logs_a_missing_topic(own_kafka: KafkaBroker, tmp_path: Path) -> None:
    settings = {
        "PYTHONPATH": str(REPOSITORY),
        "KSER_CONFIG": json.dumps({"bootstrap_servers": own_kafka.bootstrap_servers, "max_block_ms": 1000}),
    }
    with Program([sys.executable, DICE / "producer.py"], settings, tmp_path / "producer.txt") as program:
        assert program.wait() == 0
        assert "Producer.Failed: __main__.Dice" in program.text
        assert "'dice'" in program.text
