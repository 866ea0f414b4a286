"""Tests of the signals: each event is emitted, and a raising listener changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from blinker import NamedSignal
from cdumay_result import Result

from kser import signals
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.entry import Entrypoint
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.support import message, record_of

ENTRY_SIGNALS = (signals.entry_started, signals.entry_succeeded, signals.entry_failed)


class Greet(Task):
    def run(self) -> Result:
        return Result(stdout="hello")


class FailingTask(Task):
    def run(self) -> Result:
        raise ValueError("no")


class Welcome(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Greet()]


class FailingOperation(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [FailingTask()]


class SignalRecorder:
    """Listener that records the emissions of some signals during a ``with`` block."""

    def __init__(self, *recorded: NamedSignal) -> None:
        self._recorded = recorded
        #: The name of the signal, its sender and its keywords, of each emission.
        self.emissions: list[tuple[str, Any, dict[str, Any]]] = []
        self._receivers: list[Any] = []

    @property
    def names(self) -> list[tuple[str, Any]]:
        """The name of the signal and its sender, of each emission."""
        return [(name, sender) for name, sender, _ in self.emissions]

    def __enter__(self) -> SignalRecorder:
        for signal in self._recorded:
            self._receivers.append((signal, self._receiver(signal.name)))
            signal.connect(self._receivers[-1][1])
        return self

    def __exit__(self, *_: object) -> None:
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)

    def _receiver(self, name: str) -> Any:
        def receive(sender: Any, **keywords: Any) -> None:
            self.emissions.append((name, sender, keywords))

        return receive


def test_successful_entry_emits_started_and_succeeded() -> None:
    entry = Greet()
    with SignalRecorder(*ENTRY_SIGNALS) as recorder:
        result = entry.execute()
    assert recorder.emissions == [
        ("entry-started", Greet, {"entry": entry}),
        ("entry-succeeded", Greet, {"entry": entry, "result": result}),
    ]


def test_raising_entry_emits_started_and_failed() -> None:
    entry = FailingTask()
    with SignalRecorder(*ENTRY_SIGNALS) as recorder:
        result = entry.execute()
    assert recorder.emissions == [
        ("entry-started", FailingTask, {"entry": entry}),
        ("entry-failed", FailingTask, {"entry": entry, "result": result}),
    ]


def test_raising_postinit_emits_failed_once() -> None:
    class RaisingPostinit(Task):
        def postinit(self) -> None:
            raise ValueError("no")

    with SignalRecorder(*ENTRY_SIGNALS) as recorder:
        RaisingPostinit().execute()
    assert recorder.names == [("entry-failed", RaisingPostinit)]


def test_successful_operation_emits_signals_for_itself_and_its_tasks() -> None:
    """D16"""
    with SignalRecorder(*ENTRY_SIGNALS) as recorder:
        Welcome().execute()
    assert recorder.names == [
        ("entry-started", Welcome),
        ("entry-started", Greet),
        ("entry-succeeded", Greet),
        ("entry-succeeded", Welcome),
    ]


def test_failed_operation_emits_signals_for_itself_and_its_tasks() -> None:
    """D16"""
    with SignalRecorder(*ENTRY_SIGNALS) as recorder:
        FailingOperation().execute()
    assert recorder.names == [
        ("entry-started", FailingOperation),
        ("entry-started", FailingTask),
        ("entry-failed", FailingTask),
        ("entry-failed", FailingOperation),
    ]


def test_rejected_message_emits_message_refused() -> None:
    with SignalRecorder(signals.message_refused) as recorder:
        result = Controller.run("nonsense")
    ((_, sender, keywords),) = recorder.emissions
    assert sender is Controller
    assert keywords["raw_data"] == "nonsense"
    assert isinstance(keywords["error"], ValueError)
    assert keywords["result"] is result


def test_sent_message_emits_message_sent() -> None:
    kmsg = message("some.Task")
    with SignalRecorder(signals.message_sent) as recorder:
        result = Producer({"bootstrap_servers": "signals"}).send("dice", kmsg)
    InMemoryBroker.reset()
    assert recorder.emissions == [("message-sent", Producer, {"topic": "dice", "kmsg": kmsg, "result": result})]


def test_unsent_message_emits_no_signal() -> None:
    with SignalRecorder(signals.message_sent) as recorder:
        Producer().send("dice", message("some.Task", params={"when": object()}))
    InMemoryBroker.reset()
    assert recorder.emissions == []


def test_raising_listener_is_logged_and_the_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    def raising_listener(sender: Any, **keywords: Any) -> None:
        raise RuntimeError("listener")

    with signals.entry_succeeded.connected_to(raising_listener), SignalRecorder(signals.entry_succeeded) as recorder:
        result = Greet().execute()
    assert result.retcode == 0
    assert len(recorder.emissions) == 1
    record = record_of(caplog, "a listener of ")
    assert record.getMessage().startswith("a listener of 'entry-succeeded' raised an exception, which is ignored: ")


def test_listener_of_one_sender_receives_no_signal_of_another() -> None:
    class Other(Entrypoint):
        def run(self) -> None:
            return None

    senders: list[Any] = []

    def listen(sender: Any, **keywords: Any) -> None:
        senders.append(sender)

    with signals.entry_started.connected_to(listen, sender=Other):
        Greet().execute()
        Other().execute()
    assert senders == [Other]
