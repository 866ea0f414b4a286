"""Transport on kafka-python, the default."""
