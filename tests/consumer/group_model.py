"""Model of two consumers of a group and their Kafka, for a property test of the work queue."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kser.attempt import Failure
from kser.consumer.client import Commit, Partition
from kser.consumer.offsets import decode
from kser.consumer.partition_table import PartitionTable, PendingRevocation
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import ORDERINGS, WorkQueue
from kser.dummy.broker import DummyRecord
from kser.errors import TaskTimeout

PARTITIONS = [Partition("dice", number) for number in range(2)]
KEYS = [None, b"a", b"b"]
MAX_IN_FLIGHT = 6
REVOKE_TIMEOUT = 10.0
#: Indexes of some running records.
SOME_INDEXES = st.sets(st.integers(0, 3))


class Position(NamedTuple):
    """The partition and the offset of a record."""

    partition: Partition
    offset: int


class Node:
    """A consumer process: its work queue, its partitions, and its view of the group."""

    def __init__(self, name: str, ordering: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.work_queue = WorkQueue(ordering=ordering, max_in_flight=MAX_IN_FLIGHT, clock=clock, retry=None)
        self.partitions = PartitionTable(self.work_queue, REVOKE_TIMEOUT)
        #: The next offset to fetch of each partition that the process believes to own.
        self.positions: dict[Partition, int] = {}
        self.running: list[WorkItem] = []
        self.finished: set[Position] = set()
        #: The pending revocation, during which the client thread is blocked, and its partitions.
        self.revocation: PendingRevocation | None = None
        self.leaving: list[Partition] = []

    def running_of(self, partitions: list[Partition]) -> list[WorkItem]:
        """Return the running records of some partitions."""
        return [item for item in self.running if item.partition in partitions]


def position_of(item: WorkItem) -> Position:
    """Return the position of a record."""
    return Position(item.partition, item.record.offset)


class Group(RuleBasedStateMachine):
    """A consumer group and its Kafka: the rules are events in any order, the checks are the promises of a consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.logs: dict[Partition, list[DummyRecord]] = {key: [] for key in PARTITIONS}
        self.ends = dict.fromkeys(PARTITIONS, 0)
        self.committed = {key: Commit(0) for key in PARTITIONS}
        #: The owner of each partition according to Kafka.
        self.owners: dict[Partition, Node | None] = dict.fromkeys(PARTITIONS)
        self.finished: set[Position] = set()
        self.started: dict[tuple[Partition, Any], list[int]] = defaultdict(list)
        #: Records that may run twice: they were running, or finished and uncommitted, when their partition was lost.
        self.excused: set[Position] = set()

    @initialize(ordering=st.sampled_from(ORDERINGS))
    def start(self, ordering: str) -> None:
        self.ordering = ordering
        self.nodes = [self.new_node("one"), self.new_node("two")]

    def new_node(self, name: str) -> Node:
        return Node(name, self.ordering, lambda: self.now)

    # -- records -------------------------------------------------------------------------------------------------------

    @rule(
        key=st.sampled_from(PARTITIONS),
        records=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from([0, 0, 0, 2])), min_size=1, max_size=5),
    )
    def send(self, key: Partition, records: list[tuple[bytes | None, int]]) -> None:
        """Append records to a partition, some of them behind a gap in the offsets."""
        for record_key, gap in records:
            offset = self.ends[key] + gap
            self.logs[key].append(DummyRecord(*key, offset, record_key, b"value"))
            self.ends[key] = offset + 1

    def poll(self, index: int) -> None:
        """Fetch records of one partition, as many as the work queue accepts."""
        node = self.nodes[index]
        limit = min(MAX_IN_FLIGHT, node.work_queue.capacity())
        if node.revocation is not None or not limit:
            return
        blocked = node.partitions.blocked_partitions()
        for key, position in node.positions.items():
            records = [record for record in self.logs[key] if record.offset >= position][:limit]
            if records and key not in blocked:
                node.positions[key] = records[-1].offset + 1
                node.partitions.put({key: records})
                return

    # -- workers -------------------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, 1), count=st.integers(1, MAX_IN_FLIGHT))
    def poll_and_start(self, index: int, count: int) -> None:
        """Fetch records and start several."""
        self.poll(index)
        for _ in range(count):
            self.start_next(index)

    @rule(index=st.integers(0, 1))
    def start_next(self, index: int) -> None:
        """Start the next record, if one is ready."""
        node = self.nodes[index]
        item = node.work_queue.get(0)
        if item is not None:
            self.check_start(node, item)
            node.running.append(item)

    @precondition(lambda self: any(node.running for node in self.nodes))
    @rule(index=st.integers(0, 1), which=SOME_INDEXES)
    def finish(self, index: int, which: set[int]) -> None:
        """Finish some running records."""
        node = self.busy_node(index)
        for item in [item for number, item in enumerate(node.running) if number in which]:
            self.end_attempt(node, item)

    @precondition(lambda self: any(node.running for node in self.nodes))
    @rule(
        index=st.integers(0, 1),
        which=st.integers(0, 5),
        outcome=st.sampled_from(["delayed retry", "immediate retry", "unwritten dead letter", "timeout"]),
    )
    def fail(self, index: int, which: int, outcome: str) -> None:
        """Fail a running record."""
        node = self.busy_node(index)
        item = node.running.pop(which % len(node.running))
        if outcome == "timeout":
            assert node.work_queue.time_out(item, TaskTimeout("too long"), item.attempt.outcome)
        elif outcome == "unwritten dead letter":
            item.attempt.failure = Failure("failed", "", "")
            node.work_queue.retry_dead_letter(item, 1)
        else:
            node.work_queue.requeue(item, 20 if outcome == "delayed retry" else 0)

    def busy_node(self, index: int) -> Node:
        """Return the node with this index if it runs a record, otherwise the other node."""
        return self.nodes[index] if self.nodes[index].running else self.nodes[1 - index]

    def end_attempt(self, node: Node, item: WorkItem, failing: bool = False) -> None:
        """End a running attempt: finish its record, or schedule a retry."""
        node.running.remove(item)
        if failing:
            node.work_queue.requeue(item, 1)
            return
        node.work_queue.task_done(item)
        node.finished.add(position_of(item))
        self.finished.add(position_of(item))

    @rule(seconds=st.sampled_from([2, 11, 30]))
    def pass_time(self, seconds: float) -> None:
        """Advance the clock of all nodes."""
        self.now += seconds

    # -- the group -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: None in self.owners.values())
    @rule(index=st.integers(0, 1), only=st.sampled_from([None, *PARTITIONS]))
    def assign(self, index: int, only: Partition | None) -> None:
        """Assign partitions without an owner to a node."""
        node = self.nodes[index]
        free = [key for key, owner in self.owners.items() if owner is None and only in (None, key)]
        if node.revocation is None and self.is_member(node):
            for key in free:
                self.owners[key] = node
                node.positions[key] = self.committed[key].offset
            node.partitions.on_assign({key: self.committed[key] for key in free})

    @rule(index=st.integers(0, 1))
    def commit(self, index: int) -> None:
        """Commit the finished records of a node, if it is a member of the group."""
        node = self.nodes[index]
        if node.revocation is None:
            commits = node.partitions.commits()
            if self.accepts(node, commits):
                node.partitions.mark_committed(commits)
                self.check_all_is_committed(node, list(node.positions))

    @rule(index=st.integers(0, 1), only=st.sampled_from([None, *PARTITIONS]))
    def revoke(self, index: int, only: Partition | None) -> None:
        """Start to revoke all partitions, as an eager rebalance does, or one, as a cooperative rebalance may."""
        node = self.nodes[index]
        if node.revocation is None and node.positions:
            node.leaving = [key for key in node.positions if only in (None, key)]
            node.revocation = node.partitions.on_revoke(node.leaving)

    @precondition(lambda self: any(node.revocation for node in self.nodes))
    @rule(index=st.integers(0, 1), acknowledged=st.booleans(), failing=st.none() | SOME_INDEXES)
    def end_revoke(self, index: int, acknowledged: bool, failing: set[int] | None) -> None:
        """Complete a pending revocation.

        :param acknowledged: whether its commit succeeds.
        :param failing: the indexes of the running records that fail, while the others finish; None if all continue to
            run, so that the revocation completes only if it is drained.
        """
        node = self.nodes[index]
        revocation, leaving = node.revocation, node.leaving
        if revocation is None:
            return
        awaited = [item for item in node.running_of(leaving) if item.tracker in revocation._leaving.values()]
        if failing is not None:
            for number, item in enumerate(awaited):
                self.end_attempt(node, item, number in failing)
        elif not revocation.drained:
            return
        else:
            assert not awaited or self.now >= revocation._deadline
        assert revocation.drained
        commits = dict(revocation.commits())
        node.revocation, node.leaving = None, []
        if acknowledged and self.accepts(node, commits):
            self.check_all_is_committed(node, leaving)
        else:
            self.excuse_uncommitted(node, leaving)
        self.excused |= {position_of(item) for item in node.running_of(leaving)}
        self.release(node, leaving)

    @rule(
        index=st.integers(0, 1),
        only=st.sampled_from([None, *PARTITIONS]),
        acknowledged=st.booleans(),
        failing=SOME_INDEXES,
        back=st.booleans(),
    )
    def rebalance(self, index: int, only: Partition | None, acknowledged: bool, failing: set[int], back: bool) -> None:
        """Complete a rebalance: the partitions of a node move to the other node, or return."""
        self.revoke(index, only)
        self.end_revoke(index, acknowledged, failing)
        self.assign(index if back else 1 - index, only)

    @rule(index=st.integers(0, 1), fault=st.sampled_from(["expel", "kill", "stop", "hang"]))
    def end_membership(self, index: int, fault: str) -> None:
        """End the membership of a node, by its own shutdown or by a fault."""
        if fault == "expel":
            self.expel(index)
        elif fault == "kill":
            self.kill(index)
        else:
            self.stop(index, fault == "hang")

    def expel(self, index: int) -> None:
        """Remove a node from the group without its knowledge."""
        node = self.nodes[index]
        lost = [key for key, owner in self.owners.items() if owner is node]
        self.excuse_uncommitted(node, lost)
        self.excused |= {position_of(item) for item in node.running_of(lost)}
        for key in lost:
            self.owners[key] = None

    @precondition(lambda self: not all(self.is_member(node) for node in self.nodes))
    @rule(index=st.integers(0, 1))
    def notice_loss(self, index: int) -> None:
        """Let an expelled node learn that its partitions are lost."""
        node = self.nodes[index]
        lost = [key for key in node.positions if self.owners[key] is not node]
        if lost and node.revocation is None:
            node.partitions.on_lost(lost)
            self.release(node, lost)

    def kill(self, index: int) -> None:
        """Kill a node and start a new one."""
        node = self.nodes[index]
        self.expel(index)
        self.nodes[index] = self.new_node(node.name)

    def stop(self, index: int, hang: bool) -> None:
        """Shut a node down gracefully and start a new one.

        :param hang: whether one task does not end, so that its attempt is abandoned.
        """
        node = self.nodes[index]
        if node.revocation is not None:
            return
        node.work_queue.close()
        assert node.work_queue.get(0) is None
        for item in list(node.running)[hang:]:
            self.end_attempt(node, item)
        for item in node.running:
            assert node.work_queue.abandon(item.attempt)
        commits = node.partitions.commits()
        if self.accepts(node, commits):
            self.check_all_is_committed(node, list(node.positions))
        self.release(node, list(node.positions))
        self.nodes[index] = self.new_node(node.name)

    def is_member(self, node: Node) -> bool:
        """Return whether a node was not expelled: a node that was expelled has lost all its partitions."""
        return all(self.owners[key] is node for key in node.positions)

    def release(self, node: Node, keys: list[Partition]) -> None:
        """Remove partitions from a node."""
        for key in keys:
            del node.positions[key]
            if self.owners[key] is node:
                self.owners[key] = None

    def uncommitted(self, node: Node, keys: list[Partition]) -> set[Position]:
        """Return the records of some partitions that a node has finished and the group does not know as finished."""
        return {at for at in node.finished if at.partition in keys and not self.is_committed(at)}

    def excuse_uncommitted(self, node: Node, keys: list[Partition]) -> None:
        """Allow the uncommitted records of some partitions to run twice."""
        self.excused |= self.uncommitted(node, keys)

    def accepts(self, node: Node, commits: dict[Partition, Commit]) -> bool:
        """Check and store a commit, if the node is a member of the group; return whether it is one."""
        if not self.is_member(node):
            return False
        for key, commit in commits.items():
            unfinished = [r.offset for r in self.logs[key] if (key, r.offset) not in self.finished]
            assert commit.offset <= min(unfinished, default=self.ends[key]), "an unfinished record is committed"
            assert not [offset for offset in unfinished if offset in decode(commit)], "unfinished, but in the metadata"
            assert commit.offset >= self.committed[key].offset, "the committed offset decreases"
        self.committed.update(commits)
        self.excused -= {position for position in self.excused if self.is_committed(position)}
        return True

    # -- the promises --------------------------------------------------------------------------------------------------

    def is_committed(self, position: Position) -> bool:
        """Return whether the committed offset or its metadata contains a record."""
        commit = self.committed[position.partition]
        return position.offset < commit.offset or position.offset in decode(commit)

    def check_all_is_committed(self, node: Node, keys: list[Partition]) -> None:
        """Check that the group knows all finished records of some partitions."""
        missing = self.uncommitted(node, keys)
        assert not missing, f"finished, and unknown to the next owner: {missing}"

    def check_start(self, node: Node, item: WorkItem) -> None:
        """Check that a record may start in a node now."""
        position = position_of(item)
        assert position not in node.finished, "a consumer starts a record that it has finished"
        assert position not in map(position_of, node.running), "a consumer runs a record twice at once"
        if self.owners[item.partition] is not node:
            # The node does not know yet that it was expelled, so another node may already own the partition.
            self.excused.add(position)
        if position not in self.excused:
            assert position not in self.finished, "a finished record starts again"
            for other in self.nodes:
                assert position not in map(position_of, other.running), "a record runs in two consumers"
        self.check_order(node, item)

    def check_order(self, node: Node, item: WorkItem) -> None:
        """Check that the records of a lane run in order, one at a time."""
        key, offset = position_of(item)
        lane = self.lane_of(item.record)
        if lane is None:
            return
        before = {r.offset for r in self.logs[key] if r.offset < offset and self.lane_of(r) == lane}
        assert {Position(key, earlier) for earlier in before} <= self.finished, "a record overtakes one of its lane"
        if offset not in self.started[key, lane]:
            self.started[key, lane].append(offset)
        assert self.started[key, lane] == sorted(self.started[key, lane]), "the lane is not in the order of the log"
        for other in self.nodes:
            for running in other.running:
                if running.partition == key and self.lane_of(running.record) == lane:
                    # The attempt exceeded the revoke timeout, or started before the partition was lost.
                    left_over = running.tracker.revoked or self.owners[key] is not other
                    assert left_over or self.owners[key] is not node, "two records of a lane run at once"

    def lane_of(self, record: Any) -> Any:
        """Return the lane of a record within its partition; None if it has none."""
        return {"key": record.key, "partition": "all"}.get(self.ordering)

    @invariant()
    def in_flight_count_equals_the_unfinished_records(self) -> None:
        for node in getattr(self, "nodes", ()):
            unfinished = sum(len(node.partitions._trackers[key].unfinished) for key in node.partitions.assignment)
            assert node.work_queue.in_flight + node.work_queue.lanes.delayed_count == unfinished
            assert node.partitions.assignment == node.positions.keys() - set(node.leaving)

    def teardown(self) -> None:
        """Let one node finish all records at the end, and check that none is lost."""
        if not hasattr(self, "nodes"):
            return
        self.stop(1, False)
        self.kill(1)
        for _ in range(2):
            self.end_revoke(0, True, set())
            self.notice_loss(0)
        self.assign(0, None)
        node = self.nodes[0]
        for _ in range(10_000):
            self.poll(0)
            self.start_next(0)
            self.finish(0, {0}) if node.running else None
            self.now += 1
            polled = all(node.positions[key] >= self.ends[key] for key in PARTITIONS)
            if (
                polled
                and not node.running
                and not any(node.partitions.backlog.values())
                and not node.work_queue.lanes.delayed_count
            ):
                break
        everything = {Position(key, record.offset) for key, log in self.logs.items() for record in log}
        assert everything <= self.finished, f"lost: {everything - self.finished}"
        self.commit(0)
        assert self.committed == {key: Commit(end) for key, end in self.ends.items()}
        assert node.work_queue.capacity() == MAX_IN_FLIGHT
