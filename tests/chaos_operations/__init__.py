"""Faults of all kinds against consumers, Kafka and the shared database, and the promises about operations."""
