"""Section 4: a message, from its bytes to its result."""

import json
import os

from cdumay_result import Result
from recorder import call, case, emit, file, main, show

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.schemas import Message

UUID = "11111111-1111-4111-8111-111111111111"


class Probe(Entrypoint):
    """An entrypoint that prints the content of the running file."""

    def run(self):
        file("running", os.environ["RUNNING_FILE"])
        return Result(uuid="mine", stdout="out", retval={"n": self.params.get("n")})


class Noisy(Controller):
    """A controller whose hooks print their calls and return values of their own."""

    @classmethod
    def onmessage(cls, kmsg):
        emit(f"onmessage {kmsg.uuid}")
        return kmsg

    @classmethod
    def onsuccess(cls, kmsg, result):
        emit(f"onsuccess {kmsg.uuid} {result}")
        return "success"

    @classmethod
    def onerror(cls, kmsg, result):
        emit(f"onerror {kmsg.uuid} {result}")
        return "error"


def raw(entrypoint: str = "probe", **fields) -> str:
    """Return a message as JSON."""
    return json.dumps({"uuid": UUID, "entrypoint": entrypoint, **fields})


def entry(**members) -> None:
    """Register an entrypoint with the given members under the name probe."""
    Controller.register("probe", type("Probe", (Probe,), members))


def returning(value):
    """Register an entrypoint whose run returns a value."""
    entry(run=lambda self: value)


@case("4.run.sequence", "4.log.received-raw", "4.log.registered")
def a_message_is_run_from_text() -> None:
    entry()
    call("run", Controller.run, raw(params={"n": 1}, metadata={"m": 1}))
    file("after", os.environ["RUNNING_FILE"])


@case("4.run.bytes")
def a_message_is_run_from_bytes() -> None:
    call("run", Controller.run, raw().encode())
    call("instance", Controller().run, raw())
    call("keyword", Controller.run, raw_data=raw())


@case("4.run.hook-value")
def the_value_of_the_hook_is_what_run_returns() -> None:
    call("success", Noisy.run, raw())
    call("failure", Noisy.run, raw("unknown"))
    call("instance", Noisy().run, raw())


@case("4.run.onmessage-replaces")
def onmessage_may_replace_the_message() -> None:
    class Replacing(Noisy):
        @classmethod
        def onmessage(cls, kmsg):
            return Message("other", "probe", {"n": 2})

    call("run", Replacing.run, raw("unknown"))


@case("4.run.transport")
def any_class_with_loads_is_a_transport() -> None:
    class Upper(Message):
        @classmethod
        def loads(cls, json_data):
            emit(f"loads {json_data!r}")
            return cls("t", "probe")

    class Own(Controller):
        TRANSPORT = Upper

    call("run", Own.run, "anything")


@case("4.run.triggers")
def triggers_of_a_subclass_are_used_by_keyword() -> None:
    class Own(Controller):
        @classmethod
        def _onmessage(cls, *args, **kwargs):
            emit(f"_onmessage {len(args)} {sorted(kwargs)}")
            return args[0]

        @classmethod
        def _onsuccess(cls, *args, **kwargs):
            emit(f"_onsuccess {len(args)} {sorted(kwargs)}")
            return kwargs["result"]

        @classmethod
        def _onerror(cls, *args, **kwargs):
            emit(f"_onerror {len(args)} {sorted(kwargs)}")
            return kwargs["result"]

        @classmethod
        def start_processing(cls, *args, **kwargs):
            emit(f"start_processing {len(args)} {sorted(kwargs)}")

        @classmethod
        def stop_processing(cls, *args, **kwargs):
            emit(f"stop_processing {len(args)} {sorted(kwargs)}")

    call("success", Own.run, raw())
    call("failure", Own.run, raw("unknown"))


@case("4.case.unknown-entrypoint")
def an_unknown_entrypoint_is_refused() -> None:
    call("run", Controller.run, raw("unknown", params={"a": 1}))
    file("after", os.environ["RUNNING_FILE"])
    call("again", Controller.run, raw("unknown"))


@case("4.case.entry-fails")
def an_entrypoint_fails() -> None:
    def run(self):
        raise ValueError("x")

    entry(run=run)
    call("run", Controller.run, raw())
    file("after", os.environ["RUNNING_FILE"])


