"""Section 3: the life cycle of an entrypoint, its log lines and its result."""

from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.entry import Entrypoint


class Probe(Entrypoint):
    """An entrypoint that returns the value of ``RETURNS``."""

    RETURNS = None

    def run(self):
        emit("run")
        return self.RETURNS


def returning(value, **attributes):
    """Return an entrypoint whose run returns a value."""
    return type("Probe", (Probe,), {"RETURNS": value, **attributes})


class Noisy(Entrypoint):
    """An entrypoint that prints the calls of its hooks."""

    def postinit(self):
        emit("postinit")

    def prerun(self):
        emit("prerun")
        return "ignored"

    def run(self):
        emit("run")
        return Result(uuid="mine", stdout="out", retval={"n": 1})

    def postrun(self, result):
        emit(f"postrun {result.stdout}")
        return result

    def onsuccess(self, result):
        emit(f"onsuccess {result.stdout}")
        return result

    def onerror(self, result):
        emit(f"onerror {result.stderr}")
        return result


@case("3.cycle.order", "3.log.pre-run", "3.log.run", "3.log.post-run", "3.log.success", "3.log.kmsg")
def the_life_cycle_in_order() -> None:
    entry = Noisy("u", {"a": 1}, Result(uuid="r", stdout="before", retval={"m": 0}), {"meta": 1})
    result = call("execute", entry.execute)
    show("same object", result is entry.result)


@case("3.cycle.unsafe")
def unsafe_execute_has_the_same_order() -> None:
    entry = Noisy(uuid="u")
    result = call("unsafe_execute", entry.unsafe_execute)
    show("same object", result is entry.result)


@case("3.cycle.input")
def a_result_that_is_given_is_merged_first() -> None:
    given = Result(uuid="given", stdout="given", retval={"x": 1, "n": 0})
    entry = Noisy(uuid="u")
    call("execute", entry.execute, given)
    show("given", given)
    call("keyword", Noisy(uuid="u").execute, result=Result(uuid="g", stderr="warned"))
    for value in (None, False, 0):
        call(f"falsy {value!r}", returning(None)(uuid="u").execute, value)
    call("unsafe", Noisy(uuid="u").unsafe_execute, result=given)


@case("3.cycle.not-a-result")
def what_is_given_must_be_a_result() -> None:
    call("execute", returning(None)(uuid="u").execute, "text")
    call("unsafe", returning(None)(uuid="u").unsafe_execute, "text")


@case("3.case.run-result")
def the_result_of_run_is_merged_into_the_own_one() -> None:
    own = Result(uuid="own", stdout="kept", retval={"a": 1})
    returned = Result(uuid="mine", stderr="note", retval={"b": 2})
    entry = returning(returned)(uuid="u", result=own)
    result = call("execute", entry.execute)
    show("same", (result is own, entry.result is own))
    show("untouched", returned)


@case("3.case.run-falsy")
def a_falsy_return_value_is_a_success() -> None:
    for value in (None, 0, False, [], (), "", {}):
        call(repr(value), returning(value)(uuid="u").execute)


@case("3.case.run-foreign")
def a_return_value_that_is_no_result_is_a_failure() -> None:
    for value in ("text", {"a": 1}, 5, [1], True):
        call(repr(value), returning(value)(uuid="u").execute)
    call("unsafe", returning("text")(uuid="u").unsafe_execute)


@case("3.case.postrun-value")
def postrun_decides_what_is_merged() -> None:
    for value in (None, Result(uuid="p", stdout="post"), "text", 0):
        probe = returning(Result(uuid="mine", stdout="run"), postrun=lambda self, result, value=value: value)
        call(repr(value)[:20], probe(uuid="u").execute)


