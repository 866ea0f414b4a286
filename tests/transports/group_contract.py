"""Contract tests of the client of a consumer: two members of a group."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from threading import Timer
from typing import Any

import pytest

from kser.consumer.client import Commit, Partition
from kser.errors import ClientError
from tests.transports.client_contract import BrokerHarness, ClientContract, Drain, Join, Member, until

#: Seconds that are more than an eager rebalance takes, and fewer than a session.
REBALANCE_SECONDS = 4


class GroupContract(ClientContract):
    """The contract of two members of a group."""

    def join_two(self, topic: str, join: Join, **options: Any) -> tuple[Member, Member]:
        """Return two members: the first had both partitions until the second joined."""
        first = join(topic, **options)
        until(lambda: len(first.starts) == 2, "the first member has both partitions", first)
        second = join(topic, **options)
        self.wait_for_balance(first, second)
        return first, second

    def wait_for_balance(self, first: Member, second: Member) -> None:
        """Wait until each member has one partition."""
        until(lambda: (len(first.starts), len(second.starts)) == (1, 1), "each has one partition", first, second)
        assert first.starts.keys().isdisjoint(second.starts)

    def test_rebalance_on_join_continues_from_the_committed_offsets(
        self, harness: BrokerHarness, join: Join, group: str
    ) -> None:
        topic = harness.new_topic(2)
        keys = {Partition(topic, number) for number in range(2)}
        for number in range(2):
            harness.send(topic, *map(str, range(5)), partition=number)
        first = join(topic)
        until(lambda: len(first.records) == 10, "all records arrive", first)
        first.finished = {key: Commit(3, "kser:1,1") for key in keys}
        second = join(topic)
        self.wait_for_balance(first, second)
        moved = keys if harness.eager else set(second.starts)
        assert ("revoke", dict.fromkeys(moved)) in first.events, "an eager rebalance revokes all partitions"
        for member in (first, second) if harness.eager else (second,):
            assert member.events[-1] == ("assign", dict.fromkeys(member.starts, Commit(3, "kser:1,1")))
        until(lambda: len(second.records) >= 2, "the second member gets its records", first, second)
        assert second.values() == ["3", "4"]
        if harness.eager:
            until(lambda: len(first.records) >= 12, "the first member gets its records", first, second)
            assert [record.offset for record in first.records[10:]] == [3, 4], (
                "the first member restarts at the committed offset"
            )
        else:
            assert len(first.records) == 10, "the first member continues with the partition that it keeps"

    def test_members_with_short_rare_polls_complete_a_rebalance(self, harness: BrokerHarness, join: Join) -> None:
        """A join may end between two polls of a member."""
        topic = harness.new_topic(2)
        first = join(topic)
        until(lambda: len(first.starts) == 2, "the first member has both partitions", first)
        second = join(topic)

        def poll_rarely() -> bool:
            for member in (first, second):
                member.poll(0.01)
                time.sleep(0.1)
            return len(first.starts) == len(second.starts) == 1

        until(poll_rarely, "each has one partition")
        # A leader that does not know the partitions yet assigns none, and needs another rebalance.
        for _ in range(20):
            poll_rarely()
        until(poll_rarely, "each still has one partition")
        revoked = [event for event, _ in first.events + second.events].count("revoke")
        assert revoked <= 4, (first.events, second.events)

    def test_rebalance_waits_for_running_records_before_revocation(
        self, harness: BrokerHarness, join: Join, group: str
    ) -> None:
        topic = harness.new_topic(2)
        first = join(topic)
        until(lambda: len(first.starts) == 2, "the first member has both partitions", first)
        keys = list(first.starts)

        def end_drain() -> None:
            first.finished = {key: Commit(0, "kser:1,2") for key in keys}
            first.drained.set()

        first.drained.clear()
        second = join(topic)
        until(
            lambda: first.events[-1][0] == "revoke" or second.starts,
            "the partitions are revoked",
            second,
            *self.drain_later(first, end_drain),
        )
        until(lambda: second.starts, "the second member has a partition", first, second)
        assert first.drained.is_set(), "the drain had not ended when the second member got its partition"
        assert set(second.starts.values()) == {Commit(0, "kser:1,2")}

    def drain_later(self, member: Member, end: Callable[[], None]) -> list[Member]:
        """Return the member in a list; its drain calls ``end`` half a second after a revocation."""
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
        first, second = self.join_two(harness.new_topic(2), join)
        revoked = list(second.starts)
        second.close()
        duration = until(lambda: len(first.starts) == 2, "the first member has both partitions again", first)
        assert duration < REBALANCE_SECONDS
        assert [harness.committed(group, key) for key in revoked] == [Commit(0)]

    def test_pause_survives_a_rebalance(self, harness: BrokerHarness, join: Join) -> None:
        topic = harness.new_topic(2)
        first, second = self.join_two(topic, join)
        for number in range(2):
            harness.send(topic, "0", partition=number)
        second.close()
        until(lambda: len(first.starts) == 2, "the first member has both partitions again", first, limit=0)
        # Records that were fetched before the pause may have arrived.
        arrived = len(first.records)
        for _ in range(10):
            assert first.poll(limit=0) == []
        assert len(first.records) == arrived
        until(lambda: {record.partition for record in first.records} == {0, 1}, "the partitions continue", first)

    def test_expelled_member_cannot_commit_and_rejoins(self, harness: BrokerHarness, join: Join, group: str) -> None:
        topic = harness.new_topic(2)
        first, second = self.join_two(topic, join, expires_soon=True)
        revoked = list(second.starts)
        second.tolerates_errors = True
        second.events.clear()
        self.expel(second)
        until(lambda: len(first.starts) == 2, "the first member has both partitions", first)
        with pytest.raises(ClientError):
            second.client.commit(dict.fromkeys(revoked, Commit(0, "late")), 2)
        assert [harness.committed(group, key) for key in revoked] == [Commit(0)]
        self.wait_for_balance(first, second)
        assert second.events[0][0] in ("lost", "revoke")
        assert [harness.committed(group, key) for key in revoked] == [Commit(0)]

    def expel(self, member: Member) -> None:
        """Remove a member from its group; Kafka itself removes a member that does not poll."""

    @pytest.mark.parametrize("reset", ["earliest", "latest"])
    def test_added_partitions_start_at_their_beginning(self, harness: Any, join: Join, group: str, reset: str) -> None:
        topic = harness.new_topic(1)
        member = join(topic, reset=reset)
        until(lambda: member.starts, "the partition is assigned", member)
        harness.grow(topic, 2)
        harness.send(topic, "0", "1", partition=1)
        until(lambda: len(member.records) == 2, "the records of the added partition arrive", member)
        assert member.starts[Partition(topic, 1)] == Commit(0)
        assert harness.committed(group, Partition(topic, 1)) == Commit(0)

    def test_member_with_short_rare_polls_gets_added_partitions(self, harness: Any, join: Join) -> None:
        """The join that the new partitions cause may end between two polls of the member."""
        topic = harness.new_topic(1)
        member = join(topic)
        until(lambda: member.starts, "the partition is assigned", member)
        harness.grow(topic, 2)

        def poll_rarely() -> bool:
            member.poll(0)
            time.sleep(0.1)
            return len(member.starts) == 2

        until(poll_rarely, "both partitions are assigned")

    @pytest.mark.parametrize("reset", ["earliest", "latest"])
    def test_partitions_added_while_the_group_was_empty_start_at_their_beginning(
        self, harness: Any, join: Join, reset: str
    ) -> None:
        topic = harness.new_topic(1)
        before = join(topic, reset=reset)
        until(lambda: before.starts, "the partition is assigned", before)
        before.close()
        harness.grow(topic, 2)
        harness.send(topic, "0", partition=1)
        member = join(topic, reset=reset)
        until(lambda: len(member.starts) == 2, "both partitions are assigned", member)
        until(lambda: member.records, "the record of the added partition arrives", member, seconds=10)
