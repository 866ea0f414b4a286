"""Tests of :mod:`kser.consumer`."""
