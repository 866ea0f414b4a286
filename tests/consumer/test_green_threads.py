"""Tests of consumers in processes whose threads another library has replaced."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.errors import SettingError
from kser.python_kafka.consumer import Consumer


@pytest.mark.parametrize("kind", [Consumer, ConfluentConsumer])
@pytest.mark.parametrize("module", ["threading", "socket", "select"])
def test_consumer_is_refused_where_gevent_has_patched(
    kind: type[Any], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched=lambda name: name == module))
    with pytest.raises(SettingError, match="gevent has replaced"):
        kind({}, ["work"])


def test_consumer_of_confluent_is_refused_where_eventlet_has_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    patcher = SimpleNamespace(is_monkey_patched=lambda name: name == "thread")
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    with pytest.raises(SettingError, match="eventlet has replaced"):
        ConfluentConsumer({}, ["work"])


def test_consumer_is_not_refused_where_gevent_is_only_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched=lambda name: False))
    with pytest.raises(SettingError, match=r"needs 'group\.id'"):
        ConfluentConsumer({}, ["work"])
