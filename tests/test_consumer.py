"""The loop that every consumer shares, on the in-memory transport. Signals have a module of their own."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kser import lockfiles
from kser.consumer.base import BaseConsumer, check_commit_mode
from kser.consumer.client import OnRevoke, Partition, Record
from kser.controller import Controller
from kser.dummy.bus import Bus, DummyClient
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.errors import ClientTrouble, SettingError
from tests.support import Clock, lines, message, record_of, records

AT_ONCE = {"enable_auto_commit": False}


class Act(Entrypoint):
    """Does, or raises, what the test put into ``acts`` under its uuid."""

    acts: dict[str, Any] = {}  # noqa: RUF012  emptied after each test
    seen: list[str] = []  # noqa: RUF012

    def run(self) -> None:
        self.seen.append(self.uuid)
        act = self.acts.get(self.uuid)
        if isinstance(act, BaseException):
            raise act
        if act:
            act()


@pytest.fixture(autouse=True)
def bus(caplog: pytest.LogCaptureFixture) -> Iterator[Bus]:
    Controller.register(Act.path, Act)
    caplog.set_level(logging.DEBUG, "kser")
    yield Bus.at("")
    Bus.reset()
    Act.acts.clear()
    Act.seen.clear()


def put(*uuids: str) -> None:
    for uuid in uuids:
        Bus.at("").send("dice", message(Act, uuid=uuid).dumps().encode())


def consumer_of(commit: str = "after", **config: Any) -> Consumer:
    return Consumer(config, ["dice"], commit=commit)


def committed() -> int | None:
    return Bus.at("").committed.get(("dummy", "dice"))


class Client(DummyClient):
    """A transport that gets into the trouble that a test names, and whose partitions may be taken away."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus, "dummy")
        self.trouble: dict[str, str] = {}
        self.polls: list[tuple[float, bool]] = []
        self.closed = 0

    def subscribe(self, topics: Iterable[str], on_revoke: OnRevoke) -> None:
        self._raise("subscribe")
        super().subscribe(topics, on_revoke)
        self.on_revoke = on_revoke

    def poll(self, timeout: float, hold: bool) -> Sequence[Record]:
        self.polls.append((timeout, hold))
        self._raise("poll")
        return super().poll(timeout, hold)

    def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        self._raise("commit")
        super().commit(offsets, timeout)

    def close(self, timeout: float) -> None:
        self.closed += 1

    def _raise(self, activity: str) -> None:
        if activity in self.trouble:
            raise ClientTrouble(self.trouble[activity])


def base_consumer(client: Client, interval: float = 0) -> BaseConsumer:
    return BaseConsumer(client, ["dice"], commit="after", commit_interval=interval)


def put_in_the_way(consumer: BaseConsumer, uuid: str = "1") -> Clock:
    """Let the message with that uuid take two seconds, so that the turn ends behind it."""
    clock = Clock(consumer)
    Act.acts[uuid] = lambda: clock.pass_by(2)
    return clock


# -- commits -----------------------------------------------------------------------------------------------------------


def test_messages_are_handled_in_order_and_counted() -> None:
    put("1", "2", "3")
    consumer = consumer_of()
    assert (consumer.step(timeout=0), consumer.step(timeout=0)) == (3, 0)
    assert Act.seen == ["1", "2", "3"]


@pytest.mark.parametrize(("commit", "seen"), [("after", [None, 1]), ("before", [1, 2])])
def test_at_once_an_offset_is_committed_after_or_before_its_message(commit: str, seen: list[Any]) -> None:
    """D5, D7"""
    offsets: list[Any] = []
    Act.acts["1"] = Act.acts["2"] = lambda: offsets.append(committed())
    put("1", "2")
    consumer_of(commit, **AT_ONCE).step(timeout=0)
    assert offsets == seen
    assert committed() == 2


def test_at_once_every_commit_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    consumer_of(**AT_ONCE).step(timeout=0)
    assert lines(caplog).count("Consumer: Manual commit done.") == 2


def test_in_intervals_offsets_are_committed_when_it_is_time(caplog: pytest.LogCaptureFixture) -> None:
    """D7"""
    consumer = consumer_of(auto_commit_interval_ms=3000)
    clock = Clock(consumer)
    put("1")
    consumer.step(timeout=0)
    clock.pass_by(2.9)
    consumer.step(timeout=0)
    assert committed() is None
    clock.pass_by(0.2)
    consumer.step(timeout=0)
    assert committed() == 1
    assert "Consumer: Manual commit done." not in lines(caplog)


