"""Fixture of the differential tests: the interpreter of the published package."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import needs

from .published_package import PublishedPackageMissing, published_python

#: The lowest versions with which the published package has one behaviour. With an older marshmallow, the order of keys
#: in a message varies; an older kafka-python has other texts of errors.
LOWEST_VERSIONS = {"marshmallow": (3, 26), "kafka-python": (3, 0)}


@pytest.fixture(scope="session")
def published() -> Path:
    """Return the interpreter of the published package."""
    for name, lowest in LOWEST_VERSIONS.items():
        installed = version(name)
        if tuple(map(int, installed.split(".")[:2])) < lowest:
            pytest.skip(f"the published package has no fixed behaviour with {name} {installed}")
    try:
        return published_python()
    except PublishedPackageMissing as problem:
        needs("the published package", problem)
