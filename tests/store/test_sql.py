"""Tests of the SQL store: schemas, other processes, group commit, query plans, and database errors."""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from kser import status as states
from kser.errors import (
    FencedError,
    KserError,
    MissingDependency,
    SchemaMismatch,
    SettingError,
    StoreError,
    StoreUnavailable,
)
from kser.store import open_store
from kser.store.__main__ import main
from kser.store.memory import MemoryStore
from kser.store.model import Claim, ClaimRefused, OperationQuery
from kser.store.sql import SQLStore, schema
from kser.store.sql.database import SerializationConflict, Transaction
from kser.store.sql.group_commit import GroupCommit, PendingWrite
from kser.store.sql.ids import ID_EPOCH, IdGenerator, id_at, time_of
from kser.store.sql.store import database_at
from kser.store.sql.tables import metadata, operation
from tests.conftest import own_postgresql
from tests.postgres import Database
from tests.store.contract import at_once, due
from tests.store.harness import (
    claimed,
    last_step,
    me,
    name,
    new,
    new_task,
    outcome_of,
    resumed,
    row_of,
    saved,
    step_on,
    update_of,
)
from tests.support import ROOT

SECRET = "not-to-be-said"


@pytest.fixture(scope="module", autouse=True)
def server_first(request: pytest.FixtureRequest) -> None:
    """Start PostgreSQL, if a test wants it, before anything looks at which processes a test leaves behind."""
    if any(item.get_closest_marker("postgresql") for item in request.session.items):
        # The tests that want it say so themselves.
        with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):
            request.getfixturevalue("database")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kser.db"


