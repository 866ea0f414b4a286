"""PostgreSQL for the tests: a server on loopback in a temporary folder, and databases with kser's tables."""

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

#: The folder in which Debian installs PostgreSQL, one version per subfolder; it is not on the PATH.
DEBIAN = Path("/usr/lib/postgresql")

#: The signal of each shutdown mode: ``immediate`` is like a crash, ``fast`` disconnects the clients first.
SIGNALS = {"immediate": signal.SIGQUIT, "fast": signal.SIGINT}

SETTINGS = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
max_connections = 100
# Statistics of the nearly empty tables of a test would change query plans, at random times.
autovacuum = off
"""


class ServiceMissing(Exception):
    """The binaries of PostgreSQL are not installed; the text names the missing one."""


class Postgresql:
    """A PostgreSQL server; restarts keep its port and its data until :meth:`close`.

    :raises ServiceMissing: the binaries of PostgreSQL are not installed.
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
        """The URI of the database that every server has."""
        return self.uri_of("postgres")

    def uri_of(self, database: str) -> str:
        """Return the URI of a database on this server."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        assert self._process is None, "the server runs already"
        command = [str(self._binaries / "postgres"), "-D", str(self._data)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._account()
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._accepts_connections():
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                self.stop("immediate")
                problem = f"ended with status {status}" if status is not None else f"took over {START_SECONDS} s"
                raise RuntimeError(f"PostgreSQL {problem} while it started; it wrote:\n{self._log.read_text()}")
            time.sleep(0.02)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server and wait until it has ended.

        :param mode: ``"immediate"``, which is like a crash, or ``"fast"``, which disconnects the clients first.
        """
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
        """Stop the server and start it ``seconds`` later."""
        self.stop(mode)
        time.sleep(seconds)
        self.start()

    def close(self) -> None:
        """Stop the server if it runs, and delete its data."""
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
            raise RuntimeError(f"initdb could not create the data folder:\n{done.stdout}{done.stderr}")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(SETTINGS.format(port=self.port, folder=self.folder))

    def _accepts_connections(self) -> bool:
        try:
            psycopg.connect(host="127.0.0.1", port=self.port, user="postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _account(self) -> dict[str, Any]:
        """Return the account of the server process; PostgreSQL refuses to run as root."""
        if os.geteuid():
            return {}
        account = pwd.getpwnam("nobody")
        # The account may not enter the current folder, and PostgreSQL fails in a folder that it cannot enter.
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [], "cwd": self.folder}


class Database:
    """A new database with kser's tables; :meth:`close` drops it.

    :param server: the URI of any database on the server, with an account that may create databases.
    """

    def __init__(self, server: str) -> None:
        self._server = make_url(server)
        self.name = f"kser_test_{uuid.uuid4().hex[:12]}"
        self.uri = self._server.set(database=self.name).render_as_string(hide_password=False)
        self.run(f"CREATE DATABASE {self.name}", self._server.database)
        with closing(database_at(self.uri)) as database:
            schema.upgrade(database)

    def run(self, statement: str, database: str | None = None) -> list[Any]:
        """Run a statement on a connection of its own, and return its rows.

        :param database: the name of the database; this database when None.
        """
        url = self._server.set(drivername="postgresql", database=database or self.name)
        with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> None:
        """Delete the rows of all tables."""
        tables = ", ".join(table.name for table in metadata.sorted_tables if table.name != "kser_schema")
        self.run(f"TRUNCATE {tables}")

    def close(self) -> None:
        """Drop the database."""
        self.run(f"DROP DATABASE {self.name} WITH (FORCE)", self._server.database)


def binaries() -> Path:
    """Return the folder with the binaries of PostgreSQL; of several versions, the newest.

    :raises ServiceMissing: PostgreSQL is not installed.
    """
    if postgres := shutil.which("postgres"):
        return Path(postgres).resolve().parent
    versions = [folder for folder in DEBIAN.glob("*/bin") if (folder / "postgres").exists()]
    if not versions:
        raise ServiceMissing(f"there is no postgres on the PATH nor in {DEBIAN}; install PostgreSQL (its server)")
    return max(versions, key=lambda folder: float(folder.parent.name))
