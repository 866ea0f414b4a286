"""Section 6: the search for the next task, and the launch."""

import uuid

from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.sequencing.operation import Operation
from kser.sequencing.task import Task


class Sent(Task):
    """A task with a send method, which users of the published package had to write."""

    def run(self):
        return Result(stdout="ran")

    def send(self, result=None):
        emit(f"send {self.uuid} result={result}")
        return Result(uuid=f"sent-{self.uuid}")


class Plain(Task):
    """A task without a send method of the user."""

    def run(self):
        return Result(stdout="ran")


class Launch(Operation):
    """An operation of given tasks."""


def operation(*states: str, kind=Sent, **fields) -> Launch:
    """Return an operation with one task for each of the given statuses."""
    tasks = [kind(uuid=f"t{n}", status=state) for n, state in enumerate(states, 1)]
    return Launch(uuid="u", tasks=tasks, **fields)


def next_of(target: Launch, task) -> str | None:
    """Return the uuid of the next task."""
    found = target.next(task)
    return found and found.uuid


@case("6.next.following", "6.next.skips-success", "6.next.none")
def next_is_the_following_unfinished_task() -> None:
    target = operation("PENDING", "SUCCESS", "SUCCESS", "FAILED", "PENDING")
    for task in target.tasks:
        show(task.uuid, next_of(target, task))
    call("unknown", target.next, Sent(uuid="other"))
    call("empty", operation().next, Sent(uuid="t1"))
    done = operation("PENDING", "SUCCESS")
    call("only finished left", done.next, done.tasks[0])
    call("keyword", target.next, task=target.tasks[4])


@case("6.next.uuid-only")
def next_needs_a_uuid_only() -> None:
    class Thing:
        """An object with a uuid."""

        uuid = "t1"

    target = operation("PENDING", "PENDING")
    show("thing", next_of(target, Thing()))
    call("none", target.next, None)
    call("text", target.next, "t1")


@case("6.next.uuid-objects")
def tasks_whose_uuid_is_an_object() -> None:
    first, second = Sent(uuid=uuid.UUID(int=1)), Sent(uuid="t2")
    target = Launch(uuid="u", tasks=[first, second])
    show("object", next_of(target, first))

    class Thing:
        """An object whose uuid is equal as text."""

        uuid = str(first.uuid)

    show("text", next_of(target, Thing()))


@case("6.launch-next.sends")
def launch_next_sends_the_next_task() -> None:
    target = operation("PENDING", "PENDING")
    call("first", target.launch_next)
    call("with result", target.launch_next, None, Result(uuid="r", stdout="before"))
    call("next", target.launch_next, target.tasks[0], Result(uuid="r", stdout="one"))
    call("keywords", target.launch_next, task=target.tasks[0], result=None)
    show("status", target.status)


@case("6.launch-next.value")
def launch_next_returns_what_send_returned() -> None:
    target = operation("PENDING")
    target.tasks[0].send = lambda result=None: "value"
    call("value", target.launch_next)
    target.tasks[0].send = lambda result=None: None
    call("nothing", target.launch_next)


@case("6.launch-next.finish")
def launch_next_after_the_last_task() -> None:
    for state in ("PENDING", "SUCCESS", "FAILED"):
        target = operation("SUCCESS", state)
        call(state, target.launch_next, target.tasks[1], Result(uuid="r", stdout="end"))
        show("status", target.status)
    target = operation("SUCCESS")
    target.set_status = lambda status, result=None: emit(f"set_status {status} {result}") or "value"
    call("own set_status", target.launch_next, target.tasks[0], Result(uuid="r", stdout="end"))


@case("6.launch-next.failed")
def launch_next_after_a_failure() -> None:
    target = operation("FAILED", "PENDING")
    call("status", target.launch_next, target.tasks[0], Result(uuid="r"))
    show("status", target.status)
    target = operation("PENDING", "PENDING")
    call("retcode", target.launch_next, target.tasks[0], Result(uuid="r", retcode=3, stderr="bad"))
    show("status", target.status)


@case("6.launch.first-finished")
def launch_when_the_first_task_has_finished() -> None:
    target = operation("SUCCESS", "PENDING")
    call("launch", target.launch)
    show("status", target.status)


@case("6.launch.empty")
def launch_of_an_empty_operation() -> None:
    target = operation()
    call("launch", target.launch)
    call("launch_next", target.launch_next)
    show("status", target.status)


@case("6.launch")
def launch_is_launch_next() -> None:
    target = operation("PENDING", "PENDING")
    call("launch", target.launch)
    target.launch_next = lambda *args, **kwargs: ("launched", args, kwargs)
    call("own", target.launch)


@case("6.launch.no-send")
def tasks_without_send_of_their_own() -> None:
    target = operation("PENDING", kind=Plain)
    call("launch", target.launch)
    call("launch_next", target.launch_next)
    show("status", target.status)


@case("6.launch.nested")
def an_operation_inside_is_sent_as_a_whole() -> None:
    inner = Launch(uuid="inner", tasks=[Plain(uuid="deep")])
    target = Launch(uuid="u", tasks=[inner])
    call("launch", target.launch)


if __name__ == "__main__":
    main()
