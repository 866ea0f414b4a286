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
from tests.support import lines, message

ENTRY_SIGNALS = (signals.entry_started, signals.entry_succeeded, signals.entry_failed)


class Greet(Task):
    def run(self) -> Result:
        return Result(stdout="hello")


class Fail(Task):
    def run(self) -> Result:
        raise ValueError("no")


class Welcome(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Greet()]


class Stumble(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Fail()]


class Witness:
    """Notes what signals say, for as long as the ``with`` block lasts."""

    def __init__(self, *watched: NamedSignal) -> None:
        self.watched = watched
        self.heard: list[tuple[str, Any, dict[str, Any]]] = []
        self._receivers: list[Any] = []

    @property
    def names(self) -> list[tuple[str, Any]]:
        return [(name, sender) for name, sender, _ in self.heard]

    def __enter__(self) -> Witness:
        for signal in self.watched:
            self._receivers.append((signal, self._receiver(signal.name)))
            signal.connect(self._receivers[-1][1])
        return self

    def __exit__(self, *_: object) -> None:
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)

    def _receiver(self, name: str) -> Any:
        def receive(sender: Any, **keywords: Any) -> None:
            self.heard.append((name, sender, keywords))

        return receive


def test_successful_entry_emits_started_and_succeeded() -> None:
    entry = Greet()
    with Witness(*ENTRY_SIGNALS) as witness:
        result = entry.execute()
    assert witness.heard == [
        ("entry-started", Greet, {"entry": entry}),
        ("entry-succeeded", Greet, {"entry": entry, "result": result}),
    ]


def test_raising_entry_emits_started_and_failed() -> None:
    entry = Fail()
    with Witness(*ENTRY_SIGNALS) as witness:
        result = entry.execute()
    assert witness.heard == [
        ("entry-started", Fail, {"entry": entry}),
        ("entry-failed", Fail, {"entry": entry, "result": result}),
    ]


def test_raising_postinit_emits_failed_once() -> None:
    class Broken(Task):
        def postinit(self) -> None:
            raise ValueError("no")

    with Witness(*ENTRY_SIGNALS) as witness:
        Broken().execute()
    assert witness.names == [("entry-failed", Broken)]


def test_successful_operation_emits_signals_for_itself_and_its_tasks() -> None:
    """D16: operations and their tasks are counted."""
    with Witness(*ENTRY_SIGNALS) as witness:
        Welcome().execute()
    assert witness.names == [
        ("entry-started", Welcome),
        ("entry-started", Greet),
        ("entry-succeeded", Greet),
        ("entry-succeeded", Welcome),
    ]


def test_failed_operation_emits_signals_for_itself_and_its_tasks() -> None:
    """D16: also a task that raises inside an operation."""
    with Witness(*ENTRY_SIGNALS) as witness:
        Stumble().execute()
    assert witness.names == [
        ("entry-started", Stumble),
        ("entry-started", Fail),
        ("entry-failed", Fail),
        ("entry-failed", Stumble),
    ]


def test_rejected_message_emits_message_refused() -> None:
    with Witness(signals.message_refused) as witness:
        result = Controller.run("nonsense")
    ((_, sender, keywords),) = witness.heard
    assert sender is Controller
    assert keywords["raw_data"] == "nonsense"
    assert isinstance(keywords["error"], ValueError)
    assert keywords["result"] is result


def test_sent_message_emits_message_sent() -> None:
    kmsg = message("some.Task")
    with Witness(signals.message_sent) as witness:
        result = Producer({"bootstrap_servers": "signals"}).send("dice", kmsg)
    InMemoryBroker.reset()
    assert witness.heard == [("message-sent", Producer, {"topic": "dice", "kmsg": kmsg, "result": result})]


def test_unsent_message_emits_no_signal() -> None:
    with Witness(signals.message_sent) as witness:
        Producer().send("dice", message("some.Task", params={"when": object()}))
    InMemoryBroker.reset()
    assert witness.heard == []


def test_raising_listener_is_logged_and_the_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    def raising(sender: Any, **keywords: Any) -> None:
        raise RuntimeError("listener")

    with signals.entry_succeeded.connected_to(raising), Witness(signals.entry_succeeded) as witness:
        result = Greet().execute()
    assert result.retcode == 0
    assert len(witness.heard) == 1
    (line,) = [line for line in lines(caplog) if "listener of" in line]
    assert line.startswith("a listener of 'entry-succeeded' raised an exception, which is ignored: ")


def test_listener_may_choose_its_sender() -> None:
    class Other(Entrypoint):
        def run(self) -> None:
            return None

    heard: list[Any] = []

    def listen(sender: Any, **keywords: Any) -> None:
        heard.append(sender)

    with signals.entry_started.connected_to(listen, sender=Other):
        Greet().execute()
        Other().execute()
    assert heard == [Other]