class ClockOffset:
    """Seconds that a test adds to the clock of its store."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock_offset() -> ClockOffset:
    return ClockOffset()


@pytest.fixture
def store(path: Path, clock_offset: ClockOffset) -> Iterator[SQLStore]:
    with contextlib.closing(SQLStore(f"sqlite:///{path}", clock_offset=clock_offset)) as store:
        yield store


@pytest.fixture
def in_postgresql(database: Database, clock_offset: ClockOffset) -> Iterator[SQLStore]:
    database.empty()
    with contextlib.closing(SQLStore(database.uri, clock_offset=clock_offset)) as store:
        yield store


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def any_store(request: pytest.FixtureRequest) -> Any:
    """A store in each of the two."""
    return request.getfixturevalue("store" if request.param == "sqlite" else "in_postgresql")


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        f"mysql://user:{SECRET}@host/database",
        f"postgresql+psycopg2://user:{SECRET}@host/database",
        "sqlite+aiosqlite:///file.db",
        "sqlite://",
        "sqlite:///:memory:",
        f"postgresql://user:{SECRET}@host:port/database",
        f"user:{SECRET}@host",
    ],
)
def test_unsupported_database_uri_is_rejected(uri: str) -> None:
    with pytest.raises(SettingError) as caught:
        open_store(uri)
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}" or "://" not in uri


def test_database_uri_selects_its_store(path: Path) -> None:
    assert isinstance(open_store("memory://"), MemoryStore)
    for prefix in ("sqlite", "sqlite+pysqlite"):
        with contextlib.closing(open_store(f"{prefix}:///{path}", synchronous="NORMAL")) as store:
            assert isinstance(store, SQLStore)
            assert store.name == f"sqlite:///{path}"


@pytest.mark.parametrize("prefix", ["postgresql", "postgresql+psycopg", "postgres"])
def test_store_name_hides_the_password(prefix: str) -> None:
    store = SQLStore(f"{prefix}://user:{SECRET}@127.0.0.1:1/database?password={SECRET}&connect_timeout=1")
    assert store.name == "postgresql+psycopg://user:***@127.0.0.1:1/database"
    store.close()


def test_database_errors_name_the_address_and_hide_the_password() -> None:
    with contextlib.closing(SQLStore(f"postgresql://user:{SECRET}@127.0.0.1:1/database?connect_timeout=1")) as store:
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1/database.*check that the server is") as caught:
            store.check()
        error: BaseException | None = caught.value
        while error is not None:
            assert SECRET not in f"{error!r} {error}"
            error = error.__cause__ or error.__context__


def test_unsupported_synchronous_value_is_rejected(path: Path) -> None:
    with pytest.raises(SettingError, match="FULL"):
        SQLStore(f"sqlite:///{path}", synchronous="OFF")


@pytest.mark.parametrize(("synchronous", "number"), [("FULL", 2), ("NORMAL", 1)])
def test_commits_are_synchronous_by_default(path: Path, synchronous: str, number: int) -> None:
    with contextlib.closing(SQLStore(f"sqlite:///{path}", synchronous=synchronous)) as store:
        store.save(new(1))
        with store._database.write() as transaction:
            cursor = transaction._cursor
            assert cursor.execute("PRAGMA synchronous").fetchone() == (number,)
            assert cursor.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_missing_driver_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingDependency, match=r"kser\[postgresql\]"):
        SQLStore("postgresql://user@host/database")


def test_import_without_a_database_loads_no_sqlalchemy() -> None:
    code = "import sys, kser, kser.store; print(sorted({'sqlalchemy', 'alembic', 'psycopg'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


# -- schema ------------------------------------------------------------------------------------------------------------


def test_sqlite_file_is_created_with_its_tables_on_first_use(path: Path) -> None:
    with contextlib.closing(SQLStore(f"sqlite:///{path}")) as store:
        assert not path.exists()
        assert store.get_operation(name()) is None
        assert path.exists()
        store.check()


def test_concurrent_processes_create_one_sqlite_file(path: Path) -> None:
    assert _in_processes(6, "make", f"sqlite:///{path}") == [1] * 6
    with contextlib.closing(SQLStore(f"sqlite:///{path}")) as store:
        assert len(store.find(OperationQuery(status=["SUCCESS"]), 10).rows) == 6


def _in_processes(count: int, work: str, uri: str) -> list[int]:
    """Run a command of ``tests.store.worker_process`` in several processes at the same time; return their numbers."""
    command = [sys.executable, "-m", "tests.store.worker_process", work, uri]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            )
            for _ in range(count)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        return [int(process.communicate("go\n", timeout=60)[0]) for process in _begun(processes)]


def _begun(processes: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


@pytest.mark.postgresql
def test_postgresql_tables_are_created_only_by_the_upgrade_command(database: Database) -> None:
    """Rule 34: the error says what to run."""
    database.run("ALTER TABLE kser_schema RENAME TO gone")
    try:
        with contextlib.closing(SQLStore(database.uri)) as store:
            for call in (store.check, lambda: store.get_operation(name()), lambda: store.save(new(1))):
                with pytest.raises(SchemaMismatch, match=r"no tables of kser; run: python -m kser\.store upgrade"):
                    call()
    finally:
        database.run("ALTER TABLE gone RENAME TO kser_schema")


def _set_version(store: SQLStore, version: int, oldest: int) -> None:
    with store._database.write() as transaction:
        transaction._cursor.execute(f"UPDATE kser_schema SET version = {version}, oldest = {oldest}")


@pytest.mark.parametrize(
    ("version", "oldest", "problem"),
    [
        (1, 1, ""),
        (2, 1, ""),
        (2, 2, "tables of version 2, which need a newer kser than this one, of version 1"),
        (0, 0, "tables of version 0, and this kser needs 1; run: python -m kser.store upgrade"),
    ],
)
def test_incompatible_schema_version_is_rejected_and_a_compatible_one_accepted(
    any_store: SQLStore, version: int, oldest: int, problem: str
) -> None:
    """Rule 34: incompatible ones are refused with the command to run; newer compatible ones are accepted."""
    any_store.check()
    _set_version(any_store, version, oldest)
    try:
        if not problem:
            any_store.check()
            return
        with pytest.raises(SchemaMismatch, match=problem):
            any_store.check()
    finally:
        _set_version(any_store, 1, 1)


def test_migrations_create_the_tables_that_the_code_declares(any_store: SQLStore) -> None:
    any_store.check()
    with any_store._database.inspect_connection() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "kser_migration", "compare_type": True, "include_object": _is_ours}
        )
        assert compare_metadata(context, metadata) == []


def _is_ours(_object: Any, name: str | None, *_: Any) -> bool:
    # What alembic and SQLite have for themselves.
    return not (name or "").startswith(("kser_migration", "sqlite_"))


# -- command -----------------------------------------------------------------------------------------------------------


def test_upgrade_command_creates_tables_and_reports_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{path}"
    steps = [
        ("status", 1, f"{uri} has no tables of kser; run: python -m kser.store upgrade\n"),
        ("upgrade", 0, f"{uri} has tables of version 1 now; there were none before\n"),
        ("upgrade", 0, f"{uri} has tables of version 1 already: nothing to do\n"),
        ("status", 0, f"{uri} has tables of version 1; this kser needs 1\n"),
    ]
    for command, status, output in steps:
        assert main([command, "--uri", uri]) == status
        assert capsys.readouterr() == (output, "")
        assert command == "upgrade" or status == 0 or not path.exists()


def test_command_reads_the_database_uri_from_the_environment(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "kser: no database is configured; pass --uri, or set KSER_DATABASE_URI\n"
    monkeypatch.setenv("KSER_DATABASE_URI", f"sqlite:///{path}")
    assert main(["upgrade"]) == 0


def test_upgrade_command_does_not_change_newer_tables(
    store: SQLStore, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.check()
    _set_version(store, 7, 7)
    assert main(["upgrade", "--uri", f"sqlite:///{path}"]) == 1
    assert "need a newer kser" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["sqlite:////nowhere/at/all/kser.db", "hello", "mysql://x@y/z"])
def test_command_errors_are_printed_in_one_line(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upgrade", "--uri", uri]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("kser: ")


@pytest.mark.postgresql
def test_concurrent_upgrade_commands_create_postgresql_tables_once(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at the same time do it once."""
    database.run("DROP SCHEMA public CASCADE")
    database.run("CREATE SCHEMA public")
    assert at_once(*[lambda: main(["upgrade", "--uri", database.uri])] * 3) == [0, 0, 0]
    out = capsys.readouterr().out
    assert (out.count("there were none before"), out.count("nothing to do")) == (1, 2)
    options = dict(database.run("SELECT relname, reloptions FROM pg_class WHERE relname IN ('kser_operation')"))
    assert options == {"kser_operation": ["fillfactor=60"]}


