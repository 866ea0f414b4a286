"""Measure the milliseconds of ``find`` for a page of 50 out of 1,000,000 operations, on SQLite and PostgreSQL.

The script calls ``find`` of the registry with each combination of these filters: status, entrypoint, since, one
metadata key, and the cursor of a previous page. It runs each combination several times with different values, and
prints the median and the maximum.

Of the operations, 90 % are SUCCESS, 5 % FAILED, 3 % CANCELLED, 1 % RUNNING and 1 % PENDING. They have 20 entrypoints,
and were created over 90 days. The metadata of each operation has one of 10,000 customers and one of 5 regions. Params
and results have 300 bytes.

Usage: ``python benchmarks/find.py [COUNT [sqlite | postgresql]]``.
"""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psycopg  # noqa: E402
from sqlalchemy import Table, make_url  # noqa: E402

from kser import OperationRegistry  # noqa: E402
from kser.store.sql import SQLStore, tables  # noqa: E402
from kser.store.sql.ids import id_at  # noqa: E402
from tests.postgres import Database, Postgresql  # noqa: E402

TIMES = 25
PAGE = 50
DAYS = 90
STATES: Final = [*["SUCCESS"] * 90, *["FAILED"] * 5, *["CANCELLED"] * 3, "RUNNING", "PENDING"]
ENTRYPOINTS: Final = [f"shop.Operation{number}" for number in range(20)]
CUSTOMERS, REGIONS = 10_000, 5
TEXT: Final = json.dumps({"text": "x" * 280})
RESULT: Final = json.dumps({"uuid": "", "retcode": 0, "stdout": "x" * 220, "stderr": "", "retval": {"done": 1}})


