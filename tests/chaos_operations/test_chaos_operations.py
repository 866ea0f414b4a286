"""Short chaos run of operations on Kafka with PostgreSQL and with SQLite, with the promises checked at the end.

``KSER_TEST_CHAOS_SEED`` replays a run; figures are added to the file that ``KSER_TEST_OPERATIONS_TABLE`` names.
``python -m tests.chaos_operations`` is the long run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.conftest import SEED
from tests.chaos.history import BROKER_KILL, BROKER_STOP, KILL, STOP, TERM
from tests.chaos_operations import report
from tests.chaos_operations.databases import Faulty, LockedSqlite, StoppedPostgresql
from tests.chaos_operations.plan import LONG_OUTAGE, SHORT_OUTAGE
from tests.chaos_operations.run import Chaos
from tests.conftest import own_postgresql
from tests.kafka.broker import KafkaBroker

# kafka-python leaves the sockets of connections that were refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def check(kafka: KafkaBroker, database: Faulty, folder: Path, seed: int, count: int, seconds: float) -> None:
    """Everything that was promised holds, although faults of each kind hit."""
    outcome = Chaos(kafka, database, folder, seed, count, seconds).perform()
    print(report.text(outcome))
    report.add_to_table([outcome])
    replay = f"{SEED}={seed} does the same again"
    assert not outcome.broken, "\n".join((replay, *outcome.broken, *outcome.last_words))
    missed = [kind for kind in (KILL, TERM, STOP, SHORT_OUTAGE, LONG_OUTAGE) if not outcome.hits[kind]]
    if not outcome.hits[BROKER_STOP] + outcome.hits[BROKER_KILL]:
        missed.append("outage of Kafka")
    assert not missed, f"no {', '.join(missed)} hit, so nothing was shown; {replay}"


def test_operations_in_sqlite_survive_all_faults(own_kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    check(own_kafka, LockedSqlite(tmp_path), tmp_path, seed, 60, 24)


@pytest.mark.postgresql
def test_operations_in_postgresql_survive_all_faults(own_kafka: KafkaBroker, tmp_path: Path, seed: int) -> None:
    with own_postgresql() as server:
        check(own_kafka, StoppedPostgresql(server), tmp_path, seed, 120, 40)