def test_what_is_done_is_committed_at_the_end() -> None:
    """D7"""
    consumer = consumer_of()
    put("1", "2")
    consumer.step(timeout=0)
    assert committed() is None
    consumer.close()
    assert committed() == 2


def test_a_restarted_consumer_goes_on_behind_what_was_committed() -> None:
    put("1")
    first = consumer_of()
    first.run_until_idle()
    first.close()
    put("2")
    consumer_of().run_until_idle()
    assert Act.seen == ["1", "2"]


def test_a_commit_mode_that_is_none_is_refused() -> None:
    with pytest.raises(SettingError, match="commit must be one of 'after', 'before'; it is 'sometimes'"):
        consumer_of("sometimes")
    check_commit_mode("before")


def test_without_a_group_nothing_is_committed_and_that_is_said(caplog: pytest.LogCaptureFixture, bus: Bus) -> None:
    """D18"""
    put("1")
    consumer = Consumer({"group_id": None, **AT_ONCE}, ["dice"])
    consumer.run_until_idle()
    consumer.close()
    assert (Act.seen, bus.committed) == (["1"], {})
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith("Consumer: without group_id no offset can be committed")


# -- what tasks do to the loop -----------------------------------------------------------------------------------------


def test_an_interrupt_ends_it_with_its_message_uncommitted() -> None:
    """C8"""
    Act.acts["2"] = KeyboardInterrupt()
    put("1", "2", "3")
    with pytest.raises(KeyboardInterrupt):
        consumer_of().run()
    assert (Act.seen, committed()) == (["1", "2"], 1)
    assert Path(os.environ["RUNNING_FILE"]).read_text() == ""


