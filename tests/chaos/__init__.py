"""Faults of all kinds against groups of consumers, and the promises that must hold nevertheless."""
