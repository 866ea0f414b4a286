"""Durable operations: executed under a claim, with a checkpoint for each step."""
