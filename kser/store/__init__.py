"""The stores of operations: a shared database, or the memory of one process for tests."""

from __future__ import annotations

from typing import Any

from kser.errors import MissingDependency, SettingError
from kser.masking import mask_address
from kser.store.base import Store
from kser.store.memory import MemoryStore


def open_store(uri: str, **options: Any) -> Store:
    """Return the store for a database URI.

    :param uri: ``sqlite:///file.db`` or ``postgresql+psycopg://user@host/database``, in any form that SQLAlchemy
        accepts; or ``memory://`` for a :class:`kser.store.memory.MemoryStore`, whose operations are lost when the
        process ends.
    :param options: keyword arguments of :class:`kser.store.sql.SQLStore`; with ``memory://``, they have no effect.
    :raises kser.errors.SettingError: ``uri`` is not the address of a supported database.
    :raises kser.errors.MissingDependency: SQLAlchemy or the driver is not installed.
    """
    if not isinstance(uri, str) or "://" not in uri:
        # The text may contain a password, which stands before the last "@".
        shown = mask_address(uri) if isinstance(uri, str) else type(uri).__name__
        raise SettingError(
            f"a database URI must look like 'sqlite:///shop.db' or 'postgresql+psycopg://…'; it is {shown!r}"
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
