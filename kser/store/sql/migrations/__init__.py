"""The alembic migrations of the tables: one module per version in ``versions``."""
