"""PostgreSQL through psycopg 3, with a connection pool."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from sqlalchemy import URL, Connection, Double, Engine, NullPool, bindparam, create_engine, event, literal_column
from sqlalchemy.pool import QueuePool

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.sql.database import Database, OwnConnection, SerializationConflict, Transaction
from kser.store.sql.statements import CLOCK

#: Connection options of libpq. With these timeouts and keepalives, the driver detects a lost server within seconds.
CONNECT: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "kser",
}

#: Session settings. The timeouts limit how long a session waits, for example for a process that hangs inside a
#: transaction. The server keeps the plan of a prepared statement, even if it made this plan while the tables were still
#: empty. So the settings disable sequential scans, hash joins and merge joins: every plan must use an index, whatever
#: the size of the tables.
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

#: Seconds after which the offset between the local clock and the server's clock is measured again.
MEASURE_SECONDS: Final = 60.0

#: SQLSTATE classes of permanent errors: invalid data, violated constraints, exceeded limits of the server. All other
#: errors may be temporary.
DATA_ERRORS: Final = ("21", "22", "23", "44", "54")
#: SQLSTATEs of conflicts with another transaction: a serialization failure and a deadlock.
CONFLICTS: Final = ("40001", "40P01")

#: SQLSTATE of a statement that has waited for a lock for longer than ``lock_timeout``.
LOCK_TIMEOUT: Final = "55P03"

#: SQLSTATE prefixes of errors which show that the connection is lost.
CONNECTION_LOST: Final = ("08", "25P03", "57P")

ERROR_TEXTS: Final = {
    "08": "check that the server is running and reachable",
    "25P03": "this process was stopped inside a transaction for longer than 10 s",
    "25": "the server accepts no writes: it may be a standby",
    "28": "check the user and the password in the address",
    "3D": "create the database",
    "42": "run: python -m kser.store upgrade, or check the privileges of this user",
    "53": "the server has run out of connections, memory or disk space",
    "55": "another session holds a lock for longer than 10 s",
    "57": "the server is stopping or starting, or the statement took longer than 30 s",
}

#: Seconds after the end of a timeout at which an own connection is broken, if the server has not answered by then.
DEADLINE_GRACE: Final = 0.25

LOCK_KEY: Final = 0x6B736572  # "kser"


class Postgresql(Database):
    """A PostgreSQL database.

    :param url: the address of the server.
    :param clock_offset: function that returns the number of seconds to add to the clock of the server.
    """

    prefix = "postgresql+psycopg"
    json_batches = True
    # Two writers are best: while one transaction waits for the disk at its COMMIT, the other transaction executes its
    # statements.
    max_concurrent_writers = 2
    # statement_timestamp() is constant within a statement. So conditions on the current time can use an index, and all
    # columns that a statement sets to the current time get the same value.
    now = literal_column("date_part('epoch', statement_timestamp())", Double) + bindparam(CLOCK, type_=Double)

    def __init__(self, url: URL, clock_offset: Callable[[], float]) -> None:
        #: Seconds by which the server's clock is ahead of the local clock; None before the first measurement.
        self._server_offset: float | None = None
        self._measured_at = 0.0
        super().__init__(url, clock_offset)

    def close(self) -> None:
        self.engine.dispose()

    def _time(self, connection: Any) -> float:
        # Use the wall clock here, because the monotonic clock stops while the machine is suspended.
        if self._server_offset is None or abs(time.time() - self._measured_at) > MEASURE_SECONDS:
            (there,) = _cursor(connection).execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
            # Read the local clock after the response. The server has read its clock earlier, so the measured offset is
            # too small rather than too large, and the estimate of the server's time is never later than the real time
            # of the server.
            self._measured_at = time.time()
            self._server_offset = there - self._measured_at
        return time.time() + self._server_offset + self._clock_offset()

    def _engine(self) -> Engine:
        engine = create_engine(
            self.url,
            connect_args=self._arguments(),
            poolclass=QueuePool,
            # Do not allow overflow connections. The pool closes such connections right after use, so in load tests the
            # server spent half of its time on new connections. A wait for a pooled connection is faster.
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
        """Provide a pooled connection.

        If the connection is lost or broken, or if an interrupt ended the block, discard the connection.
        """
        pooled = self.engine.raw_connection()
        connection: Any = pooled.driver_connection
        try:
            yield connection
        except BaseException as error:
            with suppress(Exception):
                connection.rollback()
            lost = str(getattr(error, "sqlstate", None)).startswith(CONNECTION_LOST)
            if lost or connection.broken or not isinstance(error, Exception):
                pooled.invalidate()
                # The other pooled connections are most likely lost too, so replace the pool.
                self.engine.dispose()
            raise
        finally:
            pooled.close()

    @contextmanager
    def _writing(self, single: bool) -> Iterator[Transaction]:
        with self._connection() as connection:
            now = self._time(connection)
            cursor = _cursor(connection)
            # In autocommit mode, a single statement is a transaction by itself, so the round trips for BEGIN and COMMIT
            # are saved.
            if not single:
                cursor.execute("BEGIN")
            yield Transaction(cursor, self._clock_offset(), now, self.json_batches)
            if not single:
                cursor.execute("COMMIT")

    @contextmanager
    def _reading(self, snapshot: bool) -> Iterator[Transaction]:
        with self._connection() as connection:
            cursor = _cursor(connection)
            if snapshot:
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            offset = self._clock_offset()
            yield Transaction(cursor, offset, time.time() + offset, self.json_batches)
            if snapshot:
                cursor.execute("COMMIT")

    def own_connection(self) -> OwnConnection:
        return PostgresqlConnection(self)

    def connect(self, timeout: float) -> Any:
        """Return a new connection of the driver that is in no pool."""
        # The driver raises a connect timeout below 2 s to 2 s.
        options = {**self._arguments(), "connect_timeout": math.ceil(timeout)}
        arguments, keywords = self.engine.dialect.create_connect_args(self.url)
        connection: Any = self.engine.dialect.loaded_dbapi.connect(*arguments, **{**keywords, **options})
        _prepare(connection, None)
        return connection

    def transaction_on(self, connection: Any) -> Transaction:
        """Return a transaction whose statements are each committed by itself."""
        offset = self._clock_offset()
        return Transaction(_cursor(connection), offset, time.time() + offset, self.json_batches)

    @contextmanager
    def _migrating(self) -> Iterator[Connection]:
        engine = create_engine(self.url, connect_args=self._arguments(), poolclass=NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
            yield connection

    def _classify_error(self, error: Exception) -> tuple[type[KserError], str]:
        state = getattr(error, "sqlstate", None)
        if state is None:
            bad = isinstance(error, self.engine.dialect.loaded_dbapi.DataError)
            return (StoreError, "") if bad else (StoreUnavailable, ERROR_TEXTS["08"])
        if state in CONFLICTS:
            return SerializationConflict, ""
        kind = StoreError if state[:2] in DATA_ERRORS else StoreUnavailable
        return kind, ERROR_TEXTS.get(state) or ERROR_TEXTS.get(state[:2], "")


class PostgresqlConnection(OwnConnection):
    """A connection that is in no pool, with a deadline for each transaction.

    The deadline must hold even if the server stands still, so a timer breaks the connection at the deadline.

    :param database: the database to connect to.
    """

    def __init__(self, database: Postgresql) -> None:
        self._database = database
        self._connection: Any = None

    @contextmanager
    def write(self, timeout: float) -> Iterator[Transaction]:
        with self._database.translated():
            try:
                end_at = time.monotonic() + timeout
                if self._connection is None:
                    self._connection = self._database.connect(timeout)
                left = max(end_at - time.monotonic(), 0.001)
                with _deadline(self._connection, left):
                    self._connection.execute(f"SET lock_timeout = {math.ceil(left * 1000)}")
                    yield self._database.transaction_on(self._connection)
            except BaseException as error:
                if getattr(error, "sqlstate", None) != LOCK_TIMEOUT:
                    self.close()
                raise

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()


def _cursor(connection: Any) -> Any:
    """Return a cursor that receives numbers in the binary format.

    In the text format, the server rounds numbers as its setting ``extra_float_digits`` demands. A condition that a time
    is unchanged since it was read would then be false.
    """
    return connection.cursor(binary=True)


@contextmanager
def _deadline(connection: Any, timeout: float) -> Iterator[None]:
    """Shut the socket of a connection down after ``timeout`` seconds, so that the statement that waits for it fails.

    A lock timeout ends a statement within ``timeout`` seconds, so the timer waits a little longer.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as copy:
        timer = threading.Timer(timeout + DEADLINE_GRACE, _shut_down, [copy])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _prepare(connection: Any, _record: Any) -> None:
    # Disable the implicit transactions of the driver, because each would cost another round trip. Explicit statements
    # start and commit the transactions.
    connection.autocommit = True
    connection.execute(SESSION)
