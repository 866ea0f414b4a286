"""Faults of all kinds against consumers, Kafka and the shared database, and what must hold for operations."""
