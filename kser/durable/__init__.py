"""Durable operations, which are executed under a claim, with a checkpoint for each step."""
