"""Markers: only the tests in ``test_chaos_operations.py`` need Kafka, and one of them PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.conftest import own_kafka, pytest_configure, seed

CHAOS = Path(__file__).with_name("test_chaos_operations.py")

__all__ = ["own_kafka", "pytest_configure", "seed"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the chaos tests here, so that no test can lack the markers."""
    for item in items:
        if item.path == CHAOS:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.kafka)
