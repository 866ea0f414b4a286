"""Tests of the offset queries of a kafka-python client, with a scripted client."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import LeaderNotAvailableError

from kser.consumer.client import Commit, Partition
from kser.consumer.commit_metadata import CommitMetadata
from kser.python_kafka import offset_queries
from kser.python_kafka.offset_queries import OffsetQueries
from kser.python_kafka.rebalances import ASYNC

PARTITIONS = 300


class ScriptedClient:
    """A client of a topic with many partitions, which counts its requests for committed offsets."""

    def __init__(self, commits: dict[int, Commit]) -> None:
        self.requests = 0
        self._commits = commits
        self._coordinator = SimpleNamespace(fetch_committed_offsets=self._fetch)
        self._fetcher = SimpleNamespace(
            beginning_offsets=lambda tps, timeout_ms: dict.fromkeys(tps, 0),
            end_offsets=lambda tps, timeout_ms: dict.fromkeys(tps, 9),
        )

    def committed(self, tp: TopicPartition, metadata: bool, timeout_ms: int) -> Any:
        return self._fetch([tp], timeout_ms).get(tp)

    def _fetch(self, tps: list[TopicPartition], timeout_ms: int) -> dict[TopicPartition, Any]:
        self.requests += 1
        return {tp: self._commits[tp.partition] for tp in tps if tp.partition in self._commits}


@pytest.mark.parametrize(
    ("known", "start"), [(None, 9), (PARTITIONS, 9), (PARTITIONS - 1, 0)], ids=["new group", "old partition", "added"]
)
def test_start_of_a_partition_reads_the_commits_of_its_topic_with_one_request(
    known: int | None, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a request for each partition, the start of a large topic would exceed the limit of the client thread."""
    monkeypatch.setattr(offset_queries, "partitions_of", lambda *_: set(range(PARTITIONS)))
    writer = CommitMetadata("latest")
    commits = {}
    if known is not None:
        writer.partition_counts.observe("dice", known)
        commits = {0: Commit(5, writer.write(Partition("dice", 0), Commit(5)))}
    client: Any = ScriptedClient(commits)
    metadata = CommitMetadata("latest")
    metadata.partition_counts.observe("dice", PARTITIONS)
    queries = OffsetQueries(client, "latest", metadata)
    assert queries.first_position(TopicPartition("dice", PARTITIONS - 1)) == Commit(start)
    assert client.requests == 1


@pytest.mark.skipif(ASYNC, reason="kafka-python 3 asks again by itself")
@pytest.mark.parametrize("query", ["beginnings", "ends"])
def test_query_of_a_partition_without_a_leader_is_an_error_of_kafka(
    query: str, unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kafka-python 2 has an error in its own code for this answer."""
    from kafka.future import Future

    tp = TopicPartition("dice", 0)
    with closing(KafkaConsumer(bootstrap_servers=unused_address, api_version=(2, 4))) as client:
        answer = Future().success(({}, {tp}))
        monkeypatch.setattr(client._fetcher, "_send_list_offsets_requests", lambda _timestamps: answer)
        queries = OffsetQueries(client, "latest", CommitMetadata("latest"))
        with pytest.raises(LeaderNotAvailableError, match=r"lead all of these partitions: dice\[0\]"):
            getattr(queries, query)([tp])
        assert client._client.cluster.need_update
