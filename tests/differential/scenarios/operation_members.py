"""Section 6: the members of an operation, and how it is built."""

from cdumay_result import Result
from recorder import call, case, emit, main, printed, show

from kser.sequencing.operation import Operation
from kser.sequencing.task import Task


class Roll(Task):
    """A task."""

    REQUIRED_FIELDS = ("dice",)

    def run(self):
        return Result(stdout="rolled")


class Launch(Operation):
    """An operation of two tasks."""

    def build_tasks(self, **kwargs):
        emit(f"build_tasks {sorted(kwargs.items())}")
        return [Roll(uuid="t1", params=kwargs), Roll(uuid="t2", params=kwargs)]


def uuids(operation) -> list:
    """Return the uuids of the operation's tasks."""
    return [task.uuid for task in operation.tasks]


@case("6.ctor.keywords")
def the_constructor_by_keywords() -> None:
    result, task = Result(uuid="r"), Roll(uuid="t")
    operation = Launch(uuid="u", params={"a": 1}, status="MINE", result=result, metadata={"m": 1}, tasks=[task])
    show("values", (operation.uuid, operation.params, operation.status, operation.metadata, uuids(operation)))
    show("result", operation.result is result)
    operation = Launch()
    show("defaults", (operation.uuid, operation.params, operation.status, operation.tasks, operation.metadata))
    show("subclass", issubclass(Operation, Task))
    show("TASKS", Operation.TASKS)
    call("unknown", Launch, other=1)


@case("6.ctor.positional")
def the_constructor_in_the_published_order() -> None:
    operation = call("call", Launch, "u", "MINE", {"a": 1}, [Roll(uuid="t")], Result(uuid="r"), {"m": 1})
    if operation is not None:
        show("values", (operation.uuid, operation.status, operation.params, uuids(operation), operation.metadata))
    operation = call("two", Launch, "u", "MINE")
    if operation is not None:
        show("values", (operation.status, operation.params))


@case("6.ctor.documented")
def the_constructor_in_the_documented_order() -> None:
    operation = call("call", Launch, "u", {"a": 1}, "MINE", Result(uuid="r"), {"m": 1})
    if operation is not None:
        show("values", (operation.params, operation.status, operation.tasks, operation.metadata))


@case("6.ctor.tasks-falsy")
def falsy_tasks_become_a_list() -> None:
    for value in (None, [], (), 0):
        show(repr(value), Launch(tasks=value).tasks)


@case("6.ctor.tasks-kept")
def tasks_that_are_given() -> None:
    given = [Roll(uuid="t0")]
    operation = Launch(uuid="u", tasks=given, params={"dice": 1})
    show("same", operation.tasks is given)
    operation.add_task(Roll(uuid="added"))
    call("build", operation.build, dice=1)
    show("tasks", uuids(operation))
    show("given", [task.uuid for task in given])


@case("6.ctor.tasks-tuple")
def tasks_that_are_a_tuple() -> None:
    operation = Launch(uuid="u", tasks=(Roll(uuid="t0"),))
    call("add_task", operation.add_task, Roll(uuid="added"))
    call("build", operation.build, dice=1)
    show("tasks", uuids(operation))


@case("6.ctor.tasks-after-postinit")
def tasks_in_postinit() -> None:
    class Early(Launch):
        def postinit(self):
            emit(f"tasks {hasattr(self, 'tasks')}")

    Early(uuid="u", tasks=[Roll(uuid="t")])


@case("6.repr")
def repr_and_str_of_an_operation() -> None:
    operation = Launch(uuid="u", status="MINE", params={"a": 1}, tasks=[Roll(uuid="t")])
    show("repr", repr(operation))
    show("str", str(operation))


@case("6.new", "6.parse-inputs")
def new_builds_from_parsed_inputs() -> None:
    class Parsing(Launch):
        @classmethod
        def parse_inputs(cls, **kwargs):
            emit(f"parse_inputs {sorted(kwargs)}")
            return {"uuid": "parsed", "params": kwargs}

    call("plain", Launch.parse_inputs, uuid="u", a=1)
    operation = call("new", Launch.new, uuid="u", params={"a": 1})
    show("values", (operation.uuid, operation.params))
    operation = call("parsing", Parsing.new, a=1)
    show("values", (operation.uuid, operation.params))
    call("unknown", Launch.new, other=1)


@case("6.check.own-then-tasks", "6.check.own-params")
def required_parameters_of_the_operation_and_its_tasks() -> None:
    class Needy(Launch):
        REQUIRED_FIELDS = ("own",)
        TASKS = (Roll,)

    for params in ({}, {"own": 1}, {"dice": 1}, {"own": 1, "dice": None}):
        call(repr(params), Needy(uuid="u", params=params).check_required_params)


@case("6.check.nested")
def a_nested_operation_contributes_its_own_fields() -> None:
    class Inner(Launch):
        REQUIRED_FIELDS = ("inner",)
        TASKS = (Roll,)

    class Outer(Launch):
        TASKS = (Inner, Roll)

    for params in ({}, {"inner": 1}, {"inner": 1, "dice": 1}):
        call(repr(params), Outer(uuid="u", params=params).check_required_params)