# -- other processes ---------------------------------------------------------------------------------------------------


def test_concurrent_processes_claim_each_operation_once(any_store: SQLStore) -> None:
    """Rule 7: each operation is for one of them."""
    for _ in range(40):
        any_store.save(new(2))
    # With the password, if there is one.
    uri = any_store._database.url.render_as_string(hide_password=False)
    assert sum(_in_processes(4, "work", uri)) == 40
    rows = any_store.find(OperationQuery(), 100).rows
    assert {(row.status, row.epoch) for row in rows} == {(states.SUCCESS, 2)}


def test_sqlite_readers_do_not_wait_for_a_writer(store: SQLStore, path: Path) -> None:
    claim = saved(store, new(1))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        foreign.execute("UPDATE kser_operation SET step = 5")
        begun = time.monotonic()
        assert row_of(store, claim.root.uuid).step == 0
        assert len(store.find(OperationQuery(), 5).rows) == 1
        assert time.monotonic() - begun < 5
        foreign.execute("ROLLBACK")


def test_epoch_changed_by_another_process_fences_the_checkpoint(store: SQLStore, path: Path) -> None:
    claim = saved(store, new(2))
    assert row_of(store, claim.root.uuid).epoch == 1
    with contextlib.closing(sqlite3.connect(path)) as foreign, foreign:
        foreign.execute("UPDATE kser_operation SET epoch = 9")
    assert row_of(store, claim.root.uuid).epoch == 9
    with pytest.raises(FencedError):
        store.checkpoint(step_on(claim, 0))


@pytest.mark.postgresql
def test_take_due_skips_rows_locked_by_another_transaction(
    in_postgresql: SQLStore, database: Database, clock_offset: ClockOffset
) -> None:
    """Rule 20: the reaper does not wait for a locked row."""
    operations = [new(1), new(1)]
    for new_operation in operations:
        in_postgresql.save(new_operation)
    clock_offset.seconds = 10
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute("SELECT 1 FROM kser_operation WHERE uuid = %s FOR UPDATE", [operations[0].uuid])
        assert due(in_postgresql) == [(operations[1].uuid, "unsent")]
    assert due(in_postgresql) == [(operations[0].uuid, "unsent")]


@pytest.mark.postgresql
def test_heartbeat_renews_locked_claims_after_the_other_ones(in_postgresql: SQLStore, database: Database) -> None:
    """Rule 9: and those that are not are not waited with."""
    claims = [saved(in_postgresql, new(1)) for _ in range(3)]
    results: list[Any] = []
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute("SELECT 1 FROM kser_operation WHERE id = %s FOR UPDATE", [claims[1].id])
        pairs = [(claim.id, 1) for claim in claims]
        thread = threading.Thread(target=lambda: results.append(in_postgresql.renew(pairs, "consumer-b", 300)))
        thread.start()
        wait_until(lambda: row_of(in_postgresql, claims[2].root.uuid).owner == "consumer-b")
        assert results == []
    thread.join()
    assert results == [{claim.id for claim in claims}]
    assert {row.owner for row in in_postgresql.find(OperationQuery(), 5).rows} == {"consumer-b"}


@pytest.mark.postgresql
def test_claim_that_waited_for_another_claim_is_refused(in_postgresql: SQLStore, database: Database) -> None:
    """Rule 7: a compare-and-set, also where a statement sees rows as they were when it began."""
    root = new(1)
    in_postgresql.save(root)
    results: list[Any] = []
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute(
            "UPDATE kser_operation SET status = 'RUNNING', owner = 'other', token = 'other', epoch = 1,"
            " next_check_at = next_check_at + 100 WHERE uuid = %s",
            [root.uuid],
        )
        thread = threading.Thread(target=lambda: results.append(in_postgresql.claim(root.uuid, root.uuid, me())))
        thread.start()
        time.sleep(0.3)
    thread.join()
    assert results[0].reason == "held"


@pytest.mark.postgresql
def test_claim_that_waited_for_a_checkpoint_sees_its_changes(in_postgresql: SQLStore, database: Database) -> None:
    """Rule 7: only what a statement changes is looked at again after it waited; the rest is as it was when it began."""
    root = new(1)
    in_postgresql.save(root)
    results: list[Any] = []
    with psycopg.connect(database.uri.replace("+psycopg", "")) as foreign:
        foreign.execute("UPDATE kser_operation SET epoch = epoch + 2 WHERE uuid = %s", [root.uuid])
        foreign.execute("UPDATE kser_task SET attempts = 1")
        thread = threading.Thread(target=lambda: results.append(in_postgresql.claim(root.uuid, root.uuid, me())))
        thread.start()
        time.sleep(0.3)
    thread.join()
    assert (results[0].epoch, results[0].task.attempts) == (3, 1)


# -- groups ------------------------------------------------------------------------------------------------------------


