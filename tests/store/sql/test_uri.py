"""Tests of database URIs and of the driver that each one selects."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from kser.errors import MissingDependency, SettingError, StoreUnavailable
from kser.store import open_store
from kser.store.memory import MemoryStore
from kser.store.sql import SQLStore
from tests.store.harness import new_operation
from tests.support import run_python

PASSWORD = "never-in-an-error"


@pytest.mark.parametrize(
    "uri",
    [
        f"mysql://user:{PASSWORD}@host/database",
        f"postgresql+psycopg2://user:{PASSWORD}@host/database",
        "sqlite+aiosqlite:///file.db",
        "sqlite://",
        "sqlite:///:memory:",
        f"postgresql://user:{PASSWORD}@host:port/database",
    ],
)
def test_unsupported_database_uri_is_rejected_without_its_password(uri: str) -> None:
    with pytest.raises(SettingError) as caught:
        open_store(uri)
    assert PASSWORD not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"


@pytest.mark.parametrize("login", ["user", "user:secret", "secret"])
def test_text_without_a_scheme_is_rejected_and_quoted_without_its_login(login: str) -> None:
    with pytest.raises(SettingError, match=r"a database URI must look like .*; it is '\*\*\*@host'"):
        open_store(f"{login}@host")


def test_database_uri_selects_its_store(path: Path) -> None:
    assert isinstance(open_store("memory://"), MemoryStore)
    for prefix in ("sqlite", "sqlite+pysqlite"):
        with contextlib.closing(open_store(f"{prefix}:///{path}", synchronous="NORMAL")) as store:
            assert isinstance(store, SQLStore)
            assert store.name == f"sqlite:///{path}"


@pytest.mark.parametrize("prefix", ["postgresql", "postgresql+psycopg", "postgres"])
def test_store_name_hides_the_password(prefix: str) -> None:
    store = SQLStore(f"{prefix}://user:{PASSWORD}@127.0.0.1:1/database?password={PASSWORD}&connect_timeout=1")
    assert store.name == "postgresql+psycopg://user:***@127.0.0.1:1/database"
    store.close()


def test_database_errors_name_the_address_and_hide_the_password() -> None:
    with contextlib.closing(SQLStore(f"postgresql://user:{PASSWORD}@127.0.0.1:1/database?connect_timeout=1")) as store:
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1/database.*check that the server is") as caught:
            store.check()
        error: BaseException | None = caught.value
        while error is not None:
            assert PASSWORD not in f"{error!r} {error}"
            error = error.__cause__ or error.__context__


def test_unsupported_synchronous_value_is_rejected(path: Path) -> None:
    with pytest.raises(SettingError, match="FULL"):
        SQLStore(f"sqlite:///{path}", synchronous="OFF")


@pytest.mark.parametrize(("synchronous", "number"), [("FULL", 2), ("NORMAL", 1)])
def test_commits_are_synchronous_by_default(path: Path, synchronous: str, number: int) -> None:
    with contextlib.closing(SQLStore(f"sqlite:///{path}", synchronous=synchronous)) as store:
        store.save(new_operation(1))
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
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
