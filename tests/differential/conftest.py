"""The published package, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import needs

from .oracle import OracleMissing, oracle_python


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The interpreter of the published package."""
    try:
        return oracle_python()
    except OracleMissing as problem:
        needs("the published package", problem)
