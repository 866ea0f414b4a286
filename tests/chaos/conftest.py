"""The tests in ``test_chaos.py`` are marked ``chaos``, and ``kafka``; the others here need no server."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.chaos.cluster import Cluster
from tests.conftest import needs
from tests.kafka.broker import KafkaBroker, ServiceMissing

CHAOS = Path(__file__).with_name("test_chaos.py")

Service = TypeVar("Service")

#: Replays a run that this seed was printed for.
SEED = "KSER_TEST_CHAOS_SEED"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: faults of all kinds, for minutes (see tests/chaos)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them here, so that no test can forget it."""
    for item in items:
        if item.path == CHAOS:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.kafka)


@pytest.fixture(scope="session")
def seed() -> int:
    """Of everything that is random; printed with each failure."""
    return int(os.environ.get(SEED) or random.randrange(1_000_000))


def _started(start: Callable[[], Service]) -> Service:
    try:
        return start()
    except ServiceMissing as problem:
        needs("Apache Kafka", problem)


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaBroker]:
    """One node, which these tests share."""
    with _started(KafkaBroker) as broker:
        yield broker


@pytest.fixture
def own_kafka() -> Iterator[KafkaBroker]:
    """One node for this test alone, which may stop, kill and start it."""
    with _started(KafkaBroker) as broker:
        yield broker


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three nodes."""
    with _started(Cluster) as made:
        yield made
