"""The shared database that stores operations."""

from __future__ import annotations

from typing import Any

from kser.errors import MissingDependency, SettingError
from kser.store.base import Store
from kser.store.memory import MemoryStore


def open_store(uri: str, **options: Any) -> Store:
    """Return the store at an address.

    :param uri: ``sqlite:///file.db``, ``postgresql+psycopg://user@host/database`` (any form that SQLAlchemy accepts for
        SQLite and PostgreSQL), or ``memory://`` for a store that ends with the process.
    :param options: see :class:`kser.store.sql.SQLStore`.
    :raises kser.errors.SettingError: ``uri`` is not the address of a supported database.
    :raises kser.errors.MissingDependency: SQLAlchemy or the driver is not installed.
    """
    if not isinstance(uri, str) or "://" not in uri:
        raise SettingError(
            f"a database URI must look like 'sqlite:///shop.db' or 'postgresql+psycopg://…'; it is {uri!r}"
        )
    if uri.partition("://")[0] == "memory":
        return MemoryStore()
    try:
        from kser.store.sql import SQLStore
    except ImportError as error:
        raise MissingDependency(
            f'a database needs SQLAlchemy and alembic ({error}); install them with: pip install "kser[sql]", or'
            ' "kser[postgresql]" for PostgreSQL'
        ) from error
    return SQLStore(uri, **options)
