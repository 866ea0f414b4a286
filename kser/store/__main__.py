"""The command line that creates, upgrades and checks the tables of the shared database.

::

    python -m kser.store upgrade [--uri URI]    create the tables, or upgrade them to this version
    python -m kser.store status [--uri URI]     show the version; exit status 1 when kser cannot use the tables

Without ``--uri``, the address is the value of ``KSER_DATABASE_URI``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kser.config import DATABASE_URI, Settings
from kser.errors import KserError, MissingDependency, StoreMissing

try:
    from kser.store.sql import schema
    from kser.store.sql.database import Database
    from kser.store.sql.store import database_at
except ImportError as missing:
    IMPORT_ERROR: ImportError | None = missing
else:
    IMPORT_ERROR = None

OK, FAILED = 0, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status of the process.

    :param arguments: the command and its options; None stands for the command-line arguments of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        database = _database(options.uri)
        try:
            return _upgrade(database) if options.command == "upgrade" else _status(database)
        finally:
            database.close()
    except KserError as error:
        sys.stderr.write(f"kser: {error.message}\n")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kser.store", description="Create, upgrade or check the tables of kser in the shared database."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("upgrade", "create the tables, or upgrade them to this version of kser"),
        ("status", "show the version of the tables"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--uri", help=f"address of the database (default: ${DATABASE_URI})")
    return parser


def _database(uri: str | None) -> Database:
    if IMPORT_ERROR is not None:
        raise MissingDependency(
            f"this command needs SQLAlchemy and alembic ({IMPORT_ERROR}); install them with:"
            ' pip install "kser[sql]", or "kser[postgresql]" for PostgreSQL'
        )
    uri = uri or Settings().get(DATABASE_URI)
    if not uri:
        raise StoreMissing(f"no database is configured; pass --uri, or set {DATABASE_URI}")
    return database_at(uri)


def _upgrade(database: Database) -> int:
    before, after = schema.upgrade(database)
    problem = schema.mismatch(after)
    if problem:
        sys.stderr.write(f"kser: the database {database.name} {problem}\n")
        return FAILED
    if before == after:
        _print(f"{database.name} has tables of version {after.version} already: nothing to do")
    else:
        previous = "none" if before is None else f"version {before.version}"
        _print(f"{database.name} has tables of version {after.version} now; there were {previous} before")
    return OK


def _status(database: Database) -> int:
    version = schema.version_of(database)
    problem = schema.mismatch(version)
    if problem:
        _print(f"{database.name} {problem}")
        return FAILED
    assert version is not None, "mismatch() reports missing tables"
    _print(f"{database.name} has tables of version {version.version}; this kser needs {schema.VERSION}")
    return OK


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
