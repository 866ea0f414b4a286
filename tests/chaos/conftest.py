"""Markers and fixtures: only the tests in ``test_chaos.py`` need a server, and are marked ``chaos`` and ``kafka``."""

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

#: The variable that replays a run with its printed seed.
SEED = "KSER_TEST_CHAOS_SEED"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: faults of all kinds, for minutes (see tests/chaos)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the chaos tests here, so that no test can lack the markers."""
    for item in items:
        if item.path == CHAOS:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.kafka)


@pytest.fixture(scope="session")
def seed() -> int:
    """Return the seed of all random choices; each failure prints it."""
    return int(os.environ.get(SEED) or random.randrange(1_000_000))


def _started(start: Callable[[], Service]) -> Service:
    """Start a service, or skip the test if Kafka is missing."""
    try:
        return start()
    except ServiceMissing as problem:
        needs("Apache Kafka", problem)


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaBroker]:
    """Return a broker that the tests share."""
    with _started(KafkaBroker) as broker:
        yield broker


@pytest.fixture
def own_kafka() -> Iterator[KafkaBroker]:
    """Return a broker of this test, which may stop, kill and start it."""
    with _started(KafkaBroker) as broker:
        yield broker


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Return a cluster of three nodes."""
    with _started(Cluster) as cluster:
        yield cluster
