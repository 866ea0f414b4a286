"""The alembic migrations of the tables. The package ``versions`` contains one module per version of the tables."""
