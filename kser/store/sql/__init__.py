"""The store in SQLite or PostgreSQL, built with SQLAlchemy Core."""

from __future__ import annotations

from kser.store.sql.store import SQLStore

__all__ = ["SQLStore"]
