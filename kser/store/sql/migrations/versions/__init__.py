"""One module for each version of the tables: ``v0001`` and so on."""
