"""Tests of :mod:`kser.store`."""