class Held:
    """Holds up the group commit of a store until all calls of a test are queued."""

    def __init__(self, store: SQLStore) -> None:
        self._groups: set[GroupCommit[Any]] = set(store._writer._groups.values())
        self.sizes: list[int] = []
        for group in self._groups:
            group._run = self._counted(group._run)

    def _counted(self, run: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(entries: Any) -> None:
            self.sizes.append(len(entries))
            run(entries)

        return counted

    def together(self, *calls: Callable[[], Any]) -> list[Any]:
        """Return the results or errors of calls that are written as one group, or as one group of each kind."""
        leaders = {group: group._leaders for group in self._groups}
        for group in self._groups:
            group._leaders = 0
        results: list[Any] = [None] * len(calls)

        def run(index: int) -> None:
            try:
                results[index] = calls[index]()
            except KserError as error:
                results[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(len(group._waiting) for group in self._groups) == len(calls))
        for group in self._groups:
            group._leaders, group._leading = leaders[group], 1
            group._hand_over()
        for thread in threads:
            thread.join()
        return results


def test_group_commit_writes_concurrent_calls_in_one_transaction(any_store: SQLStore) -> None:
    """Rule 14: saving, claiming and checkpoints, all in one; or each in one where one statement is a transaction."""
    claims = [saved(any_store, new(2)) for _ in range(5)]
    free = [new(1) for _ in range(3)]
    for new_operation in free:
        any_store.save(new_operation)
    held = Held(any_store)
    commits = _count_commits(any_store)
    results = held.together(
        *(lambda claim=claim: any_store.checkpoint(step_on(claim, 0)) for claim in claims),
        *(lambda uuid=root.uuid: any_store.claim(uuid, uuid, me()).epoch for root in free),
        *[lambda: any_store.save(new(2))] * 2,
    )
    assert results[:8] == [states.RUNNING] * 5 + [1] * 3
    assert [type(result) for result in results[8:]] == [int, int]
    sizes = [2, 3, 5] if any_store._database.json_batches else [10]
    assert (sorted(held.sizes), len(commits)) == (sizes, len(sizes))


def test_group_commit_includes_refused_claims(any_store: SQLStore) -> None:
    """Typical after a crash: the reaper has sent steps that other consumers have claimed."""
    operations = [new(1) for _ in range(5)]
    for new_operation in operations:
        any_store.save(new_operation)
    for new_operation in operations[2:]:
        any_store.claim(new_operation.uuid, new_operation.uuid, me("another"))
    commits = _count_commits(any_store)
    results = Held(any_store).together(
        *(lambda uuid=root.uuid: any_store.claim(uuid, uuid, me()) for root in operations)
    )
    assert [type(result) for result in results] == [Claim, Claim, ClaimRefused, ClaimRefused, ClaimRefused]
    assert len(commits) == (2 if any_store._database.json_batches else 1)


def _count_commits(store: SQLStore) -> list[None]:
    """Return a list that gets an element for each transaction that the store commits."""
    commits: list[None] = []
    database = store._database
    writing = database._writing

    @contextlib.contextmanager
    def counted(*arguments: Any) -> Iterator[Transaction]:
        with writing(*arguments) as transaction:
            yield transaction
        commits.append(None)

    database._writing = counted  # type: ignore[method-assign]
    return commits


def test_group_commit_rejects_an_invalid_value_alone(any_store: SQLStore) -> None:
    """Rule 14: the group is split."""
    claims = [saved(any_store, new(3)) for _ in range(6)]
    offender = claims[2]
    bad = step_on(offender, 0, outcomes=[outcome_of(offender.root, 0, status=None)])
    results = Held(any_store).together(
        *(
            lambda claim=claim: any_store.checkpoint(bad if claim is offender else step_on(claim, 0))
            for claim in claims
        ),
        lambda: any_store.save(new(1, params=None)),
        lambda: any_store.save(new(1)),
    )
    assert [type(result) for result in results] == [str, str, StoreError, str, str, str, StoreError, int]
    assert "rejects the statement" in str(results[2])
    for claim in claims:
        assert row_of(any_store, claim.root.uuid).step == (0 if claim is offender else 1)
    assert any_store.checkpoint(step_on(offender, 0)) == states.RUNNING


def test_group_commit_fences_each_checkpoint_alone(any_store: SQLStore) -> None:
    """Rules 8, 14 and 24."""
    good, stale, cancelled, again = (saved(any_store, new(3)) for _ in range(4))
    any_store.checkpoint(step_on(stale, 0, keep=False))
    any_store.cancel(cancelled.root.uuid, None)
    any_store.checkpoint(step_on(again, 0))
    results = Held(any_store).together(
        lambda: any_store.checkpoint(step_on(good, 0)),
        lambda: any_store.checkpoint(step_on(stale, 0, token="another")),
        lambda: any_store.checkpoint(step_on(cancelled, 0)),
        lambda: any_store.checkpoint(step_on(again, 0)),
    )
    assert isinstance(results.pop(1), FencedError)
    assert results == [states.RUNNING, states.CANCELLED, states.RUNNING]


def test_group_commit_records_one_of_two_checkpoints_of_a_root(any_store: SQLStore) -> None:
    """Rule 8: as when an attempt that was given up comes back."""
    claim = saved(any_store, new(3))
    other = step_on(
        claim, 0, updates=[update_of(claim.root, 2)], outcomes=[outcome_of(claim.root, 0, result='{"other": 1}')]
    )
    results = Held(any_store).together(
        lambda: any_store.checkpoint(step_on(claim, 0)), lambda: any_store.checkpoint(other)
    )
    assert sorted(type(result).__name__ for result in results) == ["FencedError", "str"]
    stored = any_store.snapshot(claim.root.uuid)
    assert stored is not None
    assert len(stored.attempts) == 1


def test_group_commit_stores_a_duplicate_operation_once(any_store: SQLStore) -> None:
    """Rule 3."""
    root = new(2)
    results = Held(any_store).together(*[lambda: any_store.save(root, me())] * 2, lambda: any_store.save(new(1), me()))
    assert sorted(type(result).__name__ for result in results) == ["Claim", "Claim", "ClaimRefused"]


def test_group_commit_reports_a_database_error_to_every_caller(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = [saved(store, new(2)) for _ in range(3)]
    monkeypatch.setattr(store._database, "_writing", _unavailable)
    calls = [lambda claim=claim: store.checkpoint(step_on(claim, 0)) for claim in claims]
    results = Held(store).together(*calls)
    assert [type(result) for result in results] == [StoreUnavailable] * 3
    assert len({id(result) for result in results}) == 3
    monkeypatch.undo()
    assert Held(store).together(*calls) == [states.RUNNING] * 3


@contextlib.contextmanager
def _unavailable(*_: Any) -> Iterator[Any]:
    raise StoreUnavailable("gone")
    yield


def test_serialization_conflict_is_retried(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, failures = store._database._writing, iter([SerializationConflict("deadlock")] * 4)
    claim = saved(store, new(3))

    @contextlib.contextmanager
    def sometimes(*arguments: Any) -> Iterator[Any]:
        for error in failures:
            raise error
        with writing(*arguments) as transaction:
            yield transaction

    monkeypatch.setattr(store._database, "_writing", sometimes)
    with pytest.raises(StoreUnavailable, match="deadlock"):
        store.checkpoint(step_on(claim, 0))
    assert store.checkpoint(step_on(claim, 0)) == states.RUNNING
    failures = iter([SerializationConflict("deadlock")])
    assert store.renew([(claim.id, 1)], "consumer-a", 30) == {claim.id}


def test_group_commit_continues_after_an_interrupted_leader() -> None:
    """The followers get an error, and another thread leads."""
    interrupted = threading.Event()

    def run(entries: Any) -> None:
        if not interrupted.is_set():
            interrupted.set()
            wait_until(lambda: len(group._waiting) == 3)
            raise KeyboardInterrupt
        for entry in entries:
            entry.result = entry.item

    group: GroupCommit[int] = GroupCommit(run, 1)
    others: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: others.append(group.write(n))) for n in range(3)]

    def start() -> None:
        interrupted.wait(10)
        for thread in threads:
            thread.start()

    starter = threading.Thread(target=start)
    starter.start()
    with pytest.raises(KeyboardInterrupt):
        group.write(99)
    for thread in (starter, *threads):
        thread.join(10)
    assert sorted(others) == [0, 1, 2]
    assert group.write(7) == 7


def test_group_commit_reports_an_interrupted_leader_to_its_followers() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def run(entries: list[PendingWrite[int]]) -> None:
        begun.set()
        go_on.wait(10)
        if len(entries) > 1:
            raise KeyboardInterrupt
        entries[0].result = entries[0].item

    group: GroupCommit[int] = GroupCommit(run, 1)
    results: list[str] = []

    def write(number: int) -> None:
        try:
            results.append(str(group.write(number)))
        except (KeyboardInterrupt, StoreUnavailable) as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    threads[0].start()
    begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: len(group._waiting) == 3)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == ["0", "KeyboardInterrupt", "StoreUnavailable", "StoreUnavailable"]


