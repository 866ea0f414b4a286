"""Execution of stored operations: consumers run the steps under a claim, and end each step with a checkpoint."""
