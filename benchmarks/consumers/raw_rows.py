"""Write the rows of kser directly: ``python raw_rows.py URI COUNT TOGETHER [STEPS]`` prints steps per second.

The script writes COUNT operations of STEPS (5) tasks, with 50 operations in flight, with ``sqlite3`` or ``psycopg``
alone. TOGETHER is the number of steps per transaction: 1, or all 50 in flight. On PostgreSQL, single steps use 50
connections, so that the server can group the commits in its log. The script builds all rows before the measured time
begins.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cdumay_result import Result
from sqlalchemy import Table, make_url

from kser.schemas import dump_result
from kser.store import open_store
from kser.store.sql import tables

IN_FLIGHT = 50

uri, count, together = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 5
lite = uri.startswith("sqlite")
mark = "?" if lite else "%s"

#: A statement and its rows.
Work = tuple[str, list[tuple[Any, ...]]]


def insert(table: Table, *omitted: str) -> tuple[str, list[str]]:
    """Return an INSERT statement and the names of its columns."""
    names = [column.name for column in table.columns if column.name not in omitted and column.computed is None]
    return f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join([mark] * len(names))})", names


INSERTS = {
    name: insert(getattr(tables, name), *(["id"] if name == "event" else []))
    for name in ("operation", "task", "attempt", "event")
}
GO_ON = (
    f"UPDATE kser_operation SET step = {mark}, accumulated = {mark}, claim_count = 0, send_count = 0, sent_at = NULL"
    f" WHERE id = {mark} AND epoch = {mark} AND step = {mark} AND status = 'RUNNING'"
)
FINISH = (
    f"UPDATE kser_operation SET step = {mark}, accumulated = {mark}, claim_count = 0, send_count = 0, sent_at = NULL,"
    f" phase = 'SUCCESS', status = 'SUCCESS', epoch = 2, owner = NULL, lease_until = NULL, take_at = NULL,"
    f" send_at = NULL, due_reason = NULL, result = {mark}, ended_at = {mark}"
    f" WHERE id = {mark} AND epoch = {mark} AND step = {mark} AND status = 'RUNNING'"
)
END = (
    f"UPDATE kser_task SET status = 'SUCCESS', result = {mark}, attempts = 1"
    f" WHERE operation_id = {mark} AND position = {mark}"
)


def row(name: str, **values: Any) -> tuple[Any, ...]:
    """Return a row to insert; missing values are NULL, or 0 in a NOT NULL column."""
    columns = getattr(tables, name).columns
    return tuple(values.get(each, None if columns[each].nullable else 0) for each in INSERTS[name][1])


def result(identifier: str) -> str:
    """Return the result of a step as JSON."""
    return json.dumps(dump_result(Result(uuid=identifier, retval={"done": 1})))


def begin(identifiers: Sequence[int]) -> list[Work]:
    """Return the writes that accept and claim operations."""
    now, owner = time.time(), uuid.uuid4().hex
    operations, tasks, events = [], [], []
    for identifier in identifiers:
        name = str(uuid.uuid4())
        operations.append(
            row(
                "operation",
                **{"id": identifier, "uuid": name, "entrypoint": "__main__.Five", "root_id": identifier},
                **{"mode": "local", "topic": "benchmark-0123abcd", "overrides": 0, "status": "RUNNING"},
                **{
                    "phase": "RUN_TASK",
                    "step": 0,
                    "task_count": steps,
                    "created_at": now,
                    "started_at": now,
                    "cancel_requested": False,
                },
                **{"epoch": 1, "owner": owner, "token": uuid.uuid4().hex, "due_at": now},
                **{"lease_until": now + 30, "take_at": now + 30, "send_at": now + 31, "due_reason": "lease-expired"},
                **{"claim_count": 1, "send_count": 0, "refusal_count": 0},
                **{"target_uuid": name, "target_entrypoint": "__main__.Five", "target_topic": "benchmark-0123abcd"},
                **{"params": '{"order": 42}', "metadata": "{}"},
                accumulated=result(name),
            )
        )
        tasks += [
            row(
                "task",
                **{"operation_id": identifier, "position": position, "uuid": str(uuid.uuid4())},
                **{"entrypoint": "__main__.Noop", "topic": "benchmark-0123abcd", "status": "PENDING", "attempts": 0},
                **{"params": '{"order": 42}', "metadata": "{}"},
            )
            for position in range(steps)
        ]
        events.append(row("event", root_id=identifier, at=now, kind="accepted", epoch=0))
        events.append(row("event", root_id=identifier, at=now, kind="claimed", epoch=1, consumer=owner))
    return [(INSERTS["operation"][0], operations), (INSERTS["task"][0], tasks), (INSERTS["event"][0], events)]


def step(identifiers: Sequence[int], position: int) -> list[Work]:
    """Return the writes that record a finished step of each of these operations."""
    now, owner = time.time(), uuid.uuid4().hex
    texts = [result(str(uuid.uuid4())) for _ in identifiers]
    events = [
        row("event", root_id=each, at=now, kind="task-succeeded", epoch=1, consumer=owner, uuid=str(uuid.uuid4()))
        for each in identifiers
    ]
    if position < steps - 1:
        moves = [(position + 1, text, each, 1, position) for each, text in zip(identifiers, texts, strict=True)]
    else:
        moves = [
            (position + 1, text, text, now, each, 1, position) for each, text in zip(identifiers, texts, strict=True)
        ]
        events += [
            row("event", root_id=each, at=now, kind="ended", epoch=1, consumer=owner, text="SUCCESS")
            for each in identifiers
        ]
    attempts = [
        row(
            "attempt",
            **{"operation_id": each, "position": position, "number": 1, "epoch": 1, "status": "SUCCESS"},
            **{"consumer": owner, "started_at": now, "ended_at": now},
        )
        for each in identifiers
    ]
    return [
        (GO_ON if position < steps - 1 else FINISH, moves),
        (END, [(text, each, position) for each, text in zip(identifiers, texts, strict=True)]),
        (INSERTS["attempt"][0], attempts),
        (INSERTS["event"][0], events),
    ]


def transactions() -> Iterator[list[list[Work]]]:
    """Generate the transactions in order; transactions in one list can be written concurrently."""
    for first in range(0, count, IN_FLIGHT):
        flight = range(first + 1, min(first + IN_FLIGHT, count) + 1)
        parts = [flight[at : at + together] for at in range(0, len(flight), together)]
        yield [begin(part) for part in parts]
        for position in range(steps):
            yield [step(part, position) for part in parts]


def write_sqlite(batches: list[list[list[Work]]]) -> None:
    connection = sqlite3.connect(make_url(uri).database or "", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    for batch in batches:
        for transaction in batch:
            connection.execute("BEGIN IMMEDIATE")
            for statement, rows in transaction:
                connection.executemany(statement, rows)
            connection.execute("COMMIT")
    connection.close()


def write_postgresql(batches: list[list[list[Work]]]) -> None:
    import psycopg

    url = make_url(uri).set(drivername="postgresql").render_as_string(hide_password=False)
    threads = IN_FLIGHT if together == 1 else 1
    own = threading.local()

    def write(transaction: list[Work]) -> None:
        cursor = own.connection.cursor()
        for statement, rows in transaction:
            if len(rows) == 1:
                cursor.execute(statement, rows[0])
            else:
                cursor.executemany(statement, rows)
        own.connection.commit()

    def connect() -> None:
        own.connection = psycopg.connect(url)

    with ThreadPoolExecutor(threads, initializer=connect) as pool:
        for batch in batches:
            list(pool.map(write, batch))


store = open_store(uri)
store.check()
store.close()
batches = list(transactions())
began = time.perf_counter()
(write_sqlite if lite else write_postgresql)(batches)
print(count * steps / (time.perf_counter() - began))