def wait_until(done: Callable[[], object]) -> None:
    """Wait until ``done`` returns something true."""
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline, "the condition is not met within 30 s"
        time.sleep(0.001)


# -- identifiers -------------------------------------------------------------------------------------------------------


def test_ids_contain_their_time_and_fit_until_2091() -> None:
    now = time.time()
    ids = IdGenerator()
    first_ids = [ids.next_ids(now, 3) for _ in range(5)]
    assert first_ids == sorted(set(first_ids))
    assert all(time_of(first) == pytest.approx(now, abs=1e-3) for first in first_ids)
    assert first_ids[1] >= first_ids[0] + 3
    assert id_at(ID_EPOCH + 71 * 365 * 86400).bit_length() <= 63


def test_ids_increase_even_when_the_clock_steps_back() -> None:
    ids = IdGenerator()
    assert ids.next_ids(ID_EPOCH + 1000, 1) < ids.next_ids(ID_EPOCH + 10, 1) < ids.next_ids(0, 1)


def test_id_that_is_taken_is_replaced(any_store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes may come upon the same one."""
    taken = saved(any_store, new(1)).id
    ids = any_store._writer.saves._ids
    take, first = ids.next_ids, iter([taken])
    monkeypatch.setattr(ids, "next_ids", lambda now, count: next(first, None) or take(now, count))
    root = new(1)
    claim = saved(any_store, root)
    assert (claim.root.uuid, claim.epoch) == (root.uuid, 1)
    assert claim.id != taken


# -- plans -------------------------------------------------------------------------------------------------------------

FILTERS = [
    OperationQuery(),
    OperationQuery(status=["FAILED"]),
    OperationQuery(status=["FAILED", "RUNNING"]),
    OperationQuery(entrypoint="shop.PlaceOrder"),
    OperationQuery(entrypoint="shop.PlaceOrder", status=["FAILED"]),
    OperationQuery(since=1.7e9),
    OperationQuery(since=1.7e9, until=1.9e9, status=["SUCCESS"]),
    OperationQuery(labels=[("customer", "7")]),
    OperationQuery(labels=[("customer", "7"), ("shop", "1")], status=["FAILED"]),
    OperationQuery(parent="somebody"),
    OperationQuery(parent="somebody", status=["FAILED"], entrypoint="x"),
]


def _plans(store: SQLStore, call: Callable[[], Any]) -> list[str]:
    """Return the query plans of the statements that ``call`` executes."""
    explained: list[str] = []
    database = store._database
    word = "EXPLAIN" if database.json_batches else "EXPLAIN QUERY PLAN"
    original = Transaction.execute, Transaction.fetch, Transaction.execute_many

    def explain(transaction: Transaction, statement: Any, values: Any) -> None:
        cursor = transaction._cursor
        cursor.execute(f"{word} {statement.sql}", {**statement.constants, "clock": transaction._clock, **values})
        explained.append("\n".join(str(row[-1]) for row in cursor.fetchall()))

    def run(self: Transaction, statement: Any, values: Any = None, **options: Any) -> Any:
        explain(self, statement, values or {})
        return original[0](self, statement, values, **options)

    def many(which: int) -> Any:
        def explained_first(self: Transaction, statement: Any, rows: Any, **values: Any) -> Any:
            if rows:
                explain(self, statement, {**values, **({"rows": "[]"} if database.json_batches else rows[0])})
            return original[which](self, statement, rows, **values)

        return explained_first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "execute", run)
        patch.setattr(Transaction, "fetch", many(1))
        patch.setattr(Transaction, "execute_many", many(2))
        call()
    assert explained
    return explained


#: A scan of a whole table, in a plan of SQLite or PostgreSQL.
WHOLE = re.compile(r"SCAN (kser_|label_)|Seq Scan on kser_")


def _no_whole_table(plans: list[str]) -> None:
    for plan in plans:
        assert not WHOLE.search(plan), plan


@pytest.mark.parametrize("query", FILTERS, ids=str)
def test_find_uses_an_index_in_page_order(any_store: SQLStore, query: OperationQuery) -> None:
    """No whole table is read, and nothing but a few identifiers is sorted."""
    any_store.save(new(1))
    plans = _plans(any_store, lambda: any_store.find(query, 50))
    _no_whole_table(plans)
    for plan in plans:
        # SQLite sorts what is below in the tree, or was said right before.
        assert not re.search(r"SEARCH .*\n *USE TEMP B-TREE|\bSort  \(", plan), plan


@pytest.mark.parametrize("query", FILTERS, ids=str)
def test_large_columns_are_read_only_for_returned_rows(
    store: SQLStore, query: OperationQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statements that look for rows name no text, and no index holds one."""
    large = {"params", "metadata", "accumulated", "result"}
    statements: list[str] = []
    run = Transaction.execute
    monkeypatch.setattr(
        Transaction,
        "execute",
        lambda self, statement, *values, **options: (
            statements.append(statement.sql) or run(self, statement, *values, **options)
        ),
    )
    store.find(query, 50)
    assert statements
    assert not large & set(re.findall(r"\w+", " ".join(statements)))
    assert not large & {column.name for index in operation.indexes for column in index.columns}


def test_take_due_uses_an_index_range(any_store: SQLStore, clock_offset: ClockOffset) -> None:
    any_store.save(new(1))
    clock_offset.seconds = 10
    plans = _plans(any_store, lambda: any_store.take_due_steps(10, "reaper", expired=True))
    _no_whole_table(plans)
    assert "kser_operation_next_check" in plans[0]
    assert "TEMP B-TREE" not in plans[0]
    assert "Sort" not in plans[0]


def test_worker_and_user_queries_never_scan_a_whole_table(any_store: SQLStore, clock_offset: ClockOffset) -> None:
    inner = new(1)

    def everything() -> None:
        claim = saved(any_store, new([new_task(), new_task(inner)], labels=[("a", "1")]))
        any_store.save(new(1, uuid=claim.root.uuid))
        any_store.renew([(claim.id, 1)], "consumer-a", 30)
        any_store.checkpoint(step_on(claim, 0))
        any_store.checkpoint(step_on(claim, 0))
        any_store.cancel(claim.root.uuid, None)
        any_store.checkpoint(step_on(claim, 1, updates=[update_of(claim.root._replace(step=1), 1)], outcomes=()))
        row = resumed(any_store, claim.root.uuid)
        assert row is not None
        any_store.mark_sent([(row.id, row.epoch)], 60)
        any_store.postpone_send([(row.id, row.epoch)], 60)
        claim = claimed(any_store, row)
        any_store.snapshot(inner.uuid)
        any_store.get_task(claim.id, 0)
        any_store.get_children(claim.id)
        any_store.checkpoint(last_step(claim, 1, outcomes=()))
        clock_offset.seconds = 100
        assert any_store.purge(10, [states.SUCCESS], 10) == 1

    _no_whole_table(_plans(any_store, everything))


@pytest.mark.postgresql
def test_checkpoint_of_a_step_is_a_heap_only_update_in_postgresql(in_postgresql: SQLStore, database: Database) -> None:
    """PostgreSQL calls it a heap-only tuple."""
    database.run("SELECT pg_stat_reset()")
    claim = saved(in_postgresql, new(12))
    for step in range(10):
        in_postgresql.checkpoint(step_on(claim, step))
    in_postgresql.close()
    sql = "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'kser_operation'"
    # The server counts now and then.
    wait_until(lambda: database.run(sql)[0][0] >= 10)


def test_checkpoint_of_a_step_changes_no_indexed_column(store: SQLStore) -> None:
    """SQLite writes the entries of every index with a column that a statement names."""
    changed = re.search(r"SET (.*) WHERE", store._writer.checkpoints._keep_claim.sql)
    assert changed
    indexed = {column.name for index in operation.indexes for column in index.columns}
    assert not indexed & set(re.findall(r"(\w+)=", changed[1]))


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_locked_sqlite_file_raises_store_unavailable_and_recovers(path: Path) -> None:
    """Rule 33: nothing is recorded during the lock, and the same checkpoint succeeds afterwards."""
    with contextlib.closing(SQLStore(f"sqlite:///{path}?timeout=0.2")) as store:
        claim = saved(store, new(3))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
            foreign.execute("BEGIN IMMEDIATE")
            for call in (lambda: store.checkpoint(step_on(claim, 0)), lambda: store.renew([(claim.id, 1)], "a", 30)):
                with pytest.raises(StoreUnavailable, match="another process has held the write lock"):
                    call()
            foreign.execute("ROLLBACK")
        assert store.checkpoint(step_on(claim, 0)) == states.RUNNING


def test_read_only_sqlite_file_raises_store_unavailable(store: SQLStore) -> None:
    claim = saved(store, new(3))
    with store._database.write() as transaction:
        transaction._cursor.execute("SELECT 1")
    store._database._writer.execute("PRAGMA query_only = 1")  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable, match="not allowed to write"):
        store.checkpoint(step_on(claim, 0))
    store._database._writer.execute("PRAGMA query_only = 0")  # type: ignore[attr-defined]
    assert store.checkpoint(step_on(claim, 0)) == states.RUNNING


