"""Tests of the schema: creation, versions and migrations."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from kser.errors import SchemaMismatch
from kser.store.model import OperationQuery
from kser.store.sql import SQLStore, schema
from kser.store.sql.tables import metadata
from tests.postgres import Database
from tests.store.harness import new_operation, unique_name
from tests.store.sql.helpers import run_in_processes, set_schema_version


def test_sqlite_file_is_created_with_its_tables_on_first_use(path: Path) -> None:
    with contextlib.closing(SQLStore(f"sqlite:///{path}")) as store:
        assert not path.exists()
        assert store.get_operation(unique_name()) is None
        assert path.exists()
        store.check()


def test_concurrent_processes_create_one_sqlite_file(path: Path) -> None:
    assert run_in_processes(6, "save_and_run", f"sqlite:///{path}") == [1] * 6
    with contextlib.closing(SQLStore(f"sqlite:///{path}")) as store:
        assert len(store.find(OperationQuery(status=["SUCCESS"]), 10).rows) == 6


@pytest.mark.postgresql
def test_postgresql_tables_are_created_only_by_the_upgrade_command(database: Database) -> None:
    """durability rule 34: the error contains the command that creates them."""
    database.run("ALTER TABLE kser_schema RENAME TO gone")
    try:
        with contextlib.closing(SQLStore(database.uri)) as store:
            for call in (store.check, lambda: store.get_operation(unique_name()), lambda: store.save(new_operation(1))):
                with pytest.raises(SchemaMismatch, match=r"no tables of kser; run: python -m kser\.store upgrade"):
                    call()
    finally:
        database.run("ALTER TABLE gone RENAME TO kser_schema")


@pytest.mark.parametrize(
    ("version", "oldest", "problem"),
    [
        (2, 2, ""),
        (3, 2, ""),
        (3, 1, ""),
        (3, 3, "tables of version 3, which need a newer kser than this one, of version 2"),
        (1, 1, "tables of version 1, and this kser needs 2; run: python -m kser.store upgrade"),
        (0, 0, "tables of version 0, and this kser needs 2; run: python -m kser.store upgrade"),
    ],
)
def test_incompatible_schema_version_is_rejected_and_a_compatible_one_accepted(
    any_store: SQLStore, version: int, oldest: int, problem: str
) -> None:
    """durability rule 34: newer tables are accepted if they declare that this version may use them."""
    any_store.check()
    set_schema_version(any_store, version, oldest)
    try:
        if not problem:
            any_store.check()
            return
        with pytest.raises(SchemaMismatch, match=problem):
            any_store.check()
    finally:
        set_schema_version(any_store, schema.VERSION, schema.VERSION)


# Old versions of alembic do not compare computed columns of SQLite.
@pytest.mark.filterwarnings("ignore:Computed default on kser_operation.urgent:UserWarning")
def test_migrations_create_the_tables_that_the_code_declares(any_store: SQLStore) -> None:
    any_store.check()
    with any_store._database.inspect_connection() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "kser_migration", "compare_type": True, "include_object": _is_ours}
        )
        assert compare_metadata(context, metadata) == []


def _is_ours(_object: Any, name: str | None, *_: Any) -> bool:
    # Alembic and SQLite have tables of their own, which the metadata does not declare.
    return not (name or "").startswith(("kser_migration", "sqlite_"))
