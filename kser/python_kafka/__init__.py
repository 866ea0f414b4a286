"""The default transport: kafka-python."""