def test_full_disk_raises_store_unavailable(store: SQLStore) -> None:
    claim = saved(store, new(3))
    writer = store._database._writer  # type: ignore[attr-defined]
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    large = step_on(claim, 0, outcomes=[outcome_of(claim.root, 0, result="x" * 1_000_000)])
    with pytest.raises(StoreUnavailable, match="disk is full: make room"):
        store.checkpoint(large)
    assert row_of(store, claim.root.uuid).step == 0
    writer.execute("PRAGMA max_page_count = 1000000")
    assert store.checkpoint(large) == states.RUNNING


def test_file_that_is_no_database_raises_store_unavailable(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)
    with (
        contextlib.closing(SQLStore(f"sqlite:///{path}")) as store,
        pytest.raises(StoreUnavailable, match="not a SQLite database"),
    ):
        store.check()


def test_missing_folder_of_a_sqlite_file_is_named(tmp_path: Path) -> None:
    with (
        contextlib.closing(SQLStore(f"sqlite:///{tmp_path}/no/kser.db")) as store,
        pytest.raises(StoreUnavailable, match="the folder of the file must exist"),
    ):
        store.save(new(1))


def test_missing_table_raises_store_unavailable(any_store: SQLStore) -> None:
    any_store.save(new(1))
    with any_store._database.write() as transaction:
        transaction._cursor.execute("ALTER TABLE kser_event RENAME TO gone")
    try:
        with pytest.raises(StoreUnavailable, match=r"python -m kser\.store"):
            any_store.save(new(1))
    finally:
        with any_store._database.write() as transaction:
            transaction._cursor.execute("ALTER TABLE gone RENAME TO kser_event")


