"""Section 7: the registry."""

from typing import ClassVar

from recorder import call, case, describe, emit, main, show

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task


class Own(Controller):
    """A controller with its own entrypoints."""

    ENTRYPOINTS: ClassVar[dict] = {}


class Roll(Task):
    """A task."""


class Launch(Operation):
    """An operation to register."""


class Plain(Entrypoint):
    """An entrypoint that is neither a task nor an operation."""


def registry(*args, **kwargs) -> OperationRegistry:
    """Return a registry with an empty controller."""
    Own.ENTRYPOINTS = {}
    return OperationRegistry(*args, controller_class=Own, **kwargs)


class App:
    """A replacement for a Flask application."""

    def __init__(self) -> None:
        self.config: dict = {}
        self.extensions: dict = {}


@case("7.ctor", "7.ctor.instance")
def a_registry_makes_an_instance_of_its_controller() -> None:
    target = OperationRegistry()
    show("controller", type(target.controller))
    show("own", type(registry().controller))
    show("app", target.app)
    call("instance", OperationRegistry, controller_class=Own())
    show("callable", OperationRegistry(controller_class=lambda: "made").controller)
    show("positional", type(OperationRegistry(None, Own).controller))


@case("7.ctor.app", "7.init-app", "7.load-tasks")
def an_application_is_stored_and_the_tasks_are_loaded() -> None:
    class Loading(OperationRegistry):
        def init_app(self, app=None):
            emit(f"init_app {describe(app)}")
            return super().init_app(app)

        def load_tasks(self):
            emit(f"load_tasks {describe(self.app)} {hasattr(self, 'controller')}")
            return "ignored"

    app = App()
    target = Loading(app=app, controller_class=Own)
    show("same", target.app is app)
    target = Loading(controller_class=Own)
    emit("without app")
    call("init_app", target.init_app, app)
    call("none", target.init_app)
    show("app", target.app)
    show("base", call("load_tasks", registry().load_tasks))


@case("7.init-app.extensions")
def the_extensions_of_the_application() -> None:
    app = App()
    registry(app)
    show("extensions", sorted(app.extensions))


@case("7.init-app.anything")
def anything_may_be_an_application() -> None:
    for value in ("text", 5, {"config": 1}):
        call(repr(value), lambda value=value: registry(value).app)
    for value in (0, "", {}):
        show(f"falsy {value!r}", registry(value).app)


@case("7.subscribe.registers", "7.log.loaded")
def subscribe_registers_under_the_path() -> None:
    target = registry()
    for kind in (Roll, Launch, Plain):
        emit(kind.__name__)
        target.subscribe(kind)
    show("registered", target.controller.ENTRYPOINTS)


@case("7.subscribe.value")
def what_subscribe_returns() -> None:
    target = registry()
    show("value", target.subscribe(Roll))
    show("again", target.subscribe(Roll))


@case("7.subscribe.again")
def subscribing_again_is_ignored() -> None:
    target = registry()
    target.subscribe(Roll)
    target.subscribe(Roll)
    OperationRegistry(controller_class=Own).subscribe(Roll)
    show("registered", target.controller.ENTRYPOINTS)


@case("7.subscribe.same-path")
def a_different_class_with_the_same_path() -> None:
    target = registry()
    first = type("Twin", (Task,), {"__module__": __name__, "number": 1})
    second = type("Twin", (Task,), {"__module__": __name__, "number": 2})
    target.subscribe(first)
    target.subscribe(second)
    show("kept", target.controller.ENTRYPOINTS["__main__.Twin"].number)


@case("7.subscribe.no-path")
def something_without_a_path() -> None:
    call("int", registry().subscribe, int)
    call("none", registry().subscribe, None)


@case("7.subscribe.not-entrypoint")
def something_with_a_path_that_is_no_entrypoint() -> None:
    class Pathed:
        path = "some.Thing"

    target = registry()
    call("class", target.subscribe, Pathed)
    call("instance", target.subscribe, Pathed())
    show("registered", target.controller.ENTRYPOINTS)


@case("7.subscribe.shared")
def registries_share_the_entrypoints_of_the_controller() -> None:
    one, two = OperationRegistry(), OperationRegistry()
    one.subscribe(Roll)
    show("shared", sorted(two.controller.ENTRYPOINTS))
    show("controller", Controller.ENTRYPOINTS is one.controller.ENTRYPOINTS)
    Controller.ENTRYPOINTS.clear()


@case("7.subscribe.decorator-reused")
def one_decorator_for_two_classes() -> None:
    target = registry()
    decorate = target.subscribe
    decorate(Roll)
    emit("second class")
    decorate(Launch)
    show("registered", sorted(target.controller.ENTRYPOINTS))


if __name__ == "__main__":
    main()
