"""Tests of each Kafka clients on Apache Kafka: the client contract, and faults that only a real broker has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from kser.consumer.client import Commit, Partition
from kser.errors import ClientError, ClientFenced
from tests.kafka.broker import Kafka, KafkaBroker
from tests.kafka.helpers import needs_next_protocol, wait_until
from tests.support import lines
from tests.transports.client_contract import BrokerHarness, Join, Member, until
from tests.transports.group_contract import GroupContract
from tests.transports.harness import ConfluentHarness, KafkaHarness, PythonKafkaHarness, new_name

# kafka-python leaves the sockets of connections that were refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


#: Seconds that a commit or a close with a short timeout may take; the request timeout of the clients is 30 s or more.
REQUEST_SECONDS = 5


class OnKafka(KafkaHarness):
    """Harness of the client contract on Apache Kafka."""

    def __init__(self, kafka: Kafka) -> None:
        super().__init__(kafka.bootstrap_servers)
        self.kafka = kafka
        self.topics: list[str] = []

    def new_topic(self, partitions: int = 1) -> str:
        return self.make_topic(new_name(), partitions)

    def make_topic(self, name: str, partitions: int = 1) -> str:
        """Create a topic; the fixture deletes it after the test."""
        self.kafka.create_topic(name, partitions)
        self.topics.append(name)
        return name

    def grow(self, topic: str, partitions: int) -> None:
        self.kafka.grow_topic(topic, partitions)

    def create_again(self, topic: str, partitions: int = 1) -> None:
        self.kafka.delete_topic(topic)
        # The broker deletes a topic in the background.
        admin = AdminClient({"bootstrap.servers": self.servers})

        def is_created() -> bool:
            (created,) = admin.create_topics([NewTopic(topic, partitions, 1)]).values()
            with suppress(confluent_kafka.KafkaException):
                created.result(15)
                return True
            return False

        wait_until(is_created, "the topic is created again")
        # The old producer knows the partitions of the old topic.
        self._producer = confluent_kafka.Producer({"bootstrap.servers": self.servers, "linger.ms": 0, "log_level": 0})

    def delete_before(self, key: Partition, offset: int) -> None:
        """Delete the records of a partition below an offset, as the broker does after their retention time."""
        admin = AdminClient({"bootstrap.servers": self.servers})
        (done,) = admin.delete_records([confluent_kafka.TopicPartition(*key, offset)]).values()
        done.result(15)

    def send_in_transactions(self, key: Partition, *batches: list[str]) -> None:
        """Send each batch in a transaction of its own."""
        options = {"bootstrap.servers": self.servers, "transactional.id": new_name()}
        producer = confluent_kafka.Producer(options)
        producer.init_transactions(15)
        for values in batches:
            producer.begin_transaction()
            for value in values:
                producer.produce(key.topic, value, partition=key.partition)
            producer.commit_transaction(15)

    def abort_transaction(self, key: Partition, *values: str) -> None:
        """Send records in a transaction that is aborted."""
        producer = confluent_kafka.Producer({"bootstrap.servers": self.servers, "transactional.id": new_name()})
        producer.init_transactions(15)
        producer.begin_transaction()
        for value in values:
            producer.produce(key.topic, value, partition=key.partition)
        producer.flush(15)
        producer.abort_transaction(15)


class PythonKafka(OnKafka, PythonKafkaHarness):
    pass


class Confluent(OnKafka, ConfluentHarness):
    pass


class ConfluentNextProtocol(Confluent):
    """Clients of confluent-kafka in groups with the group protocol ``consumer`` (KIP-848)."""

    eager = False


both = pytest.mark.parametrize("kind", [PythonKafka, Confluent])


class TestClientsOnKafka(GroupContract):
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test with both clients, and the tests of groups also with the group protocol ``consumer``."""
        of_groups = metafunc.function.__name__ in vars(GroupContract)
        next_protocol = pytest.param(ConfluentNextProtocol, marks=needs_next_protocol)
        metafunc.parametrize("kind", [PythonKafka, Confluent, *[next_protocol] * of_groups])

    @pytest.fixture
    def harness(self, kind: type[OnKafka], kafka: Kafka) -> Iterator[BrokerHarness]:
        harness = kind(kafka)
        yield harness
        for topic in harness.topics:
            kafka.delete_topic(topic)

    # -- positions that are out of range -------------------------------------------------------------------------------

    @pytest.mark.parametrize(("reset", "start"), [("earliest", 5), ("latest", 8)])
    def test_deleted_records_are_logged_and_the_rest_is_consumed(
        self, harness: OnKafka, join: Join, key: Partition, reset: str, start: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        harness.send(key.topic, *map(str, range(8)))
        before = join(key.topic)
        until(lambda: key in before.starts, "the partition is assigned", before)
        before.client.commit({key: Commit(2, "kser:1,1")}, 5)
        before.close()
        harness.delete_before(key, 5)
        member = join(key.topic, reset=reset)
        until(lambda: member.starts.get(key) == Commit(start), "its position is reset", member)
        assert [event for event, _ in member.events] == ["assign", "reset"]
        text = f"{key}: the position 2 is out of range (5 to 8): offsets 2 to 4 were deleted before they were handled"
        assert [line for line in lines(caplog) if line.startswith(text)]
        assert [record.levelname for record in caplog.records if record.getMessage().startswith(text)] == ["ERROR"]
        harness.send(key.topic, "8")
        until(lambda: "8" in member.values(), "the last record arrives", member)
        assert member.values() == [str(number) for number in range(start, 9)]

    def test_truncated_log_is_logged_and_consumed_from_its_beginning(
        self, harness: OnKafka, join: Join, key: Partition, caplog: pytest.LogCaptureFixture
    ) -> None:
        harness.send(key.topic, "0", "1", "2")
        before = join(key.topic)
        until(lambda: key in before.starts, "the partition is assigned", before)
        before.client.commit({key: Commit(50)}, 5)
        before.close()
        member = join(key.topic)
        until(lambda: len(member.records) == 3, "all records arrive", member)
        assert member.starts == {key: Commit(0)}
        assert f"{key}: the position 50 is out of range (0 to 3): offsets 3 to 49 are not in the log" in caplog.text

    def test_records_deleted_while_consuming_are_logged(
        self, harness: OnKafka, join: Join, key: Partition, caplog: pytest.LogCaptureFixture
    ) -> None:
        member = join(key.topic)
        until(lambda: key in member.starts, "the partition is assigned", member)
        harness.send(key.topic, "0")
        until(lambda: member.records, "the first record arrives", member)
        for _ in range(3):
            member.poll(limit=0)
        harness.send(key.topic, *map(str, range(1, 9)))
        harness.delete_before(key, 6)
        harness.send(key.topic, "9")
        until(lambda: "9" in member.values(), "the last record arrives", member)
        values = [int(value) for value in member.values()]
        assert values == sorted(values) and {0, 6, 7, 8, 9} <= set(values)
        if len(values) < 10:
            assert "out of range" in caplog.text, "skipped records are logged"

    # -- revocations ---------------------------------------------------------------------------------------------------

    def test_finished_records_are_committed_before_waiting_for_running_ones(
        self, harness: OnKafka, join: Join, group: str, kind: type[OnKafka]
    ) -> None:
        if kind is PythonKafka:
            pytest.skip("kafka-python blocks in its rebalance callback, and only librdkafka can commit meanwhile")
        topic = harness.new_topic(2)
        first = join(topic)
        until(lambda: len(first.starts) == 2, "the first member has both partitions", first)
        first.finished = dict.fromkeys(first.starts, Commit(0, "kser:1,2"))
        commits_before_the_end: list[Commit | None] = []

        def end() -> None:
            # Without an eager rebalance, only one of the two partitions moves.
            commits = {harness.committed(group, Partition(topic, number)) for number in range(2)}
            commits_before_the_end.extend(commits - {Commit(0)})
            first.drained.set()

        first.drained.clear()
        second = join(topic)
        until(lambda: second.starts, "both members have a partition", second, *self.drain_later(first, end))
        assert commits_before_the_end == [Commit(0, "kser:1,2")]

    # -- membership ----------------------------------------------------------------------------------------------------

    def test_member_whose_instance_id_is_taken_is_fenced(
        self, harness: OnKafka, join: Join, kind: type[OnKafka]
    ) -> None:
        topic = harness.new_topic()
        instance = {"group_instance_id" if kind is PythonKafka else "group.instance.id": "shop-1"}
        first = join(topic, **instance)
        until(lambda: first.starts, "the first member has the partition", first)
        second = join(topic, **instance)
        with pytest.raises(ClientFenced, match="'shop-1'"):
            until(lambda: False, "the first member is fenced", second, first)
        until(lambda: second.starts and second.client.is_member(), "the second member has the partition", second)
        assert not first.client.is_member()

    @pytest.mark.parametrize("event", ["on_assign", "on_reset", "on_revoke"])
    def test_error_of_the_library_in_a_rebalance_callback_is_a_client_error(
        self, harness: OnKafka, join: Join, kind: type[OnKafka], event: str
    ) -> None:
        if kind is PythonKafka:
            pytest.skip("only librdkafka's Python client raises objects that no except clause catches")

        def fail(_: object) -> Any:
            raise KafkaException(KafkaError(KafkaError._STATE))

        topic = harness.new_topic(2)
        member = join(topic)
        if event == "on_revoke":
            until(lambda: member.starts, "the partitions are assigned", member)
            setattr(member, event, fail)
            harness.grow(topic, 3)
        setattr(member, event, fail)
        with pytest.raises(ClientError, match="Erroneous state"):
            until(lambda: False, "a rebalance fails", member)

    # -- gaps in the log -----------------------------------------------------------------------------------------------

    def test_transaction_markers_do_not_count_as_lag(self, harness: OnKafka, join: Join, key: Partition) -> None:
        harness.send_in_transactions(key, ["0", "1"], ["2"])
        member = join(key.topic)
        until(lambda: len(member.records) == 3, "all records arrive", member)
        assert [record.offset for record in member.records] == [0, 1, 3]
        until(lambda: member.client.lag()[key] == 0, "the lag is 0", member)

    def test_positions_pass_markers_and_aborted_records(
        self, harness: OnKafka, join: Join, key: Partition, kind: type[OnKafka]
    ) -> None:
        isolation = {"isolation_level" if kind is PythonKafka else "isolation.level": "read_committed"}
        member = join(key.topic, **isolation)
        harness.send_in_transactions(key, ["0", "1"])
        until(lambda: member.client.positions().get(key) == 3, "the position passes the marker", member)
        harness.abort_transaction(key, "2", "3", "4")
        until(lambda: member.client.positions().get(key) == 7, "the position passes the aborted records", member)
        assert member.values() == ["0", "1"]

    # -- missing topics ------------------------------------------------------------------------------------------------

    def test_missing_topic_is_awaited(self, harness: OnKafka, join: Join) -> None:
        name = new_name()
        member = join(name)
        member.tolerates_errors = True
        for _ in range(10):
            assert member.poll() == []
        harness.make_topic(name)
        harness.send(name, "0")
        until(lambda: member.values() == ["0"], "the record arrives", member)


@both
class TestBrokerFailures:
    """Tests of each client with a broker that fails."""

    @pytest.fixture
    def member(self, kind: type[OnKafka], own_kafka: KafkaBroker) -> Iterator[Member]:
        own_kafka.create_topic("work")
        self.harness = kind(own_kafka)
        self.harness.send("work", "0")
        member = Member(self.harness.client("group"), "work")
        with closing(member):
            until(lambda: member.records, "the first record arrives", member)
            member.tolerates_errors = True
            yield member

    def test_client_reconnects_to_a_restarted_broker(self, own_kafka: KafkaBroker, member: Member) -> None:
        own_kafka.kill()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            member.poll()
        with pytest.raises(ClientError):
            member.client.commit({Partition("work", 0): Commit(1)}, 0.5)
        own_kafka.start()
        self.harness.send("work", "1")
        until(lambda: "1" in member.values(), "the second record arrives", member)
        until(lambda: try_commit(member, Commit(1, "kser:0,1")), "the commit succeeds", member)
        assert self.harness.committed("group", Partition("work", 0)) == Commit(1, "kser:0,1")
        assert member.values() in (["0", "1"], ["0", "0", "1"])

    def test_hanging_broker_delays_neither_commit_nor_close(self, own_kafka: KafkaBroker, member: Member) -> None:
        assert own_kafka.pid is not None
        os.kill(own_kafka.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: process_state(own_kafka.pid) == "T", "the broker is stopped")
            started_at = time.monotonic()
            with pytest.raises(ClientError):
                member.client.commit({Partition("work", 0): Commit(1)}, 0.5)
            assert time.monotonic() - started_at < REQUEST_SECONDS
            started_at = time.monotonic()
            member.client.close(1)
            member.closed = True
            assert time.monotonic() - started_at < REQUEST_SECONDS
        finally:
            os.kill(own_kafka.pid, signal.SIGCONT)


def process_state(pid: int | None) -> str:
    """Return the state of a process as a letter of /proc; T stands for a stopped process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def try_commit(member: Member, commit: Commit) -> bool:
    """Commit an offset; return whether the commit has succeeded."""
    try:
        member.client.commit({Partition("work", 0): commit}, 1)
    except ClientError:
        return False
    return True
