"""Faults of all kinds against groups of consumers, and what must hold all the same."""
