"""Tests of operations: build and execute (section 6 of the behaviour page)."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser.controller import Controller
from kser.errors import UsageError
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.support import UUID, lines, message, ok_result, record_of, records

PATH = "tests.sequencing.test_operation.Game"
LABEL = f"{PATH}[{UUID}]"


class Roll(Task):
    REQUIRED_FIELDS = ("player",)

    def run(self) -> Result:
        return ok_result(f"{self.params['player']} rolls")


class Lose(Task):
    def run(self) -> Result:
        return Result(retcode=4, stderr="lost")


class Game(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Roll(params={"player": name}) for name in kwargs.get("players", ["x"])]


# -- construction ------------------------------------------------------------------------------------------------------


def test_constructor_arguments_follow_the_documented_order() -> None:
    """B2"""
    params, result, metadata, tasks = {"a": 1}, Result(), {"m": 1}, [Roll()]
    operation = Operation(UUID, params, "HALTED", result, metadata, tasks)
    assert (operation.uuid, operation.params, operation.status) == (UUID, params, "HALTED")
    assert (operation.result is result, operation.metadata is metadata, operation.tasks) == (True, True, tasks)


def test_positional_call_in_the_old_order_is_rejected() -> None:
    """B2"""
    with pytest.raises(
        UsageError,
        match=r"params must be a mapping, not the text 'PENDING'.*Operation\(uuid=..., params=..., status=...\)",
    ):
        Operation(UUID, "PENDING", {"a": 1})  # type: ignore[arg-type]


def test_tasks_are_copied_to_a_list() -> None:
    """B13"""
    task_tuple = (Roll(),)
    operation = Operation(tasks=task_tuple)
    operation.add_task(Roll())
    assert (len(operation.tasks), len(task_tuple)) == (2, 1)
    task_list = [Roll()]
    Operation(tasks=task_list).add_task(Roll())
    assert len(task_list) == 1


def test_tasks_exist_when_postinit_fails() -> None:
    """B15"""
    status_changes: list[tuple[str, list[Task]]] = []

    class FailingPostinit(Operation):
        def postinit(self) -> None:
            raise ValueError("postinit")

        def set_status(self, status: str, result: Result | None = None) -> Any:
            status_changes.append((status, list(self.tasks)))
            return super().set_status(status, result)

    task = Roll()
    operation = FailingPostinit(tasks=[task])
    assert status_changes == [("FAILED", [task])]
    assert operation.execute().stderr == "postinit"
    assert operation.status == "FAILED"


def test_repr_str_and_display_show_the_operation(capsys: pytest.CaptureFixture[str]) -> None:
    operation = Game(UUID, tasks=[Roll("1"), Roll("2")])
    text = f"Operation [Game](id={UUID},status=PENDING)"
    assert (repr(operation), str(operation)) == (text, text)
    assert operation.display() is None  # type: ignore[func-returns-value]
    assert capsys.readouterr().out == f"{text}\n  - {operation.tasks[0]}\n  - {operation.tasks[1]}\n"


def test_new_is_deprecated_with_one_warning() -> None:
    """B21b"""
    with pytest.warns(DeprecationWarning) as caught:
        operation = Game.new(uuid=UUID, params={"a": 1})
    assert (operation.uuid, operation.params, len(caught)) == (UUID, {"a": 1}, 1)
    assert caught[0].filename == __file__


def test_new_uses_an_override_of_parse_inputs() -> None:
    class ParsingGame(Game):
        @classmethod
        def parse_inputs(cls, **kwargs: Any) -> dict[str, Any]:
            return {"params": kwargs}

    with pytest.warns(DeprecationWarning) as caught:
        assert ParsingGame.new(a=1).params == {"a": 1}
    assert len(caught) == 1


def test_parse_inputs_is_deprecated_and_returns_its_arguments() -> None:
    with pytest.warns(DeprecationWarning):
        assert Game.parse_inputs(a=1) == {"a": 1}


# -- build -------------------------------------------------------------------------------------------------------------


def test_build_adds_tasks_and_returns_the_operation() -> None:
    operation = Game()
    assert operation.build(players=["a", "b"]) is operation
    assert [task.params["player"] for task in operation.tasks] == ["a", "b"]


def test_build_without_arguments_uses_the_params() -> None:
    """B21"""
    operation = Game(params={"players": ["a", "b"]})
    operation.build()
    assert len(operation.tasks) == 2
    operation.build(players=["c"])
    assert [task.params["player"] for task in operation.tasks] == ["c"]


def test_second_build_replaces_built_tasks_and_keeps_added_ones() -> None:
    """B13"""
    added = Roll()
    operation = Game(tasks=[added])
    operation.build()
    operation.build()
    assert len(operation.tasks) == 2
    assert operation.tasks[0] is added


def test_compute_tasks_adds_no_task() -> None:
    operation = Game()
    assert len(operation.compute_tasks(players=["a"])) == 1
    assert operation.tasks == []


def test_build_returns_the_value_of_finalize() -> None:
    class CountedGame(Game):
        def finalize(self) -> Any:
            return len(self.tasks)

    assert CountedGame().build() == 1


def test_prebuild_replaces_the_arguments_unless_it_returns_none() -> None:
    class PrebuildGame(Game):
        def prebuild(self, **kwargs: Any) -> Any:
            return {"players": ["prepared"]} if kwargs.get("prepare") else None

    operation = PrebuildGame()
    assert operation.compute_tasks(prepare=True)[0].params == {"player": "prepared"}
    assert operation.compute_tasks(players=["given"])[0].params == {"player": "given"}


def test_hooks_without_keywords_are_called_without_arguments(caplog: pytest.LogCaptureFixture) -> None:
    """B21b"""
    caplog.set_level(logging.DEBUG, "kser")

    class NoKeywords(Operation):
        def prebuild(self) -> None:  # type: ignore[override]
            return None

        def build_tasks(self) -> list[Task]:  # type: ignore[override]
            return [Lose()]

    operation = NoKeywords(UUID, {"a": 1})
    operation.build()
    assert len(operation.tasks) == 1
    assert lines(caplog)[0] == f"NoKeywords.PreBuild: tests.sequencing.test_operation.NoKeywords[{UUID}]: {{}}"


def test_hooks_may_be_any_callables() -> None:
    class UnhashableHook:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, players: list[str]) -> list[Task]:
            return [Lose() for _ in players]

    operation = Operation(UUID, {"players": ["a", "b"]})
    operation.build_tasks = UnhashableHook()  # type: ignore[method-assign]
    operation.prebuild = lambda: None  # type: ignore[method-assign, assignment]
    operation.build()
    assert len(operation.tasks) == 2


def test_build_logs_the_published_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kser")
    Game(UUID, metadata={"m": 1}).build(players=["a"])
    assert lines(caplog) == [f"Game.PreBuild: {LABEL}: {{'players': ['a']}}", "Game.BuildTasks: 1 task(s) found"]
    assert {(record.name, record.levelname) for record in records(caplog)} == {("kser.sequencing.operation", "DEBUG")}
    assert [record.kmsg["metadata"] for record in records(caplog)] == [{"m": 1}] * 2  # type: ignore[attr-defined]


def test_required_parameters_are_those_of_the_operation_and_its_classes() -> None:
    """B14: the classes in ``TASKS`` count, and their own ``TASKS`` do not."""

    class Inner(Operation):
        REQUIRED_FIELDS = ("inner",)
        TASKS = (Roll,)

    class Outer(Operation):
        REQUIRED_FIELDS = ("outer",)
        TASKS = (Inner, Lose)

    Outer(params={"outer": 1, "inner": None}).check_required_params()
    with pytest.raises(ValidationError) as caught:
        Outer(params={"outer": 1}).check_required_params()
    assert caught.value.message == "Missing parameter: inner for tests.sequencing.test_operation.Inner"
    with pytest.raises(ValidationError, match=r"Missing parameter: outer for tests\.sequencing\.test_operation\.Outer"):
        Outer().build()


def test_tasks_inherit_no_params() -> None:
    """B14"""

    class RollOnce(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Roll()]

    assert RollOnce(params={"player": "x"}).execute().stderr == "Missing parameter: player"


# -- execution ---------------------------------------------------------------------------------------------------------


def test_successful_operation_logs_the_published_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kser")
    operation = Game(UUID, tasks=[Roll("1", {"player": "a"}), Roll("2", {"player": "b"})])
    operation.execute()
    roll = [
        line
        for number, name in ((1, "a"), (2, "b"))
        for line in (
            *(f"Roll.{tag}: {Roll.path}[{number}]" for tag in ("PreRun", "Run", "PostRun")),
            f"Roll.Success: {Roll.path}[{number}]: {name} rolls",
        )
    ]
    assert lines(caplog) == [
        f"Game.SetStatus: {LABEL} status update 'PENDING' -> 'RUNNING'",
        f"Game.PreRun: {LABEL}: running...",
        *roll,
        f"Game.SetStatus: {LABEL} status update 'RUNNING' -> 'SUCCESS'",
        f"Game.Success: {LABEL}: b rolls",
    ]
    assert operation.status == "SUCCESS"


def test_log_records_of_an_operation_have_metadata_and_a_blank_result(caplog: pytest.LogCaptureFixture) -> None:
    """B16"""
    caplog.set_level(logging.DEBUG, "kser")
    Game(UUID, result=ok_result("before"), metadata={"m": 1}).execute()
    operation_records = [record for record in records(caplog) if record.name == "kser.sequencing.operation"]
    assert len(operation_records) == 6
    assert {str(record.kmsg["metadata"]) for record in operation_records} == {"{'m': 1}"}  # type: ignore[attr-defined]
    assert {record.kmsg["result"]["stdout"] for record in operation_records} == {""}  # type: ignore[attr-defined]
    assert record_of(caplog, "Game.Success").kresult["stdout"] == "x rolls"  # type: ignore[attr-defined]


def test_failed_operation_logs_the_published_lines(caplog: pytest.LogCaptureFixture) -> None:
    """B6, B8"""
    caplog.set_level(logging.INFO, "kser")
    second = Roll()
    operation = Game(UUID, tasks=[Lose("1"), second])
    result = operation.execute()
    assert lines(caplog) == [
        f"Game.SetStatus: {LABEL} status update 'PENDING' -> 'RUNNING'",
        f"Lose.Failed: {Lose.path}[1]: lost",
        f"Game.SetStatus: {LABEL} status update 'RUNNING' -> 'FAILED'",
        f"Game.Failed: {LABEL}: lost",
    ]
    assert (result.retcode, operation.status, second.status) == (4, "FAILED", "PENDING")
    assert not hasattr(record_of(caplog, "Game.Failed"), "error")


def test_missing_parameter_fails_the_operation_before_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kser")

    class StrictGame(Game):
        REQUIRED_FIELDS = ("bet",)

    operation = StrictGame(UUID)
    assert operation.execute().retcode == 400
    assert [line.split(": ")[0] for line in lines(caplog)] == ["StrictGame.SetStatus", "StrictGame.Failed"]
    assert "'PENDING' -> 'FAILED'" in lines(caplog)[0]
    with pytest.raises(ValidationError):
        StrictGame(UUID).unsafe_execute()


@pytest.mark.parametrize(
    ("hook", "states"), [("prerun", ["RUNNING", "FAILED"]), ("onsuccess", ["RUNNING", "SUCCESS", "FAILED"])]
)
def test_raising_hook_fails_the_operation(hook: str, states: list[str]) -> None:
    seen: list[str] = []

    def fail(self: Any, *_: Any) -> None:
        raise ValueError(hook)

    def set_status(self: Any, status: str, result: Result | None = None) -> None:
        seen.append(status)

    cls = type("Hooked", (Game,), {hook: fail, "set_status": set_status})
    assert cls().execute().stderr == hook
    assert seen == states


def test_raising_onerror_hook_gives_a_failed_result() -> None:
    """C6"""

    class FailingOnerror(Game):
        def onerror(self, result: Result) -> Any:
            raise RuntimeError("hook")

    result = FailingOnerror(UUID, tasks=[Lose()]).execute()
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 500, "hook")


def test_set_status_receives_the_result_and_its_value_is_returned() -> None:
    """S1: every status is accepted, because users have their own ones."""
    calls: list[tuple[str, Any]] = []

    class OwnStatusGame(Game):
        def set_status(self, status: str, result: Result | None = None) -> Any:
            calls.append((status, result))
            self.status = f"own {status}"
            return "recorded"

    operation = OwnStatusGame()
    result = operation.execute()
    assert calls == [("RUNNING", None), ("SUCCESS", result)]
    assert operation._set_status("HALTED") == "recorded"
    assert operation.status == "own HALTED"


def test_unbuilt_operation_builds_itself_on_execute() -> None:
    """B3"""
    operation = Game(params={"players": ["a", "b"]})
    assert operation.execute().stdout == "b rolls"
    assert len(operation.tasks) == 2


@pytest.mark.parametrize("hook", ["prerun", "postinit"])
def test_operation_that_builds_itself_is_not_built_twice(hook: str) -> None:
    """B3"""
    builds: list[int] = []

    def build_tasks(self: Any, **kwargs: Any) -> list[Task]:
        builds.append(1)
        return []

    cls = type("SelfBuilding", (Operation,), {hook: lambda self: self.build(), "build_tasks": build_tasks})
    assert cls().execute().retcode == 0
    assert len(builds) == 1


def test_empty_operation_succeeds_with_its_own_blank_result(caplog: pytest.LogCaptureFixture) -> None:
    """B4: the log line is the one of 0.8.27."""
    caplog.set_level(logging.INFO, "kser")
    operation = Operation(UUID)
    result = operation.execute()
    assert (result is operation.result, result.uuid, result.retcode, result.retval) == (True, UUID, 0, {})
    assert lines(caplog)[-1] == f"Operation.Success: kser.sequencing.operation.Operation[{UUID}]: None"
    assert record_of(caplog, "Operation.Success").kresult == {}  # type: ignore[attr-defined]


def test_empty_operation_with_a_failed_incoming_result_fails() -> None:
    """C3: an incoming result with a return code other than 0 makes the entry FAILED, after it ran."""
    operation = Operation(UUID, result=Result(retcode=2, stderr="old"))
    assert operation.execute().retcode == 2
    assert operation.status == "FAILED"


def test_missing_failure_result_is_tolerated() -> None:
    """B17"""
    operation = Operation(UUID)
    assert operation._onerror(None).uuid == UUID
    assert operation.status == "FAILED"


def test_operation_by_message_is_built_and_run(caplog: pytest.LogCaptureFixture) -> None:
    """B3, B10"""
    caplog.set_level(logging.INFO, "kser")
    Controller.register(Game.path, Game)
    result = Controller.run(message(Game, params={"players": ["a", "b"]}, result=Result(retval={"m": 1})).dumps())
    assert (result.uuid, result.stdout, result.retval) == (UUID, "b rolls", {"m": 1})
    assert lines(caplog)[-2:] == [f"Game.Success: {LABEL}: b rolls", f"Controller.Success: {LABEL}: b rolls"]


def test_empty_operation_by_message_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    """B3, B4"""
    caplog.set_level(logging.INFO, "kser")

    class Empty(Operation):
        pass

    Controller.register(Empty.path, Empty)
    assert Controller.run(message(Empty).dumps()).uuid == UUID
    assert [line.split(":")[0] for line in lines(caplog)][-2:] == ["Empty.Success", "Controller.Success"]


def test_controller_log_shows_the_result_of_an_operation(caplog: pytest.LogCaptureFixture) -> None:
    """C19"""
    caplog.set_level(logging.INFO, "kser")
    Controller.register(Game.path, Game)
    Controller.run(message(Game).dumps())
    assert record_of(caplog, "Controller.Success").kmsg["result"]["stdout"] == "x rolls"  # type: ignore[attr-defined]


def test_ordinary_use_emits_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Game().build().execute()
