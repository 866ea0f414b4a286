"""Which version the tables of a database have, and how they get to be of this one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import Connection, inspect, select

from kser.errors import SchemaMismatch
from kser.store.sql.database import Database
from kser.store.sql.tables import schema

#: The version that this code makes and needs.
VERSION: Final = 1

MIGRATIONS: Final = Path(__file__).parent / "migrations"

UPGRADE: Final = "python -m kser.store upgrade"


class Version(NamedTuple):
    """What a database says of its tables."""

    version: int
    #: The oldest version of the code that may use them.
    oldest: int


def version_of(database: Database) -> Version | None:
    """The version of the tables; None when there are none.

    :raises kser.errors.StoreUnavailable: the database cannot be used now.
    """
    if not database.exists():
        return None
    with database.looking() as connection:
        return _version(connection)


def check(database: Database, *, create: bool) -> None:
    """See whether the tables are such that this code can use them.

    :param create: make them where there are none; several processes may do so at the same time.
    :raises kser.errors.SchemaMismatch: this code cannot use them.
    :raises kser.errors.StoreUnavailable: the database cannot be used now.
    """
    found = version_of(database)
    if found is None and create:
        with database.migrating() as connection:
            # Somebody else may have been faster.
            if _version(connection) is None:
                _migrate(connection)
            found = _version(connection)
    problem = mismatch(found)
    if problem:
        raise SchemaMismatch(f"the database {database.name} {problem}")


def upgrade(database: Database) -> tuple[Version | None, Version]:
    """Bring the tables to this code's version, or leave newer ones alone; returns the version before and after.

    :raises kser.errors.StoreUnavailable: the database cannot be used now.
    """
    with database.migrating() as connection:
        before = _version(connection)
        if before is None or before.version < VERSION:
            _migrate(connection)
        after = _version(connection)
        assert after is not None, "the migrations make the table"
        return before, after


def mismatch(found: Version | None) -> str:
    """Why this code cannot use tables of that version, and what to do; nothing when it can."""
    if found is None:
        return f"has no tables of kser; run: {UPGRADE}"
    if found.version < VERSION:
        return f"has tables of version {found.version}, and this kser needs {VERSION}; run: {UPGRADE}"
    if found.oldest > VERSION:
        return (
            f"has tables of version {found.version}, which need a newer kser than this one, of version {VERSION};"
            " upgrade kser: pip install --upgrade kser"
        )
    return ""


def _version(connection: Connection) -> Version | None:
    if not inspect(connection).has_table(schema.name):
        return None
    row = connection.execute(select(schema.c.version, schema.c.oldest)).first()
    return None if row is None else Version(*row)


def _migrate(connection: Connection) -> None:
    plugins = logging.getLogger("alembic.runtime.plugins")
    if plugins.level == logging.NOTSET:
        # At INFO it lists its own parts when it is loaded.
        plugins.setLevel(logging.WARNING)
    # It takes longer to load than all the rest, and hardly any process needs it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    # Percent signs stand for something else there.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
