"""Run by alembic: migrates with the connection that :mod:`kser.store.sql.schema` passes."""

from __future__ import annotations

from alembic import context

from kser.store.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="kser_migration",
)
# The transaction is the caller's.
context.run_migrations()
