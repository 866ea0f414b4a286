"""Tests of :mod:`kser.durable`: stored operations."""
