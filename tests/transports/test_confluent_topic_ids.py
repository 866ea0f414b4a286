"""Tests of the requests for topic ids, with a scripted admin client."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from kser.confluent import topic_ids
from kser.confluent.topic_ids import REQUEST_TIMEOUT, SILENCE, TopicIds

ID = SimpleNamespace(get_most_significant_bits=lambda: 1, get_least_significant_bits=lambda: 2)
DICE_ID = bytes([0] * 7 + [1] + [0] * 7 + [2])


class Broker:
    """A broker that responds or not, and the clock. Each wait for a broker that does not respond takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.responds, self.now, self.waits = True, 1000.0, 0
        monkeypatch.setattr(topic_ids, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(topic_ids, "wait", self._wait)
        self.ids = TopicIds({}, 30)
        self.ids._admin = SimpleNamespace(poll=lambda timeout: 0, describe_topics=self._describe)  # type: ignore[assignment]

    def _describe(self, topics: Any, request_timeout: float) -> dict[str, Future[Any]]:
        future: Future[Any] = Future()
        if self.responds:
            future.set_result(SimpleNamespace(topic_id=ID))
        return {"dice": future}

    def _wait(self, futures: Any, timeout: float) -> Any:
        self.waits += 1
        not_done = {future for future in futures if not future.done()}
        self.now += timeout if not_done else 0
        return SimpleNamespace(not_done=not_done)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    """Return a broker with the topic ``dice``."""
    return Broker(monkeypatch)


def test_each_call_waits_for_a_broker_that_responds(broker: Broker) -> None:
    assert [broker.ids.fetch(["dice"]) for _ in range(3)] == [{"dice": DICE_ID}] * 3
    assert broker.waits == 3


def test_calls_do_not_wait_after_a_request_without_a_response(broker: Broker) -> None:
    broker.responds = False
    assert [broker.ids.fetch(["dice"]) for _ in range(5)] == [{}] * 5
    assert broker.waits == 1
    assert broker.now == 1000 + REQUEST_TIMEOUT


@pytest.mark.parametrize("slow_requests", [1, 2, 3])
def test_calls_wait_again_a_while_after_slow_requests(slow_requests: int, broker: Broker) -> None:
    broker.responds = False
    for request in range(1, slow_requests + 1):
        assert broker.ids.fetch(["dice"]) == {}
        assert broker.waits == request
        broker.now += SILENCE
    broker.responds = True
    assert broker.ids.fetch(["dice"]) == {"dice": DICE_ID}
    assert broker.waits == slow_requests + 1
