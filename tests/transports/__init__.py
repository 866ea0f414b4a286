"""Tests of the transports: :mod:`kser.dummy`, :mod:`kser.python_kafka` and :mod:`kser.confluent`."""