@pytest.mark.parametrize("bad", ["nul \0", "lone \ud800"])
def test_text_that_no_column_accepts_is_rejected_alone(any_store: SQLStore, bad: str) -> None:
    """And what is asked for with it is not there."""
    any_store.save(new(1))
    if any_store._database.json_batches or bad != "nul \0":
        with pytest.raises(StoreError):
            any_store.save(new(1, entrypoint=bad))
    for call in (lambda: any_store.get_operation(bad), lambda: any_store.claim(bad, bad, me())):
        with contextlib.suppress(StoreError):
            assert call() is None
    assert isinstance(any_store.save(new(1)), int)


def test_close_releases_the_sqlite_file(store: SQLStore, path: Path) -> None:
    saved(store, new(1))
    store.close()
    assert not path.with_name("kser.db-wal").exists()
    # And it can be used again.
    assert len(store.find(OperationQuery(), 5).rows) == 1


@pytest.mark.postgresql
def test_killed_server_raises_store_unavailable_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """Rules 10 and 33: each call is repeated with the same arguments."""
    caplog.set_level(logging.WARNING)
    with own_postgresql() as server, contextlib.closing(database_at(server.uri)) as database:
        schema.upgrade(database)
        with contextlib.closing(SQLStore(server.uri)) as store:
            claims = [saved(store, new(3)) for _ in range(8)]
            checkpoints = [step_on(claim, 0) for claim in claims]
            at_once(*(lambda item=item: store.checkpoint(item) for item in checkpoints))
            server.stop("immediate")
            calls: list[Callable[[], Any]] = [lambda item=item: store.checkpoint(item) for item in checkpoints]
            calls += [
                lambda: store.get_operation("x"),
                lambda: store.renew([(1, 1)], "a", 30),
                lambda: store.save(new(1)),
            ]
            begun = time.monotonic()
            assert {type(result) for result in at_once(*calls)} == {StoreUnavailable}
            assert time.monotonic() - begun < 10
            server.start()
            # One pooled connection may still be broken.
            deadline = time.monotonic() + 10
            results = at_once(*calls)
            while {type(result) for result in results} & {StoreUnavailable} and time.monotonic() < deadline:
                results = at_once(*calls)
            assert results[:8] == [states.RUNNING] * 8
            for claim in claims:
                stored = store.snapshot(claim.root.uuid)
                assert stored is not None
                assert (stored.operation.step, len(stored.attempts)) == (1, 1)


