"""Fixtures of the durable operation tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kser.store import retrying
from tests.durable.harness import DistributedHookedSale, DurableHarness, HookedSale


@pytest.fixture
def hooked_classes(harness: DurableHarness) -> Iterator[None]:
    """Subscribe the classes with end hooks in the first process, and reset them after the test."""
    for cls in (HookedSale, DistributedHookedSale):
        harness.first.subscribe_copy(cls)
    yield
    HookedSale.hook_calls.clear()
    HookedSale.on_hook = None


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return an event that tasks wait for; the end of the test sets it."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat failed calls of the store after 10 ms."""
    monkeypatch.setattr(retrying, "_BACKOFF", lambda _failures: 0.01)