@case("6.set-status", "6.log.set-status")
def set_status_is_logged_by_its_trigger() -> None:
    operation = Launch(uuid="u", params={"a": 1})
    call("set_status", operation.set_status, "MINE")
    show("status", operation.status)
    call("_set_status", operation._set_status, "OTHER")
    call("_set_status", operation._set_status, "RUNNING", Result(uuid="r"))
    call("keywords", operation._set_status, status="PENDING", result=None)
    call("any order", operation._set_status, "SUCCESS")
    call("back", operation._set_status, "PENDING")
    call("not text", operation._set_status, 5)

    class Own(Launch):
        def set_status(self, *args, **kwargs):
            emit(f"set_status {len(args)} {sorted(kwargs)}")
            return "value"

    call("own", Own(uuid="u")._set_status, "RUNNING", Result(uuid="r"))


@case("6.log.metadata")
def the_log_of_an_operation_and_its_metadata() -> None:
    operation = Launch(uuid="u", metadata={"m": 1})
    call("_set_status", operation._set_status, "RUNNING")


@case("6.log.own")
def log_of_an_operation_is_that_of_a_task() -> None:
    operation = Launch(uuid="u", status="MINE", metadata={"m": 1})
    call("log", operation.log, "hello")


@case("6.add-task")
def add_task_appends() -> None:
    operation = Launch(uuid="u")
    call("add", operation.add_task, Roll(uuid="t"))
    call("keyword", operation.add_task, task=Roll(uuid="s"))
    call("anything", operation.add_task, "text")
    show("count", len(operation.tasks))


@case("6.overrides.default")
def override_points_do_nothing() -> None:
    operation = Operation(uuid="u")
    call("prebuild", operation.prebuild, a=1)
    call("build_tasks", operation.build_tasks, a=1)
    show("finalize", operation.finalize() is operation)
    for name in ("run", "postrun"):
        show(name, callable(getattr(operation, name)))


@case("6.overrides.send")
def send_of_an_operation() -> None:
    call("send", Operation(uuid="u").send)


@case("6.prebuild.order", "6.log.pre-build", "6.log.build-tasks", "6.build.finalize")
def build_checks_then_builds_then_finalizes() -> None:
    class Told(Launch):
        REQUIRED_FIELDS = ("a",)

        def check_required_params(self):
            emit("check")
            super().check_required_params()

        def prebuild(self, **kwargs):
            emit(f"prebuild {sorted(kwargs)}")
            return kwargs

        def finalize(self):
            emit(f"finalize {len(self.tasks)}")
            return "finalized"

    operation = Told(uuid="u", params={"a": 1})
    call("build", operation.build, dice=6)
    show("tasks", uuids(operation))
    show("status", operation.status)
    call("default finalize", Launch(uuid="u").build, dice=6)


@case("6.prebuild.trigger")
def the_prebuild_trigger_alone() -> None:
    class Needy(Launch):
        REQUIRED_FIELDS = ("a",)

    call("missing", Needy(uuid="u")._prebuild, b=1)
    call("given", Needy(uuid="u", params={"a": 1})._prebuild, b=1)
    call("build tasks", Launch(uuid="u")._build_tasks, dice=1)


@case("6.compute.replaced", "6.compute.falsy", "6.compute.not-mapping")
def the_value_of_prebuild_replaces_the_arguments() -> None:
    for value in ({"dice": 2}, None, {}, False, 0, [], "text", [("a", 1)], 5):
        operation = Launch(uuid="u")
        operation.prebuild = lambda value=value, **kwargs: value
        tasks = call(repr(value), operation.compute_tasks, dice=1)
        show("stored", (tasks is not None and len(tasks), len(operation.tasks)))


@case("6.build-tasks.none")
def build_tasks_returns_no_list() -> None:
    for value in (None, 5, (), [], "ab", iter([])):
        operation = Operation(uuid="u")
        operation.build_tasks = lambda value=value, **kwargs: value
        call(type(value).__name__, operation.build, a=1)
        show("tasks", operation.tasks)


@case("6.build.twice")
def building_twice() -> None:
    operation = Launch(uuid="u")
    call("first", operation.build, dice=1)
    call("second", operation.build, dice=1)
    show("tasks", uuids(operation))


@case("6.build.arguments")
def building_without_arguments() -> None:
    operation = Launch(uuid="u", params={"dice": 4})
    call("build", operation.build)
    show("params", [task.params for task in operation.tasks])


@case("6.build.no-keywords")
def overrides_that_take_no_keywords() -> None:
    class Bare(Operation):
        def prebuild(self):
            return None

        def build_tasks(self):
            return [Roll(uuid="t")]

    operation = Bare(uuid="u", params={"dice": 1})
    call("without", operation.build)
    call("with", operation.build, a=1)


@case("6.build.raises")
def what_building_raises_goes_through() -> None:
    for name in ("prebuild", "build_tasks", "finalize", "check_required_params"):
        operation = Launch(uuid="u")

        def broken(name=name, **kwargs):
            raise ValueError(name)

        setattr(operation, name, broken)
        call(name, operation.build, dice=1)
        show("status", operation.status)


@case("6.display")
def display_prints_the_tasks() -> None:
    inner = Launch(uuid="inner", tasks=[Roll(uuid="deep")])
    operation = Launch(uuid="u", tasks=[Roll(uuid="t", params={"a": 1}), inner])
    printed("display", operation.display)
    printed("empty", Launch(uuid="e").display)


if __name__ == "__main__":
    main()
