"""Tests of the topic ids of a kafka-python client, with a scripted network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kser.python_kafka import topic_ids
from kser.python_kafka.rebalances import ASYNC
from kser.python_kafka.topic_ids import TopicIds

IDS = {"dice": b"0123456789abcdef"}

pytestmark = pytest.mark.skipif(ASYNC, reason="kafka-python 3 receives the ids with its metadata")


class ScriptedNetwork:
    """A network with one node, which is ready after some polls, and whose first requests fail.

    :param not_ready: the number of polls before the node is ready.
    :param failures: the number of requests that fail.
    """

    def __init__(self, not_ready: int = 0, failures: int = 0) -> None:
        self.not_ready, self.failures = not_ready, failures
        self.now = 0.0
        self.requests = 0

    def get_api_versions(self) -> None:
        """Return no versions, because the request is scripted too."""

    def least_loaded_node(self) -> int:
        return 1

    def ready(self, node: int) -> bool:
        return not self.not_ready

    def send(self, node: int, request: Any) -> Any:
        from kafka.errors import NodeNotReadyError
        from kafka.future import Future

        self.requests += 1
        if self.failures:
            self.failures -= 1
            self.not_ready = 1
            return Future().failure(NodeNotReadyError(node))
        return Future().success(IDS)

    def poll(self, timeout_ms: float, future: Any = None) -> None:
        self.now += 0 if future is not None and future.is_done else timeout_ms / 1000
        self.not_ready = max(self.not_ready - 1, 0)


def ids_of(network: ScriptedNetwork, monkeypatch: pytest.MonkeyPatch, request: Any = "request") -> TopicIds:
    """Return the topic ids of a client with a scripted network."""
    monkeypatch.setattr(topic_ids, "topic_id_request", lambda versions, topics: request)
    monkeypatch.setattr(topic_ids, "topic_ids_of", lambda response: response)
    monkeypatch.setattr(topic_ids, "time", SimpleNamespace(monotonic=lambda: network.now))
    client: Any = SimpleNamespace(_client=network)
    return TopicIds(client, 30)


@pytest.mark.parametrize(("not_ready", "failures"), [(0, 0), (3, 0), (0, 2), (2, 1)])
def test_start_waits_for_the_ids_while_a_connection_is_made(
    not_ready: int, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the ids, a partition would start at an offset that was committed for an earlier topic of its name."""
    network = ScriptedNetwork(not_ready, failures)
    assert ids_of(network, monkeypatch).at_start({"dice"}) == IDS
    assert network.requests == failures + 1


def test_start_without_a_connection_ends_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ScriptedNetwork(not_ready=1_000)
    assert ids_of(network, monkeypatch).at_start({"dice"}) == {}
    assert (network.now, network.requests) == (pytest.approx(2), 0)


def test_start_waits_for_no_ids_of_brokers_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ScriptedNetwork()
    assert ids_of(network, monkeypatch, request=None).at_start({"dice"}) == {}
    assert (network.now, network.requests) == (0, 0)
