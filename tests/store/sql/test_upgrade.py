"""Tests of the upgrade of tables of an older version, with rows of all kinds."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, event

from kser.errors import SchemaMismatch
from kser.store.__main__ import main
from kser.store.base import Store
from kser.store.model import Claim, DueStep, Mode, Phase
from kser.store.sql import SQLStore, schema
from kser.store.sql.store import database_at
from kser.store.sql.tables import metadata
from tests.postgres import Database as PostgresqlDatabase
from tests.store.harness import (
    SQLStoreHarness,
    claim_request,
    claim_root,
    due_steps,
    ending_checkpoint,
    reserve,
    resume_stored,
    row_of,
    step_checkpoint,
)
from tests.store.sql.old_tables import LARGE, TASKS, OldTables, rows_of, tables_of
from tests.support import ROOT

#: The values of a row with a claim of version 1.
CLAIMED = {"owner": "old-consumer", "token": "old-token", "status": "RUNNING", "epoch": 1, "claim_count": 1}
#: The names of the alembic and SQLite tables that the metadata does not declare.
FOREIGN = ("kser_migration", "sqlite_")


@contextlib.contextmanager
def new_postgresql(server: str) -> Iterator[PostgresqlDatabase]:
    """Provide a database on the server of the tests, without tables."""
    with contextlib.closing(PostgresqlDatabase(server)) as database:
        database.run("DROP SCHEMA public CASCADE")
        database.run("CREATE SCHEMA public")
        yield database


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def old(request: pytest.FixtureRequest, path: Path) -> Iterator[OldTables]:
    """Return a database with the tables of version 1: in SQLite, and in another test in PostgreSQL."""
    if request.param == "sqlite":
        yield OldTables(f"sqlite:///{path}")
        return
    with new_postgresql(request.getfixturevalue("postgresql")) as database:
        yield OldTables(database.uri)


def add_all_kinds(old: OldTables) -> None:
    """Write operations of each kind, as the code of version 1 wrote them.

    Steps with the word ``later`` in their names are due after :data:`LATER` seconds, all others at once.
    """
    old.add_root("new", -10)
    old.add_root("new-large", -10, params=LARGE)
    old.add_root("unbuilt", -10, phase=Phase.BUILD, task_count=None)
    old.add_root("sent", -10, send_count=1, sent_at=old.now - 70)
    old.add_root("sent-later", 1000, send_count=3, sent_at=old.now)
    old.add_root("claimed", -10, **CLAIMED, step=1, started_at=old.now - 40)
    old.add_root("claimed-later", 1000, **CLAIMED, step=2, started_at=old.now)
    old.add_root("claimed-often-later", 1000, **{**CLAIMED, "claim_count": 5, "epoch": 5})
    old.add_root("claimed-very-often-later", 1000, **{**CLAIMED, "claim_count": 19, "epoch": 19})
    old.add_root("cancel-later", 1000, **CLAIMED, cancel_requested=True, cancel_reason="no stock")
    old.add_root("released", -10, status="RUNNING", epoch=2, step=1, token="old-token")
    old.add_root("taken", -10, status="RUNNING", epoch=1, claim_count=1, token="old-token", send_count=1)
    old.add_root("retry", -10, due=-10, status="RUNNING", epoch=2, step=1, token="old-token")
    old.add_root("retry-later", 1000, due=1000, status="RUNNING", epoch=2, step=1, token="old-token")
    old.add_root("unscheduled", None)
    task = {"target_uuid": "task", "target_entrypoint": "shop.Charge", "target_topic": "gpu"}
    old.add_root("distributed", -10, mode=Mode.DISTRIBUTED, status="RUNNING", epoch=2, step=1, **task)
    parent = old.add_root("parent-later", 1000, **CLAIMED, step=1)
    old.add_nested("nested", parent, 1)
    for status in ("SUCCESS", "FAILED", "CANCELLED"):
        phase = Phase.END_SUCCESS if status == "SUCCESS" else Phase.END_FAILED
        ended = {"status": status, "phase": phase, "epoch": 4, "ended_at": old.now, "result": '{"ended": 1}'}
        old.add_root(status, None, step=TASKS - 1, **ended)
    old.write()


#: Seconds after which the leases of :func:`add_all_kinds` end and its retries are due.
LATER = 1000
#: Seconds after which also the delayed takeovers of steps that were claimed often are due.
LAST = LATER + 400


def upgrade(old: OldTables) -> None:
    """Upgrade the tables with the command."""
    assert main(["upgrade", "--uri", old.uri]) == 0


def times_of(store: Store, old: OldTables, uuid: str) -> tuple[Any, ...]:
    """Return the due reason of an operation, and the seconds from ``old.now`` to the other times of its due step."""
    row = row_of(store, uuid)
    seconds = (None if at is None else round(at - old.now, 3) for at in (row.lease_until, row.take_at, row.send_at))
    return (row.due_reason, *seconds)


def finish(store: Store, step: DueStep) -> str:
    """Claim a reserved step, run its operation to its end, and return the status."""
    claim = store.claim(step.uuid, step.target.uuid, claim_request(topic=step.target.topic, epoch=step.epoch))
    assert isinstance(claim, Claim)
    assert not claim.exhausted
    return run(store, claim)


def run(store: Store, claim: Claim) -> str:
    """Run a claimed operation to its end, and return its status."""
    if claim.root.task_count is None:
        return store.checkpoint(ending_checkpoint(claim, 0, outcomes=[]))
    for position in range(claim.root.step, TASKS - 1):
        if store.checkpoint(step_checkpoint(claim, position)) != "RUNNING":
            return row_of(store, claim.root.uuid).status
    return store.checkpoint(ending_checkpoint(claim, TASKS - 1))


def test_upgrade_schedules_the_steps_of_version_1(old: OldTables) -> None:
    add_all_kinds(old)
    upgrade(old)
    with contextlib.closing(SQLStore(old.uri)) as store:
        store.check()
        uuids = ["new", "sent", "sent-later", "claimed", "claimed-later", "claimed-often-later", "released", "nested"]
        uuids += ["claimed-very-often-later", "taken", "retry", "retry-later", "unscheduled", "SUCCESS", "FAILED"]
        times = {uuid: times_of(store, old, uuid) for uuid in uuids}
        rows = {uuid: row_of(store, uuid) for uuid in times}
    assert times == {
        "new": ("unsent", None, -10, -10),
        "sent": ("unclaimed", None, -10, -9),
        "sent-later": ("unclaimed", None, 1000, 1001),
        "claimed": ("lease-expired", -10, -10, -9),
        "claimed-later": ("lease-expired", 1000, 1000, 1001),
        "claimed-often-later": ("lease-expired", 1000, 1008, 1009),
        "claimed-very-often-later": ("lease-expired", 1000, 1300, 1301),
        "released": ("unsent", None, -10, -10),
        "taken": ("unclaimed", None, -10, -9),
        "retry": ("retry-due", None, -10, -9),
        "retry-later": ("retry-due", None, 1000, 1001),
        "unscheduled": ("unsent", None, -100, -100),
        "nested": (None, None, None, None),
        "SUCCESS": (None, None, None, None),
        "FAILED": (None, None, None, None),
    }
    refusals = {(row.refusal_count, row.refused_since, row.current_entrypoints) for row in rows.values()}
    assert refusals == {(0, None, None)}


def test_all_operations_of_version_1_end_after_an_upgrade(old: OldTables) -> None:
    add_all_kinds(old)
    upgrade(old)
    with contextlib.closing(SQLStoreHarness(old.uri)) as harness:
        store: Store = harness.store
        held = store.claim("claimed-later", "claimed-later", claim_request())
        assert not isinstance(held, Claim)
        assert {finish(store, step) for step in reserve(store, 100)} == {"SUCCESS"}
        left = {"sent-later", "claimed-later", "claimed-often-later", "claimed-very-often-later", "cancel-later"}
        left |= {"retry-later", "parent-later"}
        with old.open() as database:
            rows = rows_of(database)["kser_operation"]
        assert {row["uuid"] for row in rows if row["take_at"] is not None} == left
        harness.advance(LAST)
        statuses = {step.uuid: finish(store, step) for step in reserve(store, 100)}
        assert statuses == {uuid: "CANCELLED" if uuid == "cancel-later" else "SUCCESS" for uuid in left}
        for uuid in ("FAILED", "CANCELLED"):
            assert run(store, claim_root(store, resume_stored(store, uuid))) == "SUCCESS"
        harness.advance(LAST)
        assert (reserve(store, 100), due_steps(store, 100)) == ([], [])
        assert store.get_topics() == []


def test_reaper_finds_the_steps_of_version_1(old: OldTables) -> None:
    add_all_kinds(old)
    upgrade(old)
    with contextlib.closing(SQLStoreHarness(old.uri)) as harness:
        harness.advance(LAST)
        found = dict(due_steps(harness.store, 100))
    assert len(found) == 17
    assert (found["claimed"], found["retry-later"], found["distributed"]) == ("lease-expired", "retry-due", "unsent")


def test_upgrade_keeps_all_other_values(old: OldTables) -> None:
    add_all_kinds(old)
    with old.open() as database:
        before = rows_of(database)
        upgrade(old)
        after = rows_of(database)
    for row in after["kser_operation"]:
        for name in ("lease_until", "take_at", "send_at", "due_reason", "urgent", "refusal_count", "refused_since"):
            del row[name]
        del row["current_entrypoints"]
    for row in before["kser_operation"]:
        del row["next_check_at"]
    for rows in (before, after):
        rows["kser_operation"].sort(key=lambda row: row["id"])
    assert [row["version_num"] for row in after.pop("kser_migration")] == ["0002"]
    assert [row["version_num"] for row in before.pop("kser_migration")] == ["0001"]
    assert after.pop("kser_schema") == [{"version": 2, "oldest": 2}]
    assert before.pop("kser_schema") == [{"version": 1, "oldest": 1}]
    assert after == before


def test_repeated_upgrade_does_nothing(old: OldTables, capsys: pytest.CaptureFixture[str]) -> None:
    add_all_kinds(old)
    with old.open() as database:
        name = database.name
        assert main(["status", "--uri", old.uri]) == 1
        upgrade(old)
        after = rows_of(database), tables_of(database)
        assert main(["status", "--uri", old.uri]) == 0
        upgrade(old)
        assert (rows_of(database), tables_of(database)) == after
    assert capsys.readouterr().out.splitlines() == [
        f"{name} has tables of version 1, and this kser needs 2; run: python -m kser.store upgrade",
        f"{name} has tables of version 2 now; there were version 1 before",
        f"{name} has tables of version 2; this kser needs 2",
        f"{name} has tables of version 2 already: nothing to do",
    ]


def test_store_refuses_tables_of_version_1_and_does_not_change_them(old: OldTables) -> None:
    """durability rule 34: the error contains the command that upgrades them."""
    old.add_root("new", -10)
    old.write()
    with old.open() as database:
        before = rows_of(database), tables_of(database)
        problem = r"has tables of version 1, and this kser needs 2; run: python -m kser\.store upgrade"
        with contextlib.closing(SQLStore(old.uri)) as store:
            for call in (store.check, lambda: store.get_operation("new"), lambda: reserve(store)):
                with pytest.raises(SchemaMismatch, match=problem):
                    call()
        assert (rows_of(database), tables_of(database)) == before


# -- interrupted upgrades ----------------------------------------------------------------------------------------------


class Interruption(Exception):
    """An interruption of an upgrade"""


@contextlib.contextmanager
def interrupted_before(number: int) -> Iterator[None]:
    """Interrupt each process of this test before the statement with this number, if there are so many."""
    count = 0

    def interrupt(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise Interruption

    event.listen(Engine, "before_cursor_execute", interrupt)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", interrupt)


def test_upgrade_that_fails_at_any_statement_leaves_version_1_whole(old: OldTables) -> None:
    old.add_root("claimed", -10, **CLAIMED)
    old.write()
    with old.open() as database:
        before = rows_of(database), tables_of(database)
        statement = 0
        is_upgraded = False
        while not is_upgraded:
            statement += 1
            with contextlib.suppress(Interruption), interrupted_before(statement):
                schema.upgrade(database)
                is_upgraded = True
            if not is_upgraded:
                assert (rows_of(database), tables_of(database)) == before
        assert statement > 10
    with contextlib.closing(SQLStore(old.uri)) as store:
        (step,) = reserve(store)
        assert finish(store, step) == "SUCCESS"


@pytest.mark.parametrize("statement", ["CREATE INDEX kser_operation_due", "UPDATE kser_migration"])
def test_upgrade_that_is_killed_leaves_version_1_whole(old: OldTables, statement: str) -> None:
    add_all_kinds(old)
    with old.open() as database:
        before = rows_of(database), tables_of(database)
    command = [sys.executable, "-m", "tests.store.sql.upgrade_process", old.uri, statement]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    with old.open() as database:
        assert (rows_of(database), tables_of(database)) == before
    upgrade(old)
    with contextlib.closing(SQLStore(old.uri)) as store:
        assert {finish(store, step) for step in reserve(store, 100)} == {"SUCCESS"}


# -- the tables --------------------------------------------------------------------------------------------------------


# Old versions of alembic do not compare computed columns of SQLite.
@pytest.mark.filterwarnings("ignore:Computed default on kser_operation.urgent:UserWarning")
def test_upgraded_tables_equal_new_tables(old: OldTables, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    add_all_kinds(old)
    upgrade(old)
    with contextlib.ExitStack() as stack:
        if old.uri.startswith("sqlite"):
            new = f"sqlite:///{tmp_path}/new.db"
        else:
            new = stack.enter_context(new_postgresql(request.getfixturevalue("postgresql"))).uri
        assert main(["upgrade", "--uri", new]) == 0
        upgraded = stack.enter_context(old.open())
        assert tables_of(upgraded) == tables_of(stack.enter_context(contextlib.closing(database_at(new))))
        with upgraded.inspect_connection() as connection:
            options = {"version_table": "kser_migration", "compare_type": True, "include_object": _is_ours}
            assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def _is_ours(_object: Any, name: str | None, *_: Any) -> bool:
    return not (name or "").startswith(FOREIGN)


def test_sqlite_keeps_the_large_texts_at_the_end_of_an_upgraded_row(path: Path) -> None:
    old = OldTables(f"sqlite:///{path}")
    upgrade(old)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = [name for _, name, *_ in connection.execute("PRAGMA table_xinfo(kser_operation)")]
    assert names[-4:] == ["params", "metadata", "accumulated", "result"]


def test_upgrade_keeps_indexes_triggers_and_views_that_the_user_added_in_sqlite(path: Path) -> None:
    old = OldTables(f"sqlite:///{path}")
    old.add_root("new", -10)
    old.write()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE INDEX my_index ON kser_operation (topic)")
        connection.execute("CREATE TABLE my_log (uuid)")
        log = "INSERT INTO my_log VALUES (new.uuid)"
        connection.execute(f"CREATE TRIGGER my_trigger AFTER UPDATE ON kser_operation BEGIN {log}; END")
        connection.execute("CREATE VIEW my_view AS SELECT uuid FROM kser_operation")
        connection.commit()
    upgrade(old)
    with contextlib.closing(SQLStore(old.uri)) as store:
        (step,) = reserve(store)
        assert finish(store, step) == "SUCCESS"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT DISTINCT uuid FROM my_log").fetchall() == [("new",)]
        assert connection.execute("SELECT uuid FROM my_view").fetchall() == [("new",)]
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'my_index'").fetchall() == [(1,)]


@pytest.mark.postgresql
def test_upgrade_keeps_privileges_and_views_in_postgresql(postgresql: str) -> None:
    with new_postgresql(postgresql) as database:
        old = OldTables(database.uri)
        old.add_root("new", -10)
        old.write()
        role = f"kser_reader_{database.name[-12:]}"
        database.run(f"CREATE ROLE {role}")
        try:
            database.run(f"GRANT SELECT ON kser_operation TO {role}")
            database.run("CREATE VIEW my_view AS SELECT uuid FROM kser_operation")
            upgrade(old)
            query = f"SELECT has_table_privilege('{role}', 'kser_operation', 'SELECT'), uuid FROM my_view"
            assert database.run(query) == [(True, "new")]
        finally:
            database.run(f"DROP OWNED BY {role}")
            database.run(f"DROP ROLE {role}")
