"""Tests of ``python -m kser.store``."""

from __future__ import annotations

from pathlib import Path

import pytest

from kser.store.__main__ import main
from kser.store.sql import SQLStore
from tests.postgres import Database
from tests.store.sql.helpers import set_schema_version
from tests.support import run_concurrently


def test_upgrade_command_creates_tables_and_reports_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{path}"
    assert main(["status", "--uri", uri]) == 1
    assert capsys.readouterr() == (f"{uri} has no tables of kser; run: python -m kser.store upgrade\n", "")
    assert not path.exists()
    assert main(["upgrade", "--uri", uri]) == 0
    assert capsys.readouterr() == (f"{uri} has tables of version 2 now; there were none before\n", "")
    assert main(["upgrade", "--uri", uri]) == 0
    assert capsys.readouterr() == (f"{uri} has tables of version 2 already: nothing to do\n", "")
    assert main(["status", "--uri", uri]) == 0
    assert capsys.readouterr() == (f"{uri} has tables of version 2; this kser needs 2\n", "")


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
    set_schema_version(store, 7, 7)
    assert main(["upgrade", "--uri", f"sqlite:///{path}"]) == 1
    assert "need a newer kser" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["sqlite:////no/such/folder/kser.db", "hello", "mysql://user@host/database"])
def test_command_errors_are_printed_in_one_line(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upgrade", "--uri", uri]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("kser: ")


@pytest.mark.postgresql
def test_concurrent_upgrade_commands_create_postgresql_tables_once(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    database.run("DROP SCHEMA public CASCADE")
    database.run("CREATE SCHEMA public")
    assert run_concurrently(*[lambda: main(["upgrade", "--uri", database.uri])] * 3) == [0, 0, 0]
    out = capsys.readouterr().out
    assert (out.count("there were none before"), out.count("nothing to do")) == (1, 2)
    options = dict(database.run("SELECT relname, reloptions FROM pg_class WHERE relname IN ('kser_operation')"))
    assert options == {"kser_operation": ["fillfactor=60"]}
