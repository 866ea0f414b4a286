"""Tests of the retry backoff: which records wait for a delayed one."""

from __future__ import annotations

import pytest

from kser.retry import Retry
from tests.consumer.harness import Act, Running, committed, consumer_of, put

pytestmark = pytest.mark.usefixtures("bus")

#: Three attempts, ten seconds apart.
THRICE = Retry(max_attempts=3, delay=10, backoff=1, jitter=False)


def test_retry_backoff_blocks_the_key_and_no_other_record() -> None:
    Act.acts["1"] = [ConnectionError("no"), None]
    put("1", "2", key=b"a")
    put("3", key=b"b")
    put("4")
    running = Running(retry=THRICE)
    assert running.attempts(5) == [3, 0]
    assert sorted(Act.seen) == ["1", "3", "4"]
    assert running.attempts(5) == [0, 2]
    assert (Act.seen[-2:], committed()) == (["1", "2"], 4)


@pytest.mark.parametrize(("ordering", "seen"), [("partition", ["1"]), ("none", ["1", "2", "3"])])
def test_retry_backoff_blocks_other_records_according_to_the_ordering(ordering: str, seen: list[str]) -> None:
    Act.acts["1"] = ConnectionError("no")
    put("1", "2", key=b"a")
    put("3")
    Running(retry=THRICE, ordering=ordering).attempts()
    assert Act.seen == seen


def test_retry_backoff_blocks_the_commit_but_not_its_metadata() -> None:
    Act.acts["1"] = [ConnectionError("no"), None]
    put("1", "2", "3")
    running = Running(retry=THRICE)
    running.attempts()
    running.consumer.close()
    assert committed() == 0
    consumer_of().run_until_idle()
    assert sorted(Act.seen) == ["1", "1", "2", "3"]
