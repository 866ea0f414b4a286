"""Tests of background services: a consumer runs them in one thread, and closes them at shutdown."""

from __future__ import annotations

import threading

import pytest

from kser.consumer.services import BackgroundServices
from kser.errors import SettingError, StoreUnavailable
from tests.support import WAIT_SECONDS, wait_until


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kser.consumer.services.TICK_INTERVAL", 0.01)


class RecordingService:
    """A background service that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def tick(self) -> None:
        self.calls.append("tick")

    def close(self) -> None:
        self.calls.append("close")


def is_running() -> bool:
    """Return whether the thread of the background services runs."""
    return any(thread.name == "kser-services" for thread in threading.enumerate())


def test_no_thread_starts_without_background_services() -> None:
    services = BackgroundServices(lambda: [])
    services.start()
    assert not is_running()
    services.close(WAIT_SECONDS)


def test_background_services_run_periodically_and_are_closed_at_the_end() -> None:
    both = [RecordingService(), RecordingService()]
    services = BackgroundServices(lambda: both)
    services.start()
    wait_until(lambda: all(len(service.calls) > 2 for service in both))
    services.close(WAIT_SECONDS)
    assert not is_running()
    assert [service.calls[-1] for service in both] == ["close", "close"]


def test_background_services_added_later_run_too() -> None:
    found = [RecordingService()]
    services = BackgroundServices(lambda: list(found))
    services.start()
    found.append(RecordingService())
    wait_until(lambda: found[1].calls)
    services.close(WAIT_SECONDS)
    assert found[1].calls[-1] == "close"


def test_misconfigured_background_service_raises_at_the_start() -> None:
    def find() -> list[RecordingService]:
        raise SettingError("KSER_LEASE must be a number above 0")

    with pytest.raises(SettingError, match="KSER_LEASE"):
        BackgroundServices(find).start()
    assert not is_running()


def test_background_service_starts_when_its_database_is_back() -> None:
    service = RecordingService()
    outage: list[Exception] = [StoreUnavailable("no response")] * 3

    def find() -> list[RecordingService]:
        if outage:
            raise outage.pop()
        return [service]

    services = BackgroundServices(find)
    services.start()
    wait_until(lambda: service.calls)
    services.close(WAIT_SECONDS)
    assert service.calls[-1] == "close"