@pytest.mark.parametrize("error", [SystemExit(1), SystemExit(), ValueError("x")])
def test_a_task_that_wants_out_fails_alone(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """C8"""
    Act.acts["1"] = error
    put("1", "2")
    assert consumer_of(**AT_ONCE).step(timeout=0) == 2
    assert (Act.seen, committed()) == (["1", "2"], 2)
    assert record_of(caplog, f"Controller.Failed: {Act.path}[1]")


def test_a_registry_that_raises_is_logged_and_its_message_counts(caplog: pytest.LogCaptureFixture) -> None:
    """D4"""

    class Raising:
        def run(self, data: Any) -> None:
            raise RuntimeError("registry")

    put("1")
    consumer = consumer_of(**AT_ONCE)
    consumer.REGISTRY = Raising()
    assert consumer.step(timeout=0) == 1
    assert committed() == 1
    record = record_of(caplog, "Consumer: the registry raised at offset 0 of dice[0]")
    assert (record.levelname, bool(record.exc_info)) == ("ERROR", True)


def test_the_registry_gets_text_as_it_always_did() -> None:
    got: list[Any] = []

    class Collect:
        @staticmethod
        def run(data: Any) -> None:
            got.append(data)

    Bus.at("").send("dice", "é".encode())
    Bus.at("").send("dice", b"\xff")
    consumer = consumer_of()
    consumer.REGISTRY = Collect
    consumer.step(timeout=0)
    assert got == ["é", b"\xff"]


def test_a_turn_ends_after_a_second_of_work_and_the_next_one_only_keeps_the_place() -> None:
    put("1", "2")
    client = Client(Bus.at(""))
    consumer = base_consumer(client)
    put_in_the_way(consumer)
    assert (consumer.step(timeout=0.1), consumer.step(timeout=0.1)) == (1, 1)
    assert client.polls == [(0.1, False), (0, True)]


def test_stopping_lets_the_message_end_and_leaves_the_next_ones() -> None:
    consumer = consumer_of()
    Act.acts["1"] = consumer.stop
    put("1", "2")
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert (caught.value.code, Act.seen, committed()) == (0, ["1"], 1)


def test_what_a_run_logs(caplog: pytest.LogCaptureFixture) -> None:
    consumer = consumer_of()
    Act.acts["1"] = consumer.stop
    put("1")
    with pytest.raises(SystemExit):
        consumer.run()
    own = [record for record in records(caplog) if record.name == "kser.dummy.consumer"]
    assert [(record.levelname, record.getMessage()) for record in own] == [
        ("INFO", "Consumer.Starting..."),
        ("INFO", "Closing consumer and exiting"),
    ]


# -- control files -----------------------------------------------------------------------------------------------------


def test_construction_removes_the_pause_file(caplog: pytest.LogCaptureFixture) -> None:
    """D9"""
    path = Path(os.environ["LOCK_FILE"])
    path.touch()
    consumer = consumer_of()
    assert not path.exists()
    assert lines(caplog) == [f"Cleaning existing pause file {path}"]
    path.touch()
    del consumer
    assert path.exists()


def test_a_paused_consumer_takes_nothing_and_says_so_at_times(caplog: pytest.LogCaptureFixture) -> None:
    """D10: looked at every second, logged at most every 30 s."""
    consumer = consumer_of()
    clock = Clock(consumer)
    pause = Path(os.environ["LOCK_FILE"])
    pause.touch()
    put("1")
    for _ in range(30):
        assert consumer.step(timeout=0) == 0
        clock.pass_by(1)
    assert lines(caplog, logging.WARNING) == ["Consumer is paused"]
    consumer.step(timeout=0)
    assert lines(caplog, logging.WARNING) == ["Consumer is paused"] * 2
    pause.unlink()
    assert consumer.step(timeout=0) == 1


@pytest.mark.parametrize("buffered", [False, True])
def test_a_paused_consumer_does_not_spin(buffered: bool) -> None:
    """A pause may last for hours; also while there are records that were taken before it began."""
    consumer = consumer_of()
    if buffered:
        put("1", "2")
        put_in_the_way(consumer)
        consumer.step(timeout=0)
    Path(os.environ["LOCK_FILE"]).touch()
    begin = time.monotonic()
    for _ in range(5):
        consumer.step(timeout=0.02)
    assert time.monotonic() - begin >= 0.08


def test_pausing_holds_what_was_taken_already() -> None:
    put("1", "2")
    consumer = consumer_of()
    put_in_the_way(consumer)
    pause = Path(os.environ["LOCK_FILE"])
    assert consumer.step(timeout=0) == 1
    pause.touch()
    assert consumer.step(timeout=0) == 0
    pause.unlink()
    assert consumer.step(timeout=0) == 1


def test_a_stop_that_comes_while_the_terminate_file_is_looked_at_is_not_lost() -> None:
    """A signal handler runs between any two steps of the interpreter."""

    class Signalled(Consumer):
        def should_stop(self) -> bool:  # type: ignore[override]
            self.stop()
            return False

    put("1")
    assert Signalled({}, ["dice"]).step(timeout=0) == 0
    assert Act.seen == []


def test_a_new_terminate_file_ends_it_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    """D6"""
    put("1")
    path = Path(os.environ["TERMINATE_FILE"])
    path.touch()
    with pytest.raises(SystemExit) as caught:
        consumer_of().run()
    assert (caught.value.code, Act.seen, path.exists()) == (0, [], True)
    assert lines(caplog)[-1] == "Closing consumer and exiting"


def test_a_terminate_file_is_seen_within_a_second_of_work() -> None:
    """D6, D10"""
    put("1", "2", "3")
    consumer = consumer_of()
    clock = Clock(consumer)

    def terminate() -> None:
        Path(os.environ["TERMINATE_FILE"]).touch()
        clock.pass_by(1)

    Act.acts["1"] = terminate
    with pytest.raises(SystemExit):
        consumer.run()
    assert (Act.seen, committed()) == (["1"], 1)


def test_a_stale_terminate_file_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """D6"""
    path = Path(os.environ["TERMINATE_FILE"])
    path.touch()
    os.utime(path, (lockfiles.PROCESS_START - 60,) * 2)
    put("1", "2")
    consumer = consumer_of()
    assert consumer.run_until_idle() == 2
    (line,) = lines(caplog, logging.WARNING)
    assert str(path) in line


def test_users_may_decide_for_themselves() -> None:
    class Mine(Consumer):
        @staticmethod
        def is_active() -> bool:
            return "1" not in Act.seen

        @staticmethod
        def should_stop() -> bool:
            return False

        @staticmethod
        def clean_lock() -> None:
            Act.seen.append("cleaned")

    put("1")
    consumer = Mine({}, ["dice"])
    assert [consumer.step(timeout=0) for _ in range(2)] == [1, 0]
    assert Act.seen == ["cleaned", "1"]


def test_only_a_running_file_of_this_process_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """D9"""
    monkeypatch.setattr(lockfiles, "running_file", lockfiles.RunningFile())
    path = Path(os.environ["RUNNING_FILE"])
    path.write_text("a sibling's")
    consumer_of().close()
    assert path.read_text() == "a sibling's"
    path.write_text("")


# -- rebalances --------------------------------------------------------------------------------------------------------


def test_what_is_done_is_committed_when_partitions_go_and_the_rest_is_dropped() -> None:
    put("1", "2", "3")
    client = Client(Bus.at(""))
    consumer = base_consumer(client, interval=60)
    put_in_the_way(consumer)
    consumer.step(timeout=0)
    assert client.on_revoke([Partition("other", 0)], lost=False) == {}
    assert client.on_revoke([Partition("dice", 0)], lost=False) == {Partition("dice", 0): 1}
    assert consumer.step(timeout=0) == 0
    consumer.close()
    assert (Act.seen, committed()) == (["1"], None)


def test_what_was_taken_before_a_rebalance_and_not_handled_comes_again_after_it() -> None:
    """A client may keep its place in a partition that it keeps: then nobody would ever handle these."""
    put("1", "2", "3")
    client = Client(Bus.at(""))
    consumer = base_consumer(client, interval=60)
    put_in_the_way(consumer)
    consumer.step(timeout=0)
    client.on_revoke([Partition("dice", 0)], lost=False)
    while consumer.step(timeout=0) or len(Act.seen) < 3:
        pass
    consumer.close()
    assert (Act.seen, committed()) == (["1", "2", "3"], 3)


def test_a_partition_that_was_lost_is_neither_committed_nor_rewound() -> None:
    """Somebody else may be far ahead in it by now."""
    put("1", "2", "3")
    client = Client(Bus.at(""))
    consumer = base_consumer(client, interval=60)
    put_in_the_way(consumer)
    consumer.step(timeout=0)
    assert client.on_revoke([Partition("dice", 0)], lost=True) == {}
    assert [consumer.step(timeout=0) for _ in range(3)] == [0, 0, 0]
    consumer.close()
    assert (Act.seen, committed()) == (["1"], None)


def test_without_a_group_there_is_nothing_to_commit_when_partitions_go() -> None:
    put("1")
    client = Client(Bus.at(""))
    client.can_commit = False
    consumer = base_consumer(client)
    consumer.step(timeout=0)
    assert client.on_revoke([Partition("dice", 0)], lost=False) == {}


# -- trouble -----------------------------------------------------------------------------------------------------------


def trouble_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    own = [record for record in records(caplog, logging.INFO) if record.name == "kser.consumer.base"]
    return [(record.levelname, record.getMessage()) for record in own]


def test_trouble_is_logged_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(Bus.at(""))
    consumer = base_consumer(client)
    for trouble in ({"poll": "no broker"}, {"poll": "no broker"}, {"poll": "no topic"}, {}, {}):
        client.trouble = trouble
        assert consumer.step(timeout=0) == 0
    assert trouble_lines(caplog) == [
        ("ERROR", "BaseConsumer: no broker; trying again"),
        ("ERROR", "BaseConsumer: no topic; trying again"),
        ("INFO", "BaseConsumer: the Kafka client can poll again"),
    ]


def test_a_commit_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    put("1", "2")
    client = Client(Bus.at(""))
    consumer = base_consumer(client)
    client.trouble = {"commit": "no coordinator"}
    assert consumer.step(timeout=0) == 2
    assert committed() is None
    client.trouble = {}
    consumer.step(timeout=0)
    assert committed() == 2
    assert trouble_lines(caplog) == [
        ("ERROR", "BaseConsumer: no coordinator; trying again"),
        ("INFO", "BaseConsumer: the Kafka client can commit again"),
    ]


def test_a_subscription_that_fails_lets_go_of_the_client() -> None:
    client = Client(Bus.at(""))
    client.trouble = {"subscribe": "no"}
    with pytest.raises(ClientTrouble):
        base_consumer(client)
    assert client.closed == 1


def test_an_unforeseen_error_ends_the_loop_with_the_client_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(Bus.at(""))
    consumer = base_consumer(client)
    monkeypatch.delenv("LOCK_FILE")
    with pytest.raises(KeyError, match="LOCK_FILE"):
        consumer.run()
    assert client.closed == 1


def test_an_unforeseen_error_of_the_last_commit_does_not_keep_the_client_open() -> None:
    class Surprising(Client):
        def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None:
            raise RuntimeError("surprise")

    put("1")
    client = Surprising(Bus.at(""))
    consumer = base_consumer(client, interval=60)
    consumer.step(timeout=0)
    with pytest.raises(RuntimeError, match="surprise"):
        consumer.close()
    assert client.closed == 1


def test_a_transport_without_a_producer_says_so() -> None:
    with pytest.raises(NotImplementedError):
        base_consumer(Client(Bus.at(""))).make_producer()