@case("3.case.retcode-returned")
def a_returned_retcode_other_than_zero() -> None:
    for retcode in (1, 299, 300, 500):
        probe = returning(Result(retcode=retcode, stdout="out", stderr="err"))
        probe.onsuccess = lambda self, result: emit("onsuccess") or result
        probe.onerror = lambda self, result: emit("onerror") or result
        call(f"{retcode}", probe(uuid="u").execute)
        call(f"{retcode} unsafe", probe(uuid="u").unsafe_execute)


@case("3.case.retcode-negative")
def a_negative_retcode_is_merged_to_zero() -> None:
    call("execute", returning(Result(retcode=-1, stdout="out", stderr="err"))(uuid="u").execute)


@case("3.case.retcode-odd")
def a_retcode_that_is_no_number_is_a_failure() -> None:
    call("text", returning(Result(retcode="1"))(uuid="u").execute)
    call("none", returning(Result(retcode=None))(uuid="u").execute)
    call("float", returning(Result(retcode=0.5, stderr="half"))(uuid="u").execute)


@case("3.case.previous-failed")
def a_failed_input_stays_failed() -> None:
    entry = returning(Result(stdout="fine"))(uuid="u")
    call("execute", entry.execute, Result(retcode=2, stderr="old"))
    call("in the message", returning(None)(uuid="u", result=Result(uuid="r", retcode=2, stderr="old")).execute)
    call("unsafe", returning(None)(uuid="u").unsafe_execute, Result(retcode=2, stderr="old"))


@case("3.case.twice")
def executing_twice_keeps_what_was() -> None:
    entry = Noisy(uuid="u")
    call("first", entry.execute)
    call("second", entry.execute)


@case("3.hooks.value")
def the_value_of_the_last_hook_is_returned() -> None:
    for value in (None, "text", 5):
        call(f"onsuccess {value!r}", returning(None, onsuccess=lambda self, r, v=value: v)(uuid="u").execute)
    failing = returning("text", onerror=lambda self, r: "handled")
    call("onerror", failing(uuid="u").execute)
    call("unsafe", returning(None, onsuccess=lambda self, r: "done")(uuid="u").unsafe_execute)


@case("3.triggers")
def underscore_triggers_are_always_used() -> None:
    class Triggered(Noisy):
        def _prerun(self):
            emit("_prerun")
            return super()._prerun()

        def _run(self):
            emit("_run")
            return super()._run()

        def _postrun(self, result):
            emit("_postrun")
            return super()._postrun(result)

        def _onsuccess(self, result):
            emit("_onsuccess")
            return super()._onsuccess(result)

        def _onerror(self, result):
            emit("_onerror")
            return super()._onerror(result)

    call("execute", Triggered(uuid="u").execute)
    Triggered.run = lambda self: 1 / 0
    call("failing", Triggered(uuid="u").execute)


@case("3.triggers.replaced")
def triggers_may_be_replaced() -> None:
    class Bare(Probe):
        def _prerun(self):
            emit("_prerun")

        def _run(self):
            emit("_run")
            return Result(stdout="from _run")

        def _postrun(self, result):
            emit("_postrun")
            return result

        def _onsuccess(self, result):
            emit("_onsuccess")
            return "value"

    call("execute", Bare(uuid="u").execute)
    call("direct", Probe(uuid="u")._onsuccess, Result(uuid="r", stdout="x"))
    call("direct error", Probe(uuid="u")._onerror, Result(uuid="r", retcode=3, stderr="x"))
    call("direct run", Probe(uuid="u")._run)
    call("direct postrun", Probe(uuid="u")._postrun, None)
    call("direct prerun", Probe(uuid="u")._prerun)


@case("3.log.percent")
def percent_signs_in_data_are_harmless() -> None:
    call("execute", returning(Result(stdout="100 %s %d"))(uuid="%s").execute)


@case("3.log.kresult")
def the_logged_result_is_dumped() -> None:
    call("unserialisable", returning(Result(retval={"x": {1}}))(uuid="u").execute)


if __name__ == "__main__":
    main()
