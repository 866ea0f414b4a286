"""How the tables came to be what they are, for alembic: a module for each version in ``versions``."""
