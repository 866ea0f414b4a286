"""Tests of how soon operations continue: after the death of a consumer, for a retry, and after a resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kafka.broker import Kafka
from tests.kafka.continuation import (
    DISTRIBUTED,
    LOCAL,
    Case,
    Fleet,
    delays_after_kill,
    percentile,
    resume_delays,
    retry_delays,
)

if TYPE_CHECKING:
    from tests.postgres import Database

pytest.importorskip("sqlalchemy")

#: Seconds after the end of a lease by which operations continue.
AFTER_LEASE = 2.0
#: Seconds that the machine of the tests may add, because other programs use its processors.
LOAD = 4.0


def check_continuation(fleet: Fleet) -> None:
    """Check how soon operations begin again after a retry, a resume, and the death of their consumer.

    The consumer that continues them after the kill is idle, and has no partition.
    """
    fleet.start_two()
    retries, resumes = retry_delays(fleet, 20), resume_delays(fleet, 10)
    fleet.wait_for_trust()
    continued = delays_after_kill(fleet, (LOCAL, DISTRIBUTED), 20)
    print(
        f"{fleet.case}: retries begin {percentile(retries, 0.95):.3f} s after they are due (p95), resumed operations"
        f" after {percentile(resumes, 0.95):.3f} s (p95), and operations of a killed consumer after"
        f" {max(continued):.2f} s (longest)"
    )
    assert percentile(retries, 0.95) <= 0.3 + LOAD
    assert percentile(resumes, 0.95) <= 0.5 + LOAD
    assert max(continued) <= fleet.lease + AFTER_LEASE + LOAD


def test_operations_continue_soon_with_the_default_settings(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> None:
    """durability rules 12, 20, 25 and 27"""
    case = Case("python_kafka", f"sqlite:///{tmp_path / 'kser.db'}")
    with contextlib.closing(Fleet(kafka, topic(), case, tmp_path)) as fleet:
        check_continuation(fleet)


def test_operations_continue_soon_with_postgresql(
    kafka: Kafka, topic: Callable[..., str], database: Database, tmp_path: Path
) -> None:
    """durability rules 12, 20, 25 and 27: with a shorter lease, to save time."""
    database.empty()
    with contextlib.closing(Fleet(kafka, topic(), Case("confluent", database.uri, 3), tmp_path)) as fleet:
        check_continuation(fleet)
