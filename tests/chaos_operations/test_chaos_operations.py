"""Short chaos runs of operations on Kafka with PostgreSQL and with SQLite; the promises are checked at the end.

``KSER_TEST_CHAOS_SEED`` replays a run; the runs add their figures to the file that ``KSER_TEST_OPERATIONS_TABLE``
names. ``python -m tests.chaos_operations`` is the long run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.conftest import SEED
from tests.chaos.history import BROKER_KILL, BROKER_STOP, KILL, STOP, TERM
from tests.chaos_operations import report
from tests.chaos_operations.databases import FaultyDatabase, LockedSqlite, StoppedPostgresql
from tests.chaos_operations.plan import LONG_OUTAGE, SHORT_OUTAGE
from tests.chaos_operations.run import ChaosRun
from tests.conftest import own_postgresql
from tests.kafka.broker import KafkaBroker

# kafka-python leaves the sockets of connections that were refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def check(kafka: KafkaBroker, database: FaultyDatabase, folder: Path, seed: int, count: int, seconds: float) -> None:
    """Assert that all promises hold, and that faults of each kind hit."""
    outcome = ChaosRun(kafka, database, folder, seed, count, seconds).perform()
    print(report.text(outcome))
    report.add_to_table([outcome])
    replay = f"{SEED}={seed} plans the same run"
    assert not outcome.violations, "\n".join((replay, *outcome.violations, *outcome.last_output))
    missed = [kind for kind in (KILL, TERM, STOP, SHORT_OUTAGE, LONG_OUTAGE) if not outcome.hits[kind]]
    if not outcome.hits[BROKER_STOP] + outcome.hits[BROKER_KILL]:
        missed.append("outage of Kafka")
    assert not missed, f"no {', '.join(missed)} hit, so the run proves nothing; {replay}"


def test_operations_in_sqlite_survive_all_faults(own_kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(own_kafka, LockedSqlite(tmp_path), tmp_path, seed, 60, 24)


@pytest.mark.postgresql
def test_operations_in_postgresql_survive_all_faults(own_kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    with own_postgresql() as server:
        check(own_kafka, StoppedPostgresql(server), tmp_path, seed, 120, 40)
