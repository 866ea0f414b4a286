"""Contract tests of several members of a consumer group, run against each transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from threading import Timer
from typing import Any

import pytest

from kser.consumer.client import Commit, Partition
from kser.errors import ClientError
from tests.transports.client_contract import BrokerHarness, ClientContract, Drain, Join, Member, until

#: Longer than an eager rebalance takes, and shorter than a session.
SOON = 4


class GroupContract(ClientContract):
    """Tests of two members of a group."""

    def meet(self, topic: str, join: Join, **options: Any) -> tuple[Member, Member]:
        """One member that had all, and one that has got its share of it."""
        first = join(topic, **options)
        until(lambda: len(first.starts) == 2, "the first has everything", first)
        second = join(topic, **options)
        self.share(first, second)
        return first, second

    def share(self, first: Member, second: Member) -> None:
        until(lambda: (len(first.starts), len(second.starts)) == (1, 1), "they share", first, second)
        assert first.starts.keys().isdisjoint(second.starts)

    def test_rebalance_on_join_continues_from_the_committed_offsets(
        self, harness: BrokerHarness, join: Join, group: str
    ) -> None:
        topic = harness.new_topic(2)
        keys = {Partition(topic, number) for number in range(2)}
        for number in range(2):
            harness.send(topic, *map(str, range(5)), partition=number)
        first = join(topic)
        until(lambda: len(first.records) == 10, "all come", first)
        first.finished = {key: Commit(3, "kser:1,1") for key in keys}
        second = join(topic)
        self.share(first, second)
        assert ("revoke", dict.fromkeys(keys)) in first.events, "an eager rebalance takes everything"
        for member in (first, second):
            assert member.events[-1] == ("assign", dict.fromkeys(member.starts, Commit(3, "kser:1,1")))
        until(lambda: len(second.records) >= 2, "its share comes to the one", first, second)
        until(lambda: len(first.records) >= 12, "its share comes to the other", first, second)
        assert second.values() == ["3", "4"]
        assert [record.offset for record in first.records[10:]] == [3, 4], "as if it had just come"

    def test_members_with_short_rare_polls_complete_a_rebalance(self, harness: BrokerHarness, join: Join) -> None:
        """Joins are over between their polls."""
        topic = harness.new_topic(2)
        first = join(topic)
        until(lambda: len(first.starts) == 2, "the first has everything", first)
        second = join(topic)

        def seldom() -> bool:
            for member in (first, second):
                member.poll(0.01)
                time.sleep(0.1)
            return len(first.starts) == len(second.starts) == 1

        until(seldom, "they share")
        # One that leads before it has heard of the partitions has to distribute them once more.
        for _ in range(20):
            seldom()
        until(seldom, "they share again")
        revoked = [event for event, _ in first.events + second.events].count("revoke")
        assert revoked <= 4, (first.events, second.events)

    def test_rebalance_waits_for_running_records_before_revocation(
        self, harness: BrokerHarness, join: Join, group: str
    ) -> None:
        topic = harness.new_topic(2)
        first = join(topic)
        until(lambda: len(first.starts) == 2, "the first has everything", first)
        keys = list(first.starts)
        ended: list[float] = []

        def end() -> None:
            ended.append(time.monotonic())
            first.finished = {key: Commit(0, "kser:1,2") for key in keys}
            first.drained.set()

        first.drained.clear()
        second = join(topic)
        until(
            lambda: first.events[-1][0] == "revoke" or second.starts, "it is revoked", second, *self.aside(first, end)
        )
        until(lambda: second.starts, "they share", first, second)
        assert ended and time.monotonic() > ended[0]
        assert set(second.starts.values()) == {Commit(0, "kser:1,2")}

    def aside(self, member: Member, end: Callable[[], None]) -> list[Member]:
        """The member itself; what runs ends half a second after it was to be given up."""
        on_revoke = member.on_revoke

        def revoke(keys: Collection[Partition]) -> Drain:
            timer = Timer(0.5, end)
            timer.start()
            return on_revoke(keys)

        member.on_revoke = revoke  # type: ignore[method-assign]
        return [member]

    def test_closing_member_leaves_at_once_and_commits_nothing(
        self, harness: BrokerHarness, join: Join, group: str
    ) -> None:
        first, second = self.meet(harness.new_topic(2), join)
        theirs = list(second.starts)
        second.close()
        took = until(lambda: len(first.starts) == 2, "the first has everything again", first)
        assert took < SOON
        assert [harness.committed(group, key) for key in theirs] == [Commit(0)]

    def test_pause_survives_a_rebalance(self, harness: BrokerHarness, join: Join) -> None:
        topic = harness.new_topic(2)
        first, second = self.meet(topic, join)
        for number in range(2):
            harness.send(topic, "0", partition=number)
        second.close()
        until(lambda: len(first.starts) == 2, "the first has everything again", first, limit=0)
        # Those of partitions that have just come may come.
        came = len(first.records)
        for _ in range(10):
            assert first.poll(limit=0) == []
        assert len(first.records) == came
        until(lambda: {record.partition for record in first.records} == {0, 1}, "it goes on", first)

    def test_expelled_member_cannot_commit_and_rejoins(self, harness: BrokerHarness, join: Join, group: str) -> None:
        topic = harness.new_topic(2)
        first, second = self.meet(topic, join, impatient=True)
        gone = list(second.starts)
        second.patient = True
        second.events.clear()
        self.expel(second)
        until(lambda: len(first.starts) == 2, "the first has everything", first)
        with pytest.raises(ClientError):
            second.client.commit(dict.fromkeys(gone, Commit(0, "late")), 2)
        assert [harness.committed(group, key) for key in gone] == [Commit(0)]
        self.share(first, second)
        assert second.events[0][0] in ("lost", "revoke")
        assert [harness.committed(group, key) for key in gone] == [Commit(0)]

    def expel(self, member: Member) -> None:
        """Kafka does that to a member that does not poll."""

    @pytest.mark.parametrize("reset", ["earliest", "latest"])
    def test_added_partitions_start_at_their_beginning(self, harness: Any, join: Join, group: str, reset: str) -> None:
        topic = harness.new_topic(1)
        member = join(topic, reset=reset)
        until(lambda: member.starts, "it has its partition", member)
        harness.grow(topic, 2)
        harness.send(topic, "0", "1", partition=1)
        until(lambda: len(member.records) == 2, "the records in the new one come", member)
        assert member.starts[Partition(topic, 1)] == Commit(0)
        assert harness.committed(group, Partition(topic, 1)) == Commit(0)

    @pytest.mark.parametrize("reset", ["earliest", "latest"])
    def test_partitions_added_while_the_group_was_empty_start_at_their_beginning(
        self, harness: Any, join: Join, reset: str
    ) -> None:
        topic = harness.new_topic(1)
        before = join(topic, reset=reset)
        until(lambda: before.starts, "it has its partition", before)
        before.close()
        harness.grow(topic, 2)
        harness.send(topic, "0", partition=1)
        member = join(topic, reset=reset)
        until(lambda: len(member.starts) == 2, "it has both", member)
        until(lambda: member.records, "the record in the new one comes", member, seconds=10)
