"""The published package, for the tests of this folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import needs

from .oracle import OracleMissing, oracle_python

# Below these, the published package writes the keys of a message in no fixed order (marshmallow), and the texts of
# the client's errors are others: there is no one behaviour to compare with.
COMPARABLE = {"marshmallow": (3, 26), "kafka-python": (3, 0)}


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The interpreter of the published package."""
    for name, lowest in COMPARABLE.items():
        installed = version(name)
        if tuple(map(int, installed.split(".")[:2])) < lowest:
            pytest.skip(f"the published package has no fixed behaviour with {name} {installed}")
    try:
        return oracle_python()
    except OracleMissing as problem:
        needs("the published package", problem)
