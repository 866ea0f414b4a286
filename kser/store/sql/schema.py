"""Functions that check the version of the tables, and that create or upgrade the tables."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import Connection, inspect, select

from kser.errors import SchemaMismatch
from kser.store.sql.database import Database
from kser.store.sql.tables import schema

#: The version of the tables that this code creates and needs.
VERSION: Final = 2

MIGRATIONS: Final = Path(__file__).parent / "migrations"

UPGRADE: Final = "python -m kser.store upgrade"


class Version(NamedTuple):
    """The version of the tables in a database."""

    version: int
    #: The lowest :data:`VERSION` that a release of kser must have to be able to use the tables.
    oldest: int


def version_of(database: Database) -> Version | None:
    """Return the version of the tables, or None if the tables do not exist.

    :raises kser.errors.StoreUnavailable: the database cannot be used now.
    """
    if not database.exists():
        return None
    with database.inspect_connection() as connection:
        return _version(connection)


def check(database: Database, *, create: bool) -> None:
    """Check that this code can use the tables.

    :param create: True to create missing tables. Several processes may create the tables at the same time.
    :raises kser.errors.SchemaMismatch: the tables are missing or incompatible.
    :raises kser.errors.StoreUnavailable: the database cannot be used now.
    """
    version = version_of(database)
    if version is None and create:
        with database.migration_transaction() as connection:
            # Another process may have created the tables meanwhile.
            if _version(connection) is None:
                migrate(connection)
            version = _version(connection)
    problem = mismatch(version)
    if problem:
        raise SchemaMismatch(f"the database {database.name} {problem}")


def upgrade(database: Database) -> tuple[Version | None, Version]:
    """Upgrade the tables to the version of this code. Tables of a newer version stay unchanged.

    :return: the version before the upgrade and the version after it.

    :raises kser.errors.StoreUnavailable: the database cannot be used now.
    """
    with database.migration_transaction() as connection:
        before = _version(connection)
        if before is None or before.version < VERSION:
            migrate(connection)
        after = _version(connection)
        assert after is not None, "the migrations create the table"
        return before, after


def mismatch(version: Version | None) -> str:
    """Return a text that states why this code cannot use tables of a version, and which command solves the problem.

    :return: an empty text if this code can use the tables.
    """
    if version is None:
        return f"has no tables of kser; run: {UPGRADE}"
    if version.version < VERSION:
        return f"has tables of version {version.version}, and this kser needs {VERSION}; run: {UPGRADE}"
    if version.oldest > VERSION:
        return (
            f"has tables of version {version.version}, which need a newer kser than this one, of version {VERSION};"
            " upgrade kser: pip install --upgrade kser"
        )
    return ""


def _version(connection: Connection) -> Version | None:
    if not inspect(connection).has_table(schema.name):
        return None
    row = connection.execute(select(schema.c.version, schema.c.oldest)).first()
    return None if row is None else Version(*row)


def migrate(connection: Connection, revision: str = "head") -> None:
    """Migrate the tables in the transaction of a connection that excludes all other migrations.

    :param revision: the revision of the migration to end with.
    """
    plugins = logging.getLogger("alembic.runtime.plugins")
    if plugins.level == logging.NOTSET:
        # alembic logs each of its plugins at INFO during its import. Disable these log lines.
        plugins.setLevel(logging.WARNING)
    # Import alembic only here, because its import takes longer than the import of all other modules, and few processes
    # need alembic.
    from alembic import command
    from alembic.config import Config

    config = Config()
    # alembic interpolates percent signs in options, so escape them.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
