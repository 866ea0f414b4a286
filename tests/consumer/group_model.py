"""Model of two consumers of a group and their Kafka, for a property test of the work queue."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

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
ROOM = 6
REVOKE_TIMEOUT = 10.0
#: Which of those that run, by number.
FEW = st.sets(st.integers(0, 3))

Place = tuple[Partition, int]


class Node:
    """A process with a consumer: its work queue, its partitions, and its knowledge."""

    def __init__(self, name: str, ordering: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.work_queue = WorkQueue(ordering=ordering, max_in_flight=ROOM, clock=clock, retry=None)
        self.partitions = PartitionTable(self.work_queue, REVOKE_TIMEOUT)
        #: The next offset to poll, in the partitions that it believes to have.
        self.positions: dict[Partition, int] = {}
        self.running: list[WorkItem] = []
        self.finished: set[Place] = set()
        #: A revoke that is not over, and of which partitions; the thread that owns the client waits for it.
        self.revocation: PendingRevocation | None = None
        self.leaving: list[Partition] = []

    def runs(self, keys: list[Partition]) -> list[WorkItem]:
        return [item for item in self.running if item.partition in keys]


def place_of(item: WorkItem) -> Place:
    return item.partition, item.record.offset


class Group(RuleBasedStateMachine):
    """Each rule is something that may happen, in any order; the checks are what is promised."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.logs: dict[Partition, list[DummyRecord]] = {key: [] for key in PARTITIONS}
        self.ends = dict.fromkeys(PARTITIONS, 0)
        self.committed = {key: Commit(0) for key in PARTITIONS}
        #: Who has a partition, as far as Kafka knows.
        self.owners: dict[Partition, Node | None] = dict.fromkeys(PARTITIONS)
        self.finished: set[Place] = set()
        self.started: dict[tuple[Partition, Any], list[int]] = defaultdict(list)
        #: What may run twice: it was running, or finished and not committed, when its partition or process was lost.
        self.excused: set[Place] = set()

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
        """Some offsets hold no record."""
        for record_key, gap in records:
            offset = self.ends[key] + gap
            self.logs[key].append(DummyRecord(*key, offset, record_key, b"value"))
            self.ends[key] = offset + 1

    def poll(self, index: int, limit: int) -> None:
        node = self.nodes[index]
        limit = min(limit, node.work_queue.capacity())
        if node.revocation is not None or not limit:
            return
        held = node.partitions.blocked_partitions()
        for key, position in node.positions.items():
            found = [record for record in self.logs[key] if record.offset >= position][:limit]
            if found and key not in held:
                node.positions[key] = found[-1].offset + 1
                node.partitions.put({key: found})
                return

    # -- workers -------------------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, 1), count=st.integers(1, ROOM))
    def work(self, index: int, count: int) -> None:
        self.poll(index, ROOM)
        for _ in range(count):
            self.take(index)

    @rule(index=st.integers(0, 1))
    def take(self, index: int) -> None:
        node = self.nodes[index]
        item = node.work_queue.get(0)
        if item is not None:
            self.check_start(node, item)
            node.running.append(item)

    @precondition(lambda self: any(node.running for node in self.nodes))
    @rule(index=st.integers(0, 1), which=FEW)
    def finish(self, index: int, which: set[int]) -> None:
        node = self.busy(index)
        for item in [item for number, item in enumerate(node.running) if number in which]:
            self.end_item(node, item)

    @precondition(lambda self: any(node.running for node in self.nodes))
    @rule(index=st.integers(0, 1), which=st.integers(0, 5), how=st.sampled_from(["later", "soon", "bury", "expire"]))
    def fail(self, index: int, which: int, how: str) -> None:
        """It is tried again, or its dead letter cannot be written for now, or it takes too long."""
        node = self.busy(index)
        item = node.running.pop(which % len(node.running))
        if how == "expire":
            assert node.work_queue.time_out(item, TaskTimeout("too long"), item.attempt.outcome)
        elif how == "bury":
            item.attempt.failure = Failure("failed", "", "")
            node.work_queue.retry_dead_letter(item, 1)
        else:
            node.work_queue.requeue(item, 20 if how == "later" else 0)

    def busy(self, index: int) -> Node:
        """A consumer that works on something: that one, if it does."""
        return self.nodes[index] if self.nodes[index].running else self.nodes[1 - index]

    def end_item(self, node: Node, item: WorkItem, failing: bool = False) -> None:
        node.running.remove(item)
        if failing:
            node.work_queue.requeue(item, 1)
            return
        node.work_queue.task_done(item)
        node.finished.add(place_of(item))
        self.finished.add(place_of(item))

    @rule(seconds=st.sampled_from([2, 11, 30]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    # -- the group -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: None in self.owners.values())
    @rule(index=st.integers(0, 1), only=st.sampled_from([None, *PARTITIONS]))
    def assign(self, index: int, only: Partition | None) -> None:
        """Partitions that nobody has go to a consumer: to the one that had them, or to the other one."""
        node = self.nodes[index]
        free = [key for key, owner in self.owners.items() if owner is None and only in (None, key)]
        if node.revocation is None and self.is_member(node):
            for key in free:
                self.owners[key] = node
                node.positions[key] = self.committed[key].offset
            node.partitions.on_assign({key: self.committed[key] for key in free})

    @rule(index=st.integers(0, 1))
    def commit(self, index: int) -> None:
        node = self.nodes[index]
        if node.revocation is None:
            commits = node.partitions.commits()
            if self.accepts(node, commits):
                node.partitions.mark_committed(commits)
                self.check_all_is_committed(node, list(node.positions))

    @rule(index=st.integers(0, 1), only=st.sampled_from([None, *PARTITIONS]))
    def revoke(self, index: int, only: Partition | None) -> None:
        """All partitions, as an eager rebalance does, or one, as a cooperative one does."""
        node = self.nodes[index]
        if node.revocation is None and node.positions:
            node.leaving = [key for key in node.positions if only in (None, key)]
            node.revocation = node.partitions.on_revoke(node.leaving)

    @precondition(lambda self: any(node.revocation for node in self.nodes))
    @rule(index=st.integers(0, 1), acknowledged=st.booleans(), failing=st.none() | FEW)
    def end_revoke(self, index: int, acknowledged: bool, failing: set[int] | None) -> None:
        """The drain is over, if it is, or because all that runs ends: some of it is to be tried again."""
        node = self.nodes[index]
        revocation, leaving = node.revocation, node.leaving
        if revocation is None:
            return
        awaited = [item for item in node.runs(leaving) if item.tracker in revocation._leaving.values()]
        if failing is not None:
            for number, item in enumerate(awaited):
                self.end_item(node, item, number in failing)
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
        self.excused |= {place_of(item) for item in node.runs(leaving)}
        self.forget(node, leaving)

    @rule(
        index=st.integers(0, 1),
        only=st.sampled_from([None, *PARTITIONS]),
        acknowledged=st.booleans(),
        failing=FEW,
        back=st.booleans(),
    )
    def move(self, index: int, only: Partition | None, acknowledged: bool, failing: set[int], back: bool) -> None:
        """What one consumer has goes to the other one, or comes back, without a hurry."""
        self.revoke(index, only)
        self.end_revoke(index, acknowledged, failing)
        self.assign(index if back else 1 - index, only)

    @rule(index=st.integers(0, 1), what=st.sampled_from(["expel", "kill", "stop", "hang"]))
    def suffer(self, index: int, what: str) -> None:
        if what == "expel":
            self.expel(index)
        elif what == "kill":
            self.kill(index)
        else:
            self.stop(index, what == "hang")

    def expel(self, index: int) -> None:
        """Kafka gives up on a consumer, which does not know yet."""
        node = self.nodes[index]
        gone = [key for key, owner in self.owners.items() if owner is node]
        self.excuse_uncommitted(node, gone)
        self.excused |= {place_of(item) for item in node.runs(gone)}
        for key in gone:
            self.owners[key] = None

    @precondition(lambda self: not all(self.is_member(node) for node in self.nodes))
    @rule(index=st.integers(0, 1))
    def notice(self, index: int) -> None:
        """It learns that it was expelled."""
        node = self.nodes[index]
        lost = [key for key in node.positions if self.owners[key] is not node]
        if lost and node.revocation is None:
            node.partitions.on_lost(lost)
            self.forget(node, lost)

    def kill(self, index: int) -> None:
        node = self.nodes[index]
        self.expel(index)
        self.nodes[index] = self.new_node(node.name)

    def stop(self, index: int, hang: bool) -> None:
        """A consumer ends in order; what hangs is handed back after a while."""
        node = self.nodes[index]
        if node.revocation is not None:
            return
        node.work_queue.close()
        assert node.work_queue.get(0) is None
        for item in list(node.running)[hang:]:
            self.end_item(node, item)
        for item in node.running:
            assert node.work_queue.abandon(item.attempt)
        commits = node.partitions.commits()
        if self.accepts(node, commits):
            self.check_all_is_committed(node, list(node.positions))
        self.forget(node, list(node.positions))
        self.nodes[index] = self.new_node(node.name)

    def is_member(self, node: Node) -> bool:
        """Whether it was not expelled: it learns of all or nothing."""
        return all(self.owners[key] is node for key in node.positions)

    def forget(self, node: Node, keys: list[Partition]) -> None:
        for key in keys:
            del node.positions[key]
            if self.owners[key] is node:
                self.owners[key] = None

    def excuse_uncommitted(self, node: Node, keys: list[Partition]) -> None:
        self.excused |= {place for place in node.finished if place[0] in keys and not self.is_covered(place)}

    def accepts(self, node: Node, commits: dict[Partition, Commit]) -> bool:
        """Kafka takes a commit from a member alone."""
        if not self.is_member(node):
            return False
        for key, commit in commits.items():
            unfinished = [r.offset for r in self.logs[key] if (key, r.offset) not in self.finished]
            assert commit.offset <= min(unfinished, default=self.ends[key]), "committed what is not finished"
            assert not [offset for offset in unfinished if offset in decode(commit)], "said to be finished and is not"
            assert commit.offset >= self.committed[key].offset, "the group went back"
        self.committed.update(commits)
        self.excused -= {place for place in self.excused if self.is_covered(place)}
        return True

    # -- what has to hold ----------------------------------------------------------------------------------------------

    def is_covered(self, place: Place) -> bool:
        key, offset = place
        return offset < self.committed[key].offset or offset in decode(self.committed[key])

    def check_all_is_committed(self, node: Node, keys: list[Partition]) -> None:
        missing = {place for place in node.finished if place[0] in keys and not self.is_covered(place)}
        assert not missing, f"finished, and unknown to the next owner: {missing}"

    def check_start(self, node: Node, item: WorkItem) -> None:
        place = place_of(item)
        assert place not in node.finished, "a consumer runs again what it has finished"
        assert place not in map(place_of, node.running), "a consumer runs the same record twice at once"
        if self.owners[item.partition] is not node:
            # It was expelled and does not know: the partition may be somebody else's already.
            self.excused.add(place)
        if place not in self.excused:
            assert place not in self.finished, "finished twice"
            for other in self.nodes:
                assert place not in map(place_of, other.running), "runs in two consumers"
        self.check_order(node, item)

    def check_order(self, node: Node, item: WorkItem) -> None:
        key, offset = place_of(item)
        lane = self.lane_of(item.record)
        if lane is None:
            return
        before = [r.offset for r in self.logs[key] if r.offset < offset and self.lane_of(r) == lane]
        assert {(key, each) for each in before} <= self.finished, "it overtakes another one of its lane"
        if offset not in self.started[key, lane]:
            self.started[key, lane].append(offset)
        assert self.started[key, lane] == sorted(self.started[key, lane]), "not in the log's order"
        for other in self.nodes:
            for running in other.running:
                if running.partition == key and self.lane_of(running.record) == lane:
                    # Left over from a drain that took too long, or from before a loss.
                    left_over = running.tracker.revoked or self.owners[key] is not other
                    assert left_over or self.owners[key] is not node, "two of a lane at once"

    def lane_of(self, record: Any) -> Any:
        return {"key": record.key, "partition": "all"}.get(self.ordering)

    @invariant()
    def room_is_neither_lost_nor_gained(self) -> None:
        for node in getattr(self, "nodes", ()):
            unfinished = sum(len(node.partitions._trackers[key].unfinished) for key in node.partitions.assignment)
            assert node.work_queue.in_flight + node.work_queue.lanes.delayed_count == unfinished
            assert node.partitions.assignment == node.positions.keys() - set(node.leaving)

    def teardown(self) -> None:
        """In the end one consumer has everything, and time to finish it."""
        if not hasattr(self, "nodes"):
            return
        self.stop(1, False)
        self.kill(1)
        for _ in range(2):
            self.end_revoke(0, True, set())
            self.notice(0)
        self.assign(0, None)
        node = self.nodes[0]
        for _ in range(10_000):
            self.poll(0, ROOM)
            self.take(0)
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
        everything = {(key, record.offset) for key, log in self.logs.items() for record in log}
        assert everything <= self.finished, f"lost: {everything - self.finished}"
        self.commit(0)
        assert self.committed == {key: Commit(end) for key, end in self.ends.items()}
        assert node.work_queue.capacity() == ROOM
