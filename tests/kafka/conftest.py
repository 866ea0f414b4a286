"""Apache Kafka for the tests in this folder, each of which is marked ``kafka``."""

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
    """Mark them here, so that no test can forget it."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kafka)


def _started() -> KafkaBroker:
    try:
        return KafkaBroker()
    except ServiceMissing as problem:
        needs("Apache Kafka", problem)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """The Apache Kafka that all tests share: at ``KSER_TEST_BOOTSTRAP_SERVERS``, else one that is started here."""
    if address := os.environ.get("KSER_TEST_BOOTSTRAP_SERVERS"):
        yield Kafka(address)
        return
    with _started() as broker:
        yield broker


@pytest.fixture
def own_kafka() -> Iterator[KafkaBroker]:
    """An Apache Kafka for this test alone, which may stop, kill and start it."""
    with _started() as broker:
        yield broker


@pytest.fixture
def topic(kafka: Kafka) -> Iterator[Callable[..., str]]:
    """``topic(partitions=1)`` creates a topic in the shared Apache Kafka, gone after the test, and gives its name."""
    names: list[str] = []

    def create(partitions: int = 1) -> str:
        name = f"kser-test-{uuid.uuid4()}"
        kafka.create_topic(name, partitions)
        names.append(name)
        return name

    yield create
    for name in names:
        kafka.delete_topic(name)
