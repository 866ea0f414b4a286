"""The migrations: one module per version of the tables, with the name ``v0001`` and so on."""
