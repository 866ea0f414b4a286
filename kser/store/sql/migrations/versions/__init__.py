"""The migrations: one module per version of the tables, with the names ``v0001``, ``v0002`` and so on."""