def operations(count: int, now: float, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Generate the rows of operations, oldest first."""
    for number in range(count):
        created = now - DAYS * 86400 * (count - number) / count
        status = chance.choice(STATES)
        final = status not in ("RUNNING", "PENDING")
        identifier, name = id_at(created) + number % 4096, str(uuid.UUID(int=chance.getrandbits(128), version=4))
        entrypoint = chance.choice(ENTRYPOINTS)
        yield {
            **{"id": identifier, "root_id": identifier, "uuid": name, "entrypoint": entrypoint, "mode": "local"},
            **{"topic": "shop", "overrides": 0, "status": status, "phase": status if final else "RUN_TASK"},
            **{"step": 5 if final else 1, "task_count": 5, "created_at": created, "started_at": created, "epoch": 2},
            **{"cancel_requested": False, "due_at": created, "claim_count": 0, "send_count": 0, "target_uuid": name},
            **{"target_entrypoint": entrypoint, "target_topic": "shop", "params": TEXT, "accumulated": RESULT},
            "metadata": json.dumps({"customer": str(number % CUSTOMERS), "region": str(chance.randrange(REGIONS))}),
            "ended_at": created + 1 if final else None,
            "lease_until": None if final else now + 3600,
            "take_at": None if final else now + 3600,
            "send_at": None if final else now + 3601,
            "due_reason": None if final else "lease-expired",
            "result": RESULT if final else None,
        }


def labels(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Generate the rows of searchable metadata for these operations."""
    for row in rows:
        for key, value in json.loads(row["metadata"]).items():
            yield key, value, row["id"]


def values(table: Table, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Generate rows in the order of the table's columns; missing values are NULL, or 0 in a NOT NULL column."""
    columns = [(column.name, None if column.nullable else 0) for column in table.columns if column.computed is None]
    for row in rows:
        yield tuple(row.get(name, default) for name, default in columns)


def fill(uri: str, count: int, seed: int) -> None:
    """Fill a database in bulk with operations and their searchable metadata."""
    now = time.time()

    def rows() -> Iterator[dict[str, Any]]:
        return operations(count, now, random.Random(seed))

    url = make_url(uri)
    if url.drivername.startswith("sqlite"):
        with closing(sqlite3.connect(url.database or "")) as connection:
            # Both databases expect values for all columns but the computed ones.
            marks = ", ".join("?" for column in tables.operation.columns if column.computed is None)
            connection.executemany(f"INSERT INTO kser_operation VALUES ({marks})", values(tables.operation, rows()))
            sorted_labels = sorted(labels(rows()))
            connection.executemany("INSERT INTO kser_label VALUES (?, ?, ?)", sorted_labels)
            connection.commit()
        return
    address = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY kser_operation FROM STDIN") as copy:
            for row in values(tables.operation, rows()):
                copy.write_row(row)
        with cursor.copy("COPY kser_label FROM STDIN") as copy:
            for label in labels(rows()):
                copy.write_row(label)
    with psycopg.connect(address, autocommit=True) as connection:
        # Analyze the tables now, because the planner needs the statistics, and autovacuum would run later.
        connection.execute("VACUUM ANALYZE")


def queries(chance: random.Random, now: float) -> dict[str, list[dict[str, Any]]]:
    """Return the queries, by the names of their filters."""
    filters: dict[str, Any] = {
        "status": lambda: {"status": chance.choice(["SUCCESS", "FAILED", "CANCELLED", "RUNNING", "PENDING"])},
        "entrypoint": lambda: {"entrypoint": chance.choice(ENTRYPOINTS)},
        "since": lambda: {"since": now - chance.uniform(0.1, DAYS) * 86400},
        "customer": lambda: {"metadata": {"customer": str(chance.randrange(CUSTOMERS))}},
        "region": lambda: {"metadata": {"region": str(chance.randrange(REGIONS))}},
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for size in range(len(filters)):
        for names in itertools.combinations(filters, size):
            if not {"customer", "region"} <= set(names):
                made = [{key: value for name in names for key, value in filters[name]().items()} for _ in range(TIMES)]
                found[", ".join(names) or "nothing"] = made
    return found


def measure(registry: OperationRegistry, asked: list[dict[str, Any]], cursors: bool) -> tuple[float, float, int] | None:
    """Return the median and the maximum in milliseconds, and the number of rows; None if no page has a next page."""
    times, rows = [], 0
    for query in asked:
        after = None
        if cursors:
            after = registry.find(**query, limit=PAGE).cursor
            if after is None:
                continue
        began = time.perf_counter()
        page = registry.find(**query, limit=PAGE, after=after)
        times.append((time.perf_counter() - began) * 1000)
        rows += len(page)
    return (statistics.median(times), max(times), rows) if times else None


def report(name: str, uri: str, count: int, seed: int) -> None:
    """Fill a database, run the queries, and print their times."""
    store = SQLStore(uri)
    store.check()
    began = time.perf_counter()
    fill(uri, count, seed)
    took = time.perf_counter() - began
    print(f"{name}: {count:,} operations, filled in {took:.0f} s; p50 and maximum of {TIMES}, in ms")
    registry = OperationRegistry(store=store)
    registry.find(limit=PAGE)
    worst = 0.0
    for filters, asked in queries(random.Random(seed), time.time()).items():
        for cursors in (False, True):
            times = measure(registry, asked, cursors)
            if times is not None:
                worst = max(worst, times[0])
                label = f"{filters}, after a cursor" if cursors else filters
                print(f"  {label}: {times[0]:.2f}, {times[1]:.2f} ({times[2] / TIMES:.0f} rows)")
    print(f"{name}: the slowest p50 is {worst:.2f} ms (wanted: below 20)")
    store.close()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    kinds = sys.argv[2:] or ["sqlite", "postgresql"]
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    if "sqlite" in kinds:
        with tempfile.TemporaryDirectory() as folder:
            report("SQLite", f"sqlite:///{folder}/find.db", count, seed)
    if "postgresql" in kinds:
        with Postgresql() as server:
            report("PostgreSQL", Database(server.uri).uri, count, seed)


if __name__ == "__main__":
    main()
