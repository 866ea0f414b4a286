"""Tests of background services: a consumer runs them in one thread, and closes them at shutdown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import pytest

from kser.consumer.services import BackgroundServices
from kser.errors import SettingError, StoreUnavailable
from kser.takeover import Takeover, TakeoverHost
from tests.support import WAIT_SECONDS, wait_until


class RecordingService:
    """A background service that records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, host: TakeoverHost) -> None:
        self.calls.append("start")

    def tick(self, host: TakeoverHost) -> float:
        self.calls.append("tick")
        return 0.01

    def look(self, host: TakeoverHost) -> None:
        self.calls.append("look")

    def close(self, host: TakeoverHost) -> None:
        self.calls.append("close")


class BusyHost(TakeoverHost):
    """A consumer that takes over nothing."""

    def __init__(self) -> None:
        self.wake_up = threading.Event()

    def free_workers(self) -> int:
        return 0

    def may_hold_urgent(self) -> bool:
        return False

    def topics(self, stored: Callable[[], Collection[str]]) -> Collection[str]:
        return ()

    def put(self, takeover: Takeover, expires_in: float) -> bool:
        return False


def background_services(find: Callable[[], Sequence[RecordingService]]) -> BackgroundServices:
    """Return the background services of a consumer that takes over nothing."""
    return BackgroundServices(find, BusyHost())


def is_running() -> bool:
    """Return whether the thread of the background services runs."""
    return any(thread.name == "kser-services" for thread in threading.enumerate())


def test_no_thread_starts_without_background_services() -> None:
    services = background_services(lambda: [])
    services.start()
    assert not is_running()
    services.close(WAIT_SECONDS)


def test_background_services_run_periodically_and_are_closed_at_the_end() -> None:
    both = [RecordingService(), RecordingService()]
    services = background_services(lambda: both)
    services.start()
    wait_until(lambda: all(len(service.calls) > 2 for service in both))
    services.close(WAIT_SECONDS)
    assert not is_running()
    assert [service.calls[-1] for service in both] == ["close", "close"]


def test_background_services_added_later_run_too() -> None:
    found = [RecordingService()]
    services = background_services(lambda: list(found))
    services.start()
    found.append(RecordingService())
    wait_until(lambda: found[1].calls)
    services.close(WAIT_SECONDS)
    assert found[1].calls[-1] == "close"


def test_misconfigured_background_service_raises_at_the_start() -> None:
    def find() -> list[RecordingService]:
        raise SettingError("KSER_LEASE must be a number above 0")

    with pytest.raises(SettingError, match="KSER_LEASE"):
        background_services(find).start()
    assert not is_running()


def test_background_service_starts_when_its_database_is_back() -> None:
    service = RecordingService()
    outage: list[Exception] = [StoreUnavailable("no response")] * 3

    def find() -> list[RecordingService]:
        if outage:
            raise outage.pop()
        return [service]

    services = background_services(find)
    services.start()
    wait_until(lambda: service.calls)
    services.close(WAIT_SECONDS)
    assert service.calls[-1] == "close"


def test_service_is_started_before_its_first_tick() -> None:
    service = RecordingService()
    services = background_services(lambda: [service])
    services.start()
    wait_until(lambda: "tick" in service.calls)
    services.close(WAIT_SECONDS)
    assert service.calls[:2] == ["start", "tick"]


def test_services_of_a_stepped_consumer_look_without_a_thread() -> None:
    service = RecordingService()
    background_services(lambda: [service]).look()
    assert (service.calls, is_running()) == (["look"], False)


def test_services_get_the_free_workers_in_turn() -> None:
    """durability rule 20: with several registries in a process, the free workers are shared in turn."""
    order: list[str] = []

    class NamedService(RecordingService):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def look(self, host: TakeoverHost) -> None:
            order.append(self.name)

    both = [NamedService("a"), NamedService("b")]
    services = background_services(lambda: both)
    services.look()
    services.look()
    assert sorted(order[:2]) == sorted(order[2:]) == ["a", "b"]
    assert order[0] != order[2]
