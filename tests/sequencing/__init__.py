"""Tests of :mod:`kser.sequencing`: without a store."""
