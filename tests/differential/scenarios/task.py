"""Section 5: tasks."""

import logging

from cdumay_result import Result
from recorder import call, case, describe, emit, main, show

from kser.entry import Entrypoint
from kser.schemas import Message
from kser.sequencing.task import Task


class Roll(Task):
    """A task."""

    def run(self):
        emit(f"status {self.status}")
        return Result(uuid="mine", stdout="rolled")


@case("5.module.exports")
def the_package_exports_nothing() -> None:
    import kser.sequencing as sequencing

    public = [name for name in vars(sequencing) if not name.startswith("_")]
    show("modules only", [name for name in public if type(vars(sequencing)[name]).__name__ != "module"])
    show("subclass", issubclass(Task, Entrypoint))


@case("5.ctor")
def the_constructor_takes_a_status_in_third_place() -> None:
    result = Result(uuid="r")
    task = Roll("u", {"a": 1}, "MINE", result, {"m": 1})
    show("values", (task.uuid, task.params, task.status, task.result is result, task.metadata))
    task = Roll()
    show("defaults", (task.uuid, task.params, task.status, task.result, task.metadata))
    for status in (None, 5, "", "success"):
        show(f"status {status!r}", Roll(status=status).status)
    call("unknown", Roll, tasks=[])


@case("5.ctor.status-first")
def the_status_is_there_in_postinit() -> None:
    class Early(Roll):
        def postinit(self):
            emit(f"postinit {self.status} {self.uuid}")

    Early(uuid="u", status="RUNNING")


@case("5.init-by-id")
def init_by_id_gives_nothing() -> None:
    call("class", Roll.init_by_id, 5)
    call("instance", Roll().init_by_id, _id="x")


@case("5.get-attr")
def get_attr_looks_for_an_id() -> None:
    class Parent:
        """An object with an id."""

        parentId = 7  # noqa: N815

    task = Roll(uuid="u")
    call("absent", task.get_attr, "parent")
    task.parentId = 3
    call("on self", task.get_attr, "parent")
    task.parent = Parent()
    call("on the attribute", task.get_attr, "parent")
    task.parent = None
    call("attribute without id", task.get_attr, "parent")
    task.owner = Parent()
    call("other name", task.get_attr, "owner")
    call("keyword", task.get_attr, item="parent")


@case("5.log")
def log_shows_the_status_and_adds_the_message() -> None:
    task = Roll("u", {"a": 1}, "WAITING", Result(uuid="r", stdout="x"), {"m": 1})
    call("default", task.log, "hello")
    call("level", task.log, "hello", logging.WARNING)
    call("keywords", task.log, message="hello", level=logging.DEBUG)
    call("percent", task.log, "100 %s")


@case("5.log.extra")
def log_adds_to_the_extra_of_the_caller() -> None:
    task = Roll(uuid="u")
    call("extra", task.log, "hello", extra={"mine": 1})
    call("override", task.log, "hello", extra={"kmsg": "mine"})


@case("5.log.extra-mutated")
def log_and_the_mapping_of_the_caller() -> None:
    extra = {"mine": 1}
    Roll(uuid="u").log("hello", extra=extra)
    show("keys", sorted(extra))


@case("5.log.extra-none")
def log_without_extra() -> None:
    call("none", Roll(uuid="u").log, "hello", extra=None)


@case("5.log.args")
def log_with_arguments_to_format() -> None:
    call("args", Roll(uuid="u").log, "hello %s", logging.INFO, "world")


@case("5.repr")
def repr_and_str_of_a_task() -> None:
    task = Roll("u", {"a": 1}, "WAITING")
    show("repr", repr(task))
    show("str", str(task))
    show("base", repr(Task(uuid="u")))


@case("5.life-cycle")
def the_life_cycle_logs_as_an_entrypoint() -> None:
    task = Roll(uuid="u", params={"a": 1}, metadata={"m": 1})
    call("execute", task.execute, result=Result(uuid="before", retval={"x": 1}))


@case("5.status.unchanged")
def the_status_while_and_after_running() -> None:
    task = Roll(uuid="u")
    call("execute", task.execute)
    show("after", task.status)
    task = Roll(uuid="u")
    call("unsafe", task.unsafe_execute)
    show("after", task.status)

    class Failing(Roll):
        def run(self):
            raise ValueError("x")

    task = Failing(uuid="u", status="MINE")
    call("execute", task.execute)
    show("after", task.status)
    task = Failing(uuid="u", status="MINE")
    call("unsafe", task.unsafe_execute)
    show("after", task.status)


@case("5.status.postinit")
def the_status_after_a_failed_postinit() -> None:
    class Broken(Roll):
        def postinit(self):
            raise ValueError("x")

    task = Broken(uuid="u")
    show("after", task.status)


@case("5.message.status")
def messages_do_not_carry_the_status() -> None:
    task = Roll("u", {"a": 1}, "SUCCESS", Result(uuid="r"), {"m": 1})
    message = call("to", task.to_Message)
    again = Roll.from_Message(message)
    show("from", (again.uuid, again.params, again.status, again.metadata))
    call("from other", Roll.from_Message, Message("u", "any"))


@case("5.send")
def a_task_and_send() -> None:
    emit(f"has send {hasattr(Task, 'send')}")


@case("5.send.own")
def a_users_own_attributes_win() -> None:
    class Own(Roll):
        TOPIC = "mine"
        RETRY = 3
        TIME_LIMIT = 5
        DISTRIBUTED = "no"

        def postinit(self):
            self.attempt = 7
            self.operation_uuid = "o"
            self.cancel_requested = "c"

        def send(self, *args, **kwargs):
            return ("sent", args, kwargs)

    task = Own(uuid="u")
    call("send", task.send, 1, a=2)
    show("attributes", describe([task.attempt, task.operation_uuid, task.cancel_requested, task.TOPIC, task.RETRY]))
    call("execute", task.execute)


if __name__ == "__main__":
    main()
