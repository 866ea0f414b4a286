"""One module per version of the tables: ``v0001`` and so on."""
