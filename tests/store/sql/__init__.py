"""Tests of :mod:`kser.store.sql`."""
