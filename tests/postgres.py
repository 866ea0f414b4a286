"""PostgreSQL for the tests: a server of our own on loopback in a temporary folder, or an existing one."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from sqlalchemy import make_url

from kser.store.sql import schema
from kser.store.sql.store import database_at
from kser.store.sql.tables import metadata
from tests.kafka.broker import free_ports

START_SECONDS = 60
STOP_SECONDS = 30

#: Where Debian keeps the binaries that are not on the PATH; the newest version is taken.
DEBIAN = Path("/usr/lib/postgresql")

#: How a server is told to stop: as a crash would, or in order, without waiting for its clients.
SIGNALS = {"immediate": signal.SIGQUIT, "fast": signal.SIGINT}

SETTINGS = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
max_connections = 100
"""


class ServiceMissing(Exception):
    """What is needed to run PostgreSQL is not there; the text says what."""


class Postgresql:
    """A server of our own; it keeps its port and its data until :meth:`close`.

    :raises ServiceMissing: its binaries are not installed.
    """

    def __init__(self) -> None:
        self._binaries = binaries()
        self._process: subprocess.Popen[bytes] | None = None
        (self.port,) = free_ports(1)
        self.folder = Path(tempfile.mkdtemp(prefix="kser-postgresql-"))
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def uri(self) -> str:
        """Where its first database is."""
        return self.uri_of("postgres")

    def uri_of(self, database: str) -> str:
        """Where a database is."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None, "it runs already"
        command = [str(self._binaries / "postgres"), "-D", str(self._data)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._account()
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                self.stop("immediate")
                happened = f"ended with status {status}" if status is not None else f"took over {START_SECONDS} s"
                raise RuntimeError(f"PostgreSQL {happened} while it started; it wrote:\n{self._log.read_text()}")
            time.sleep(0.02)

    def stop(self, mode: str = "fast") -> None:
        """Stop it, ``"immediate"`` as a crash would or ``"fast"``, and wait for that."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(SIGNALS[mode])
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self, mode: str = "immediate", seconds: float = 0) -> None:
        """Stop it and start it again, ``seconds`` later."""
        self.stop(mode)
        time.sleep(seconds)
        self.start()

    def close(self) -> None:
        """Stop it if it runs, and delete its data."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _log(self) -> Path:
        return self.folder / "output.log"

    def _prepare(self) -> None:
        account = self._account()
        if account:
            os.chown(self.folder, account["user"], account["group"])
        done = subprocess.run(
            [
                *(str(self._binaries / "initdb"), "--auth=trust", "--username=postgres", "--encoding=UTF8"),
                *("--locale=C", "-D", str(self._data)),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **account,
        )
        if done.returncode:
            raise RuntimeError(f"PostgreSQL could not make its data:\n{done.stdout}{done.stderr}")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(SETTINGS.format(port=self.port, folder=self.folder))

    def _answers(self) -> bool:
        try:
            psycopg.connect(host="127.0.0.1", port=self.port, user="postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _account(self) -> dict[str, Any]:
        """Who runs it: it refuses to be run by root."""
        if os.geteuid():
            return {}
        account = pwd.getpwnam("nobody")
        # Not in a folder that this account may not enter.
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [], "cwd": self.folder}


class Database:
    """A database of our own on a server, with kser's tables, gone after :meth:`close`.

    :param server: an address on the server, of somebody who may create databases.
    """

    def __init__(self, server: str) -> None:
        self._server = make_url(server)
        self.name = f"kser_test_{uuid.uuid4().hex[:12]}"
        self.uri = self._server.set(database=self.name).render_as_string(hide_password=False)
        self.run(f"CREATE DATABASE {self.name}", self._server.database)
        with closing(database_at(self.uri)) as database:
            schema.upgrade(database)

    def run(self, statement: str, database: str | None = None) -> list[Any]:
        """Run a statement from outside; returns its rows."""
        url = self._server.set(drivername="postgresql", database=database or self.name)
        with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> None:
        """Delete what is in the tables."""
        tables = ", ".join(table.name for table in metadata.sorted_tables if table.name != "kser_schema")
        self.run(f"TRUNCATE {tables}")

    def close(self) -> None:
        """Delete it."""
        self.run(f"DROP DATABASE {self.name} WITH (FORCE)", self._server.database)


def binaries() -> Path:
    """The folder with PostgreSQL's binaries.

    :raises ServiceMissing: there is none.
    """
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    versions = [folder for folder in DEBIAN.glob("*/bin") if (folder / "postgres").exists()]
    if not versions:
        raise ServiceMissing(f"there is no postgres on the PATH nor in {DEBIAN}; install PostgreSQL (its server)")
    return max(versions, key=lambda folder: float(folder.parent.name))
