"""What goes on, and what does not, while a message waits for its next attempt."""

from __future__ import annotations

import pytest

from kser.retry import Retry
from tests.engine import Act, Running, committed, consumer_of, put

pytestmark = pytest.mark.usefixtures("bus")

#: Three attempts, ten seconds apart.
THRICE = Retry(max_attempts=3, delay=10, backoff=1, jitter=False)


def test_while_a_message_waits_its_key_waits_and_others_go_on() -> None:
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
def test_what_waits_with_a_message_is_a_matter_of_the_ordering(ordering: str, seen: list[str]) -> None:
    Act.acts["1"] = ConnectionError("no")
    put("1", "2", key=b"a")
    put("3")
    Running(retry=THRICE, ordering=ordering).attempts()
    assert Act.seen == seen


def test_nothing_above_a_message_that_waits_is_committed_but_it_is_noted() -> None:
    Act.acts["1"] = [ConnectionError("no"), None]
    put("1", "2", "3")
    running = Running(retry=THRICE)
    running.attempts()
    running.consumer.close()
    assert committed() == 0
    consumer_of().run_until_idle()
    assert sorted(Act.seen) == ["1", "1", "2", "3"]
