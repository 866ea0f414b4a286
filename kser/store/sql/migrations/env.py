"""The alembic environment, which migrates with the connection from :mod:`kser.store.sql.schema`."""

from __future__ import annotations

from alembic import context

from kser.store.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="kser_migration",
)
# Run the migrations in the transaction of the caller, who provides the connection.
context.run_migrations()
