"""Section 3: how an entrypoint fails."""

from cdumay_error.types import NotFound, ValidationError
from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.entry import Entrypoint


class Probe(Entrypoint):
    """An entrypoint that prints the calls of its last hooks."""

    REQUIRED_FIELDS = ()

    def run(self):
        emit("run")
        return Result(stdout="out")

    def onsuccess(self, result):
        emit("onsuccess")
        return result

    def onerror(self, result):
        emit("onerror")
        return result


def raising(error: BaseException, where: str = "run"):
    """Return an entrypoint whose method raises an error."""

    def method(self, *_args):
        emit(where)
        raise error

    return type("Probe", (Probe,), {where: method})


@case("3.case.run-raises", "3.log.failed")
def run_raises_a_plain_exception() -> None:
    entry = raising(ValueError("x"))("u", {"a": 1}, Result(uuid="r", stdout="before"), {"m": 1})
    result = call("execute", entry.execute)
    show("same", result is entry.result)
    call("empty text", raising(KeyError())(uuid="u").execute)
    call("no text", raising(ValueError())(uuid="u").execute)
    call("odd text", raising(ValueError("a", 1))(uuid="u").execute)


@case("3.case.run-raises-error")
def run_raises_an_error_of_cdumay() -> None:
    call("validation", raising(ValidationError("bad", extra={"k": [1]}))(uuid="u").execute)
    call("uuid in extra", raising(NotFound("gone", extra={"uuid": "other"}))(uuid="u").execute)


@case("3.case.unsafe-raises")
def unsafe_execute_lets_exceptions_through() -> None:
    for where in ("run", "prerun", "postrun", "onsuccess"):
        entry = raising(ValueError("x"), where)(uuid="u")
        call(where, entry.unsafe_execute)
        show("result", entry.result)


@case("3.case.required-missing")
def a_required_parameter_is_missing() -> None:
    class Needy(Probe):
        REQUIRED_FIELDS = ("n", "m")

    call("execute", Needy(uuid="u").execute)
    call("execute m", Needy(uuid="u", params={"n": 1}).execute)


@case("3.case.required-missing-unsafe")
def a_required_parameter_is_missing_unsafely() -> None:
    class Needy(Probe):
        REQUIRED_FIELDS = ("n",)

    call("unsafe", Needy(uuid="u").unsafe_execute)


@case("3.case.hook-raises")
def prerun_or_postrun_raises() -> None:
    for where in ("prerun", "postrun"):
        call(where, raising(ValueError("x"), where)(uuid="u").execute)


@case("3.case.onsuccess-raises")
def onsuccess_raises() -> None:
    call("execute", raising(ValueError("x"), "onsuccess")(uuid="u").execute)


@case("3.case.onerror-raises")
def onerror_raises() -> None:
    probe = raising(ValueError("first"))
    probe.onerror = raising(KeyError("second"), "onerror").onerror
    call("execute", probe(uuid="u").execute)


@case("3.case.interrupted")
def exits_and_interrupts_go_through() -> None:
    for error in (SystemExit(3), KeyboardInterrupt()):
        entry = raising(error)(uuid="u")
        call(type(error).__name__, entry.execute)
        show("result", entry.result)


@case("3.case.postrun-not-called")
def postrun_is_not_called_after_a_failure() -> None:
    probe = raising(ValueError("x"))
    probe.postrun = lambda self, result: emit("postrun") or result
    call("execute", probe(uuid="u").execute)


@case("3.case.failed-again")
def a_failure_stays_when_executed_again() -> None:
    class Recovering(Probe):
        fail = True

        def run(self):
            if self.fail:
                raise ValueError("first")
            return Result(stdout="fine")

    entry = Recovering(uuid="u")
    call("first", entry.execute)
    entry.fail = False
    call("second", entry.execute)


@case("3.log.error-key")
def the_error_key_is_whatever_the_result_holds() -> None:
    class Holding(Probe):
        def run(self):
            return Result(retval={"error": ["own", "thing"]})

        def onsuccess(self, result):
            raise ValueError("late")

    call("kept", Holding(uuid="u").execute)
    call("text", Probe(uuid="u")._onerror, Result(retcode=4, stderr="e", retval={"error": "text"}))
    call("none", Probe(uuid="u")._onerror, Result(retcode=4, stderr="e"))
    call("falsy", Probe(uuid="u")._onerror, Result(retcode=4, stderr="e", retval={"error": {}}))


@case("3.case.postinit-raises")
def postinit_raises() -> None:
    probe = raising(ValueError("x"), "postinit")
    entry = call("construct", probe, uuid="u")
    show("result", entry.result)


@case("3.case.postinit-raises-execute")
def an_entrypoint_whose_postinit_failed_is_executed() -> None:
    entry = raising(ValueError("x"), "postinit")(uuid="u")
    call("execute", entry.execute)


@case("3.case.postinit-and-onerror-raise")
def postinit_and_onerror_raise() -> None:
    probe = raising(ValueError("x"), "postinit")
    probe.onerror = raising(KeyError("second"), "onerror").onerror
    call("construct", probe, uuid="u")


@case("3.case.trigger-raises")
def a_replaced_trigger_raises() -> None:
    for where in ("_prerun", "_run", "_postrun", "_onsuccess", "check_required_params"):
        call(where, raising(ValueError("x"), where)(uuid="u").execute)


if __name__ == "__main__":
    main()
