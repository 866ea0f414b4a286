"""The tests in ``test_chaos_operations.py`` need Kafka, and some of them PostgreSQL; the others here need no server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.conftest import own_kafka, pytest_configure, seed

CHAOS = Path(__file__).with_name("test_chaos_operations.py")

__all__ = ["own_kafka", "pytest_configure", "seed"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them here, so that no test can forget it."""
    for item in items:
        if item.path == CHAOS:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.kafka)
