"""Tests of the offset queries of a kafka-python client, with a scripted client."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kafka import TopicPartition

from kser.consumer.client import Commit, Partition
from kser.consumer.commit_metadata import CommitMetadata
from kser.python_kafka import offset_queries
from kser.python_kafka.offset_queries import OffsetQueries

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
