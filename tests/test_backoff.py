"""Tests of the back-off: growth, ceiling and the range of the random delay."""

from __future__ import annotations

import pytest

from kser.backoff import delay, random_delay


def test_delay_doubles_from_the_first_up_to_the_ceiling() -> None:
    assert [delay(failures, first=0.2, ceiling=3) for failures in range(1, 7)] == [0.2, 0.4, 0.8, 1.6, 3, 3]


def test_delay_grows_by_the_factor() -> None:
    assert [delay(failures, first=1, ceiling=100, factor=3) for failures in range(1, 5)] == [1, 3, 9, 27]


@pytest.mark.parametrize("factor", [2.0, 1.5])
def test_delay_beyond_float_range_is_the_ceiling(factor: float) -> None:
    assert delay(1_000_000, first=0.1, ceiling=10, factor=factor) == 10


def test_first_delay_above_the_ceiling_is_the_ceiling() -> None:
    assert delay(1, first=30, ceiling=10) == 10


@pytest.mark.parametrize(("failures", "highest"), [(1, 0.2), (3, 0.8), (50, 10.0)])
def test_random_delay_is_between_the_lowest_and_the_delay(failures: int, highest: float) -> None:
    delays = [random_delay(failures, first=0.2, ceiling=10, lowest=0.1) for _ in range(500)]
    assert all(0.1 <= seconds <= highest for seconds in delays)
    assert max(delays) - min(delays) > (highest - 0.1) / 2


def test_random_delay_is_at_least_the_lowest() -> None:
    assert random_delay(1, first=0.2, ceiling=10, lowest=0.5) == 0.5