@case("4.case.success")
def retcode_zero_and_below_is_a_success() -> None:
    for retcode in (0, -1):
        returning(Result(retcode=retcode, stdout="out", stderr="err"))
        call(f"{retcode}", Controller.run, raw())


@case("4.case.below-300")
def retcodes_below_300() -> None:
    for retcode in (1, 299):
        returning(Result(retcode=retcode, stdout="out", stderr="err"))
        call(f"{retcode}", Noisy.run, raw())


@case("4.case.from-300")
def retcodes_from_300() -> None:
    for retcode in (300, 500):
        returning(Result(retcode=retcode, stdout="out", stderr="err"))
        call(f"{retcode}", Noisy.run, raw())


@case("4.case.returned-none")
def execute_returns_nothing() -> None:
    for value in (None, 0):
        entry(onsuccess=lambda self, result, value=value: value)
        call(f"{value!r}", Controller.run, raw())


@case("4.case.returned-foreign")
def execute_returns_something_else() -> None:
    for value in (5, {"a": 1}):
        entry(onsuccess=lambda self, result, value=value: value)
        call(f"{value!r}", Controller.run, raw())
        file("after", os.environ["RUNNING_FILE"])


@case("4.case.from-message-raises")
def building_the_entrypoint_raises() -> None:
    class Broken(Probe):
        @classmethod
        def from_Message(cls, kmsg):
            raise ValueError("cannot build")

    Controller.register("probe", Broken)
    call("run", Controller.run, raw())
    file("after", os.environ["RUNNING_FILE"])


@case("4.case.onerror-raises")
def onerror_of_the_entrypoint_raises() -> None:
    def run(self):
        raise ValueError("first")

    def onerror(self, result):
        raise KeyError("second")

    entry(run=run, onerror=onerror)
    call("run", Controller.run, raw())
    file("after", os.environ["RUNNING_FILE"])


@case("4.case.incoming-failed")
def a_message_whose_result_has_failed() -> None:
    entry(run=lambda self: emit("run"))
    call("run", Controller.run, raw(result={"uuid": "r", "retcode": 500, "stderr": "old"}))


@case("4.run.result-shared")
def the_message_of_the_controller_shows_the_final_result() -> None:
    entry()
    call("run", Controller.run, raw(result={"uuid": "r", "stdout": "before", "retval": {"a": 1}}))


@case("4.case.controller-hook-raises")
def a_hook_of_the_controller_raises() -> None:
    class Broken(Controller):
        @classmethod
        def onsuccess(cls, kmsg, result):
            raise ValueError("onsuccess failed")

        @classmethod
        def onerror(cls, kmsg, result):
            raise KeyError("onerror failed")

    entry()
    call("success", Broken.run, raw())
    call("failure", Broken.run, raw("unknown"))


@case("4.case.interrupted")
def an_interrupt_or_exit_in_the_entrypoint() -> None:
    for error in (SystemExit(3), KeyboardInterrupt()):

        def run(self, error=error):
            raise error

        entry(run=run)
        call(type(error).__name__, Controller.run, raw())
        file("after", os.environ["RUNNING_FILE"])


@case("4.case.running-file-unwritable")
def the_running_file_cannot_be_written() -> None:
    entry(run=lambda self: emit("run"))
    kept = os.environ["RUNNING_FILE"]
    os.environ["RUNNING_FILE"] = os.path.join(os.getcwd(), "missing", "run.lock")
    call("run", Controller.run, raw())
    os.environ["RUNNING_FILE"] = kept


@case("4.case.data-percent")
def percent_signs_in_data_are_harmless() -> None:
    returning(Result(stdout="%s %d"))
    call("run", Controller.run, raw(params={"%s": "%d"}))


@case("4.run.fresh")
def every_message_gets_an_entrypoint_of_its_own() -> None:
    class Counting(Probe):
        def run(self):
            self.params["seen"] = self.params.get("seen", 0) + 1
            return Result(stdout=str(self.params["seen"]))

    Controller.register("probe", Counting)
    show("first", Controller.run(raw()).stdout)
    show("second", Controller.run(raw()).stdout)


if __name__ == "__main__":
    main()