@pytest.mark.postgresql
def test_postgresql_session_has_statement_lock_and_idle_timeouts(in_postgresql: SQLStore, database: Database) -> None:
    """Its locks are given up, as those of a process that was stopped must be."""
    with in_postgresql._database.write() as transaction:
        timeouts = {
            name: transaction._cursor.execute(f"SHOW {name}").fetchone()[0]
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        }
    assert timeouts == {
        "statement_timeout": "30s",
        "lock_timeout": "10s",
        "idle_in_transaction_session_timeout": "10s",
    }


@pytest.mark.postgresql
def test_terminated_connections_are_replaced(in_postgresql: SQLStore, database: Database) -> None:
    claim = saved(in_postgresql, new(5))
    for step in range(3):
        database.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kser'")
        with pytest.raises(StoreUnavailable):
            in_postgresql.checkpoint(step_on(claim, step))
        assert in_postgresql.checkpoint(step_on(claim, step)) == states.RUNNING


@pytest.mark.postgresql
def test_group_commit_returns_claims_granted_before_a_lost_connection(
    in_postgresql: SQLStore, database: Database
) -> None:
    """A second query reads the reasons of refused claims, and may find the connection lost."""
    operations = [new(1) for _ in range(3)]
    for new_operation in operations:
        in_postgresql.save(new_operation)
    in_postgresql.claim(operations[2].uuid, operations[2].uuid, me("another"))
    writer, in_one_statement = in_postgresql._writer, in_postgresql._writer._in_one_statement

    def lose_connection_afterwards(batch: Any) -> list[Any]:
        results = in_one_statement(batch)
        database.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kser'")
        return results

    writer._in_one_statement = lose_connection_afterwards  # type: ignore[method-assign]
    results = Held(in_postgresql).together(
        *(lambda uuid=root.uuid: in_postgresql.claim(uuid, uuid, me()) for root in operations)
    )
    assert [type(result) for result in results] == [Claim, Claim, StoreUnavailable]


@pytest.mark.postgresql
def test_read_only_postgresql_session_raises_store_unavailable(in_postgresql: SQLStore, database: Database) -> None:
    claim = saved(in_postgresql, new(3))
    separator = "&" if "?" in database.uri else "?"
    uri = f"{database.uri}{separator}options=-c%20default_transaction_read_only%3Don"
    with contextlib.closing(SQLStore(uri)) as store:
        with pytest.raises(StoreUnavailable, match="accepts no writes"):
            store.checkpoint(step_on(claim, 0))
        assert row_of(store, claim.root.uuid).step == 0


@pytest.mark.postgresql
def test_timestamps_come_from_the_postgresql_clock(in_postgresql: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 11: a host whose clock is wrong writes no wrong time, and its identifiers are in order."""
    right = saved(in_postgresql, new(1))
    really = time.time
    monkeypatch.setattr("kser.store.sql.postgresql.time.time", lambda: really() - 5000)
    skewed = saved(in_postgresql, new(1))
    assert skewed.id > right.id
    row = skewed.root
    assert row.started_at is not None
    assert row.created_at == pytest.approx(really(), abs=5)
    assert row.created_at <= row.started_at
    assert row.started_at == pytest.approx(really(), abs=5)


def test_sqlalchemy_errors_are_wrapped(any_store: SQLStore) -> None:
    any_store.check()
    with pytest.raises(StoreUnavailable), any_store._database.inspect_connection() as connection:
        connection.execute(text("SELECT no_such_column FROM kser_operation"))
