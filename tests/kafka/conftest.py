"""Fixtures with Apache Kafka; each test in this folder is marked ``kafka``."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import needs
from tests.kafka.broker import Kafka, KafkaBroker, ServiceMissing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kafka)


def _start_broker() -> KafkaBroker:
    try:
        return KafkaBroker()
    except ServiceMissing as problem:
        needs("Apache Kafka", problem)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """Return the shared Apache Kafka: ``KSER_TEST_BOOTSTRAP_SERVERS``, or a broker that is started here."""
    if address := os.environ.get("KSER_TEST_BOOTSTRAP_SERVERS"):
        yield Kafka(address)
        return
    with _start_broker() as broker:
        yield broker


@pytest.fixture
def own_kafka() -> Iterator[KafkaBroker]:
    """Return an Apache Kafka for this test alone, which the test may stop, kill and start."""
    with _start_broker() as broker:
        yield broker


@pytest.fixture
def topic(kafka: Kafka) -> Iterator[Callable[..., str]]:
    """Return ``topic(partitions=1)``: creates a topic for this test in the shared Apache Kafka and returns its name."""
    names: list[str] = []

    def create(partitions: int = 1) -> str:
        name = f"kser-test-{uuid.uuid4()}"
        kafka.create_topic(name, partitions)
        names.append(name)
        return name

    yield create
    for name in names:
        kafka.delete_topic(name)
