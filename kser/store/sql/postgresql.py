"""PostgreSQL through psycopg 3, with a pool."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from sqlalchemy import URL, Connection, Double, Engine, NullPool, bindparam, create_engine, event, literal_column
from sqlalchemy.pool import QueuePool

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.sql.database import Database, Repeat, Transaction
from kser.store.sql.statements import CLOCK

#: A server that is gone is noticed in seconds.
CONNECT: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "kser",
}

#: Nobody waits for long, above all not for a process that stands still in a transaction. What runs more than a few
#: times is planned once, perhaps when tables are empty: each of our statements is one for indexes, whatever their size.
SESSION: Final = """\
SET statement_timeout = '30s';
SET lock_timeout = '10s';
SET idle_in_transaction_session_timeout = '10s';
SET enable_seqscan = off;
SET enable_hashjoin = off;
SET enable_mergejoin = off;
SET max_parallel_workers_per_gather = 0;
SET jit = off
"""

#: Seconds after which the distance between the two clocks is measured again.
MEASURE_SECONDS: Final = 60.0

#: Classes of SQLSTATE that say that something is wrong with what is to be stored: with the data, with constraints, or
#: beyond the server's limits. Everything else may pass.
DATA_ERRORS: Final = ("21", "22", "23", "44", "54")
#: Another transaction was in the way.
CONFLICTS: Final = ("40001", "40P01")

#: The connection is gone, or goes now.
LOST: Final = ("08", "25P03", "57P")

ADVICE: Final = {
    "08": "see whether the server runs and can be reached",
    "25P03": "this process stood still in a transaction for longer than 10 s",
    "25": "the server takes no writes: it may be a standby",
    "28": "see the user and the password in the address",
    "3D": "create the database",
    "42": "run: python -m kser.store upgrade, or see what this user may do",
    "53": "the server has no room: connections, memory or disk",
    "55": "somebody holds a lock for longer than 10 s",
    "57": "the server stops, starts, or took longer than 30 s",
}

LOCK_KEY: Final = 0x6B736572  # "kser"


class Postgresql(Database):
    """A server."""

    prefix = "postgresql+psycopg"
    packed = True
    # The second one works while the first waits for the disk.
    writers = 2
    # Stable within a statement: an index can be used, and what is written twice is the same.
    now = literal_column("extract(epoch FROM statement_timestamp())::float8", Double) + bindparam(CLOCK, type_=Double)

    def __init__(self, url: URL) -> None:
        #: Seconds that the server's clock is ahead of ours.
        self._ahead: float | None = None
        self._measured = 0.0
        super().__init__(url)

    def close(self) -> None:
        self.engine.dispose()

    def _time(self, connection: Any) -> float:
        # The wall clock, not the monotonic one, which stands still while a machine is suspended.
        if self._ahead is None or abs(time.time() - self._measured) > MEASURE_SECONDS:
            (there,) = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
            # After the answer: our idea of the server's time is not ahead of it.
            self._measured = time.time()
            self._ahead = there - self._measured
        return time.time() + self._ahead + self.shift

    def _engine(self) -> Engine:
        engine = create_engine(
            self.url,
            connect_args=self._arguments(),
            poolclass=QueuePool,
            # Whoever waits for one of these waits shorter than the server takes to begin a session: half of its work
            # was to begin those that were closed at once.
            pool_size=8,
            max_overflow=0,
            pool_use_lifo=True,
            pool_reset_on_return=None,
        )
        event.listen(engine, "connect", _prepare)
        return engine

    def _arguments(self) -> dict[str, Any]:
        return {name: value for name, value in CONNECT.items() if name not in self.url.query}

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """A connection, which is thrown away when something goes wrong with it."""
        pooled = self.engine.raw_connection()
        connection: Any = pooled.driver_connection
        try:
            yield connection
        except BaseException as error:
            with suppress(Exception):
                connection.rollback()
            lost = str(getattr(error, "sqlstate", None)).startswith(LOST)
            if lost or connection.broken or not isinstance(error, Exception):
                pooled.invalidate()
                # The others have most likely gone with it.
                self.engine.dispose()
            raise
        finally:
            pooled.close()

    @contextmanager
    def _writing(self, single: bool) -> Iterator[Transaction]:
        with self._connection() as connection:
            now = self._time(connection)
            cursor = connection.cursor()
            # One statement is a transaction of its own, without two more ways to the server and back.
            if not single:
                cursor.execute("BEGIN")
            yield Transaction(cursor, self.shift, now, self.packed)
            if not single:
                cursor.execute("COMMIT")

    @contextmanager
    def _reading(self, snapshot: bool) -> Iterator[Transaction]:
        with self._connection() as connection:
            cursor = connection.cursor()
            if snapshot:
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield Transaction(cursor, self.shift, time.time() + self.shift, self.packed)
            if snapshot:
                cursor.execute("COMMIT")

    @contextmanager
    def _migrating(self) -> Iterator[Connection]:
        engine = create_engine(self.url, connect_args=self._arguments(), poolclass=NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
            yield connection

    def _meaning(self, error: Exception) -> tuple[type[KserError], str]:
        state = getattr(error, "sqlstate", None)
        if state is None:
            bad = isinstance(error, self.engine.dialect.loaded_dbapi.DataError)
            return (StoreError, "") if bad else (StoreUnavailable, ADVICE["08"])
        if state in CONFLICTS:
            return Repeat, ""
        kind = StoreError if state[:2] in DATA_ERRORS else StoreUnavailable
        return kind, ADVICE.get(state) or ADVICE.get(state[:2], "")


def _prepare(connection: Any, _record: Any) -> None:
    # Transactions are begun and ended by hand: the driver's own cost another round trip.
    connection.autocommit = True
    connection.execute(SESSION)
