"""Tests of the registry: subscription, controller, producer and Flask (section 7 of the behaviour page)."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result
from flask import Flask, current_app, has_app_context

from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.entry import Entrypoint
from kser.errors import ProducerMissing, SettingError, TopicMissing
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.support import lines, message, ok_result, records

MODULE = "tests.sequencing.test_registry"


@pytest.fixture(autouse=True)
def debug_log_and_new_broker(caplog: pytest.LogCaptureFixture) -> Any:
    """Log everything, and reset the in-memory broker after the test."""
    caplog.set_level(logging.DEBUG, "kser")
    yield
    InMemoryBroker.reset()


# -- subscribe ---------------------------------------------------------------------------------------------------------


def test_subscribe_returns_the_class() -> None:
    """B1"""
    registry = OperationRegistry()

    @registry.subscribe
    class Roll(Task):
        def run(self) -> Result:
            return ok_result("rolled")

    @registry.subscribe
    class Launch(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Roll(), Roll()]

    assert Launch().build().execute().stdout == "rolled"
    assert Controller.run(message(f"{MODULE}.Roll").dumps()).stdout == "rolled"


def test_decorator_registers_each_class_under_its_own_name() -> None:
    """B1"""
    decorator = OperationRegistry().subscribe
    one = decorator(type("One", (Task,), {"__module__": MODULE}))
    two = decorator(type("Two", (Task,), {"__module__": MODULE}))
    assert Controller.ENTRYPOINTS[f"{MODULE}.One"] is one
    assert Controller.ENTRYPOINTS[f"{MODULE}.Two"] is two


def test_subscribe_logs_after_the_registration(caplog: pytest.LogCaptureFixture) -> None:
    """B18"""
    OperationRegistry().subscribe(type("Logged", (Task,), {"__module__": MODULE}))
    assert [(record.levelname, record.getMessage()) for record in records(caplog)] == [
        ("DEBUG", f"Controller.Registered: {MODULE}.Logged"),
        ("INFO", f"Operation registry: loaded {MODULE}.Logged"),
    ]
    assert records(caplog)[1].name == "kser.sequencing.registry"


def test_second_subscribe_of_a_class_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    cls = type("Twice", (Task,), {"__module__": MODULE})
    OperationRegistry().subscribe(cls)
    caplog.clear()
    assert OperationRegistry().subscribe(cls) is cls
    assert lines(caplog) == []


def test_first_of_two_classes_under_one_path_stays_and_both_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """B18"""
    registry = OperationRegistry()

    class Shop:
        @registry.subscribe
        class Pay(Task):
            pass

    class Bar:
        @registry.subscribe
        class Pay(Task):
            pass

    assert Controller.ENTRYPOINTS[f"{MODULE}.Pay"] is Shop.Pay
    (line,) = lines(caplog, logging.WARNING)
    assert "Shop.Pay" in line
    assert "Bar.Pay" in line
    assert f"{MODULE}.Pay is taken" in line


def test_plain_entrypoint_may_be_subscribed() -> None:
    cls = type("Bare", (Entrypoint,), {"__module__": MODULE})
    assert OperationRegistry().subscribe(cls) is cls


def test_class_sends_with_its_first_registry() -> None:
    first = OperationRegistry(producer=Producer({"bootstrap_servers": "first"}))
    second = OperationRegistry(producer=Producer({"bootstrap_servers": "second"}))

    @second.subscribe
    @first.subscribe
    class Sent(Task):
        TOPIC = "t"

    Sent().send()
    assert (len(InMemoryBroker.at("first").values("t")), len(InMemoryBroker.at("second").values("t"))) == (1, 0)


def test_subclass_sends_with_the_registry_of_its_parent_until_it_has_one() -> None:
    parent = OperationRegistry(producer=Producer({"bootstrap_servers": "parent"}))
    own = OperationRegistry(producer=Producer({"bootstrap_servers": "own"}))

    @parent.subscribe
    class Parent(Task):
        TOPIC = "t"

    class Child(Parent):
        pass

    Child().send()
    own.subscribe(Child)
    Child().send()
    assert (len(InMemoryBroker.at("parent").values("t")), len(InMemoryBroker.at("own").values("t"))) == (1, 1)


# -- controllers -------------------------------------------------------------------------------------------------------


def test_controller_is_created_by_the_controller_class() -> None:
    class OwnController(Controller):
        pass

    assert isinstance(OperationRegistry().controller, Controller)
    assert isinstance(OperationRegistry(None, OwnController).controller, OwnController)
    controller = OwnController()
    assert OperationRegistry(controller_class=lambda: controller).controller is controller
    with pytest.raises(TypeError, match="object is not callable"):
        OperationRegistry(controller_class=controller)  # type: ignore[arg-type]


def test_controller_subclass_isolates_a_registry() -> None:
    """B19"""

    class SeparateController(Controller):
        ENTRYPOINTS = {}  # noqa: RUF012  as in the documentation

    registry = OperationRegistry(controller_class=SeparateController)
    registry.subscribe(type("Hidden", (Task,), {"__module__": MODULE}))
    assert list(registry.controller.ENTRYPOINTS) == [f"{MODULE}.Hidden"]
    assert f"{MODULE}.Hidden" not in Controller.ENTRYPOINTS


# -- producers ---------------------------------------------------------------------------------------------------------


def test_missing_producer_error_names_the_argument() -> None:
    with pytest.raises(ProducerMissing, match=r"OperationRegistry\(producer=Producer\(\)\)"):
        _ = OperationRegistry().producer


class ProducerRecorder(Consumer):
    """A consumer that records the producers that it creates for its registry."""

    def __init__(self) -> None:
        super().__init__({}, ["dice"])
        self.producers: list[Producer] = []

    def make_producer(self) -> Producer:
        self.producers.append(Producer({}))
        return self.producers[-1]


def registry_in_consumer(**arguments: Any) -> OperationRegistry:
    """Return a registry whose controller the consumers of this test use."""
    registry = OperationRegistry(**arguments)
    registry.subscribe(type("Known", (Task,), {"__module__": MODULE}))
    return registry


def test_shared_producer_is_created_on_first_use() -> None:
    registry = registry_in_consumer()
    with contextlib.closing(ProducerRecorder()) as consumer:
        consumer.step(timeout=0)
        assert consumer.producers == []
        assert registry.producer is registry.producer
        assert consumer.producers == [registry.producer]


def test_producer_of_the_constructor_is_not_replaced_by_the_shared_producer() -> None:
    producer = Producer({})
    registry = registry_in_consumer(producer=producer)
    with contextlib.closing(ProducerRecorder()) as consumer:
        consumer.step(timeout=0)
        assert registry.producer is producer


def test_shared_producer_comes_from_the_last_consumer() -> None:
    registry = registry_in_consumer()
    for _ in range(2):
        with contextlib.closing(ProducerRecorder()) as consumer:
            consumer.step(timeout=0)
            assert registry.producer is consumer.producers[0]
    with pytest.raises(ProducerMissing):
        _ = registry.producer


# -- Flask -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app() -> Flask:
    app = Flask("shop")
    app.config.update(CURRENCY="EUR", KSER_TOPICS=["from-app", "second"])
    return app


def test_load_tasks_is_called_only_for_an_app() -> None:
    loads: list[Any] = []

    class LoadingRegistry(OperationRegistry):
        def load_tasks(self) -> None:
            loads.append(self.app)

    registry = LoadingRegistry()
    assert loads == []
    assert registry.init_app("anything") is None  # type: ignore[func-returns-value]
    registry.init_app()
    LoadingRegistry("app")
    assert loads == ["anything", None, "app"]


def test_init_app_stores_nothing_in_the_app(app: Flask) -> None:
    OperationRegistry(app)
    assert app.extensions == {}


@pytest.mark.parametrize("late", [True, False])
def test_tasks_run_inside_the_app_context(app: Flask, late: bool) -> None:
    registry = OperationRegistry(None if late else app)

    @registry.subscribe
    class Price(Task):
        def prerun(self) -> None:
            assert current_app

        def run(self) -> Result:
            return ok_result(current_app.config["CURRENCY"])

        def onsuccess(self, result: Result) -> Result:
            assert current_app
            return result

    if late:
        registry.init_app(app)
    assert Controller.run(message(Price).dumps()).stdout == "EUR"
    assert not has_app_context()


def test_operations_and_their_tasks_run_inside_the_app_context(app: Flask) -> None:
    registry = OperationRegistry(app)

    class Price(Task):
        def run(self) -> Result:
            return ok_result(current_app.config["CURRENCY"])

    @registry.subscribe
    class Order(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            assert current_app
            return [Price(), Price()]

    assert Controller.run(message(Order).dumps()).stdout == "EUR"


def test_failures_are_handled_inside_the_app_context(app: Flask) -> None:
    @OperationRegistry(app).subscribe
    class FailingTask(Task):
        def run(self) -> Result:
            raise ValueError("x")

        def onerror(self, result: Result) -> Any:
            return ok_result(current_app.config["CURRENCY"])

    assert FailingTask().execute().stdout == "EUR"


def test_each_execution_has_its_own_app_context(app: Flask) -> None:
    ends: list[Any] = []
    app.teardown_appcontext(ends.append)
    registry = OperationRegistry(app)

    @registry.subscribe
    class EmptyTask(Task):
        def run(self) -> Result:
            return Result()

    EmptyTask().execute()
    EmptyTask().execute()
    assert len(ends) == 2


def test_app_without_a_context_is_accepted() -> None:
    @OperationRegistry("any object").subscribe
    class SimpleTask(Task):
        def run(self) -> Result:
            return ok_result("ran")

    assert SimpleTask().execute().stdout == "ran"


def test_topic_comes_from_the_app_config(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_TOPICS", "from-environment")
    registry = OperationRegistry(app)
    assert registry.topic_for(Task()) == "from-app"
    del app.config["KSER_TOPICS"]
    assert registry.topic_for(Task()) == "from-environment"
    assert registry.topic_for(Task(), "argument") == "argument"


def test_invalid_setting_in_the_app_is_named(app: Flask) -> None:
    app.config["KSER_TOPICS"] = [None]
    with pytest.raises(SettingError, match="KSER_TOPICS must contain topic names"):
        OperationRegistry(app).topic_for(Task())
    app.config["KSER_TOPICS"] = []
    with pytest.raises(TopicMissing, match="Flask app's config"):
        OperationRegistry(app).topic_for(Task())


# -- rejected subscriptions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [int, "Pay", None, lambda: None, Task()])
def test_only_entrypoint_classes_can_be_subscribed(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """C17"""
    with pytest.raises(ValidationError, match=r"Invalid type for entry .*, MUST implement kser\.entry\.Entrypoint"):
        OperationRegistry().subscribe(value)
    assert lines(caplog) == []


def test_instance_of_a_subscribed_class_cannot_be_subscribed() -> None:
    """C17"""
    registry = OperationRegistry()
    cls = registry.subscribe(type("Known", (Task,), {"__module__": MODULE}))
    with pytest.raises(ValidationError, match=r"MUST implement kser\.entry\.Entrypoint"):
        registry.subscribe(cls())  # type: ignore[type-var]


def test_foreign_class_under_a_known_path_cannot_be_subscribed() -> None:
    """C17"""
    registry = OperationRegistry()
    registry.subscribe(type("Known", (Task,), {"__module__": MODULE}))
    with pytest.raises(ValidationError, match=r"MUST implement kser\.entry\.Entrypoint"):
        registry.subscribe(type("NoEntrypoint", (), {"path": f"{MODULE}.Known"}))  # type: ignore[type-var]
