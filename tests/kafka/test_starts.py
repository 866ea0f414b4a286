"""Tests of a message that kills its process, with consumers in processes of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kafka.broker import Kafka
from tests.kafka.helpers import (
    TRANSPORTS,
    Worker,
    committed,
    config,
    entries,
    message,
    read_values,
    send_records,
    uuids,
    wait_until,
)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_message_that_kills_its_process_is_given_up_and_the_others_run(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path, transport: str
) -> None:
    name = topic()
    kafka.create_topic(f"{name}.dlq")
    killer = message(then="die")
    others = [message() for _ in range(4)]
    send_records(kafka, name, [killer, *others])
    # With a static membership, a restarted member gets its partitions at once.
    options = config(kafka, name, group_instance_id="the one")
    ledger = tmp_path / "ledger"
    for _ in range(4):
        with Worker(
            options,
            name,
            ledger,
            transport=transport,
            KSER_MAX_STARTS="3",
            KSER_DEAD_LETTER="true",
            KSER_ORDERING="none",
        ) as worker:
            wait_until(
                lambda: worker.process.poll() is not None or committed(kafka, name, name) == 5,
                "the worker dies or commits all messages",
                60,
            )
            if worker.process.poll() is None:
                break
    assert "the message at offset 0" in worker.text and "3 consumers have died" in worker.text
    started = Counter(entry.subject for entry in entries(ledger) if entry.event == "start")
    assert started[killer.uuid] == 3
    assert set(uuids(others)) <= {entry.subject for entry in entries(ledger) if entry.event == "end"}
    assert read_values(kafka, f"{name}.dlq") == [killer.dumps().encode()]
    kafka.delete_topic(f"{name}.dlq")
