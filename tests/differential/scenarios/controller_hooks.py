"""Section 4: the hooks that controllers and producers share, the registration of entrypoints, the running file."""

import os
from typing import ClassVar

from cdumay_result import Result
from recorder import call, case, emit, file, main, show

from kser.controller import BaseController, BaseProducer, Controller
from kser.entry import Entrypoint
from kser.schemas import Message


def message(**fields) -> Message:
    """Return a message with a readable uuid and the given fields."""
    return Message(**{"uuid": "u-1", "entrypoint": "shop.Order", **fields})


class Probe(Entrypoint):
    """An entrypoint to register."""


@case("4.base.hooks")
def hooks_return_their_last_argument() -> None:
    kmsg, result = message(), Result(uuid="r")
    for controller in (BaseController, Controller, BaseProducer):
        show(controller.__name__, controller.onmessage(kmsg) is kmsg)
        show("onsuccess", controller.onsuccess(kmsg, result) is result)
        show("onerror", controller.onerror(kmsg, result) is result)
        show("named", controller.onerror(kmsg=kmsg, result=result) is result)


@case("4.base.triggers", "4.log.received-message", "4.log.success", "4.log.failed")
def triggers_log_and_call_their_hook() -> None:
    kmsg = message(params={"a": 1}, metadata={"m": 2})
    for controller in (BaseController, Controller, BaseProducer, Controller()):
        call("_onmessage", controller._onmessage, kmsg)
        call("_onsuccess", controller._onsuccess, kmsg=kmsg, result=Result(uuid="r", stdout="out"))
        call("_onerror", controller._onerror, kmsg=kmsg, result=Result(uuid="r", retcode=3, stderr="err"))


@case("4.log.error-key")
def a_failure_is_logged_without_an_error_key() -> None:
    failed = Result(uuid="r", retcode=3, stderr="err", retval={"error": {"a": 1}})
    call("_onerror", Controller._onerror, kmsg=message(), result=failed)


@case("4.log.falsy-result")
def a_falsy_result_is_logged_as_an_empty_mapping() -> None:
    for value in (None, 0, ""):
        call(f"_onsuccess {value!r}", Controller._onsuccess, kmsg=message(), result=value)
        call(f"_onerror {value!r}", Controller._onerror, kmsg=message(), result=value)


@case("4.base.value")
def triggers_return_what_the_hook_returns() -> None:
    class Own(Controller):
        @classmethod
        def onmessage(cls, kmsg):
            return "message"

        @classmethod
        def onsuccess(cls, kmsg, result):
            return "success"

        @classmethod
        def onerror(cls, kmsg, result):
            return "error"

    call("_onmessage", Own._onmessage, message())
    call("_onsuccess", Own._onsuccess, message(), Result(uuid="r"))
    call("_onerror", Own._onerror, message(), Result(uuid="r"))


@case("4.base.instance-hook")
def hooks_that_are_instance_methods_fail() -> None:
    class Own(Controller):
        def onmessage(self, kmsg):
            return kmsg

        def onsuccess(self, kmsg, result):
            return result

        def onerror(self, kmsg, result):
            return result

    call("_onmessage", Own()._onmessage, message())
    call("_onsuccess", Own()._onsuccess, kmsg=message(), result=Result(uuid="r"))
    call("_onerror", Own()._onerror, kmsg=message(), result=Result(uuid="r"))


@case("4.producer.send")
def a_base_producer_sends_nothing() -> None:
    producer = BaseProducer()
    call("_send", producer._send, "topic", message())
    call("send", producer.send, "topic", message())
    call("send timeout", producer.send, "topic", message(), timeout=5)

    class Own(BaseProducer):
        def _send(self, *args, **kwargs):
            return (len(args), args[0], args[2], kwargs)

    call("own", Own().send, "topic", message())
    call("own timeout", Own().send, topic="topic", kmsg=message(), timeout=7)
    show("subclass", issubclass(BaseProducer, BaseController))


@case("4.class.attributes", "4.class.shared")
def entrypoints_are_shared_by_all_controllers() -> None:
    class Child(Controller):
        """A controller that shares its entrypoints with its base class."""

    class Apart(Controller):
        """A controller with its own entrypoints."""

        ENTRYPOINTS: ClassVar[dict] = {}

    Child.register("shared", Probe)
    Apart.register("apart", Probe)
    show("controller", sorted(Controller.ENTRYPOINTS))
    show("child", Child.ENTRYPOINTS is Controller.ENTRYPOINTS)
    show("instance", Controller().ENTRYPOINTS is Controller.ENTRYPOINTS)
    show("apart", sorted(Apart.ENTRYPOINTS))
    show("transport", Controller.TRANSPORT)
    Controller.ENTRYPOINTS.clear()


@case("4.register.stores", "4.log.registered")
def register_stores_and_overwrites() -> None:
    class Other(Probe):
        """A second entrypoint for the same name."""

    call("register", Controller.register, "name", Probe)
    call("again", Controller.register, "name", Other)
    call("keyword", Controller.register, name="second", entrypoint=Probe)
    call("number", Controller.register, 5, Probe)
    call("unhashable", Controller.register, [], Probe)
    call("instance", Controller().register, "third", Probe)
    show("registered", Controller.ENTRYPOINTS)
    Controller.ENTRYPOINTS.clear()


@case("4.register.not-entrypoint")
def a_class_that_is_no_entrypoint_is_refused() -> None:
    call("class", Controller.register, "name", int)
    call("controller", Controller.register, "name", Controller)
    show("registered", Controller.ENTRYPOINTS)


@case("4.register.not-class")
def what_is_no_class_is_refused() -> None:
    for value in ("text", None, Probe(uuid="u"), 5):
        call(type(value).__name__, Controller.register, "name", value)
    show("registered", Controller.ENTRYPOINTS)


@case("4.start-processing", "4.stop-processing")
def the_running_file_names_the_message() -> None:
    running = os.environ["RUNNING_FILE"]
    file("before", running)
    call("stop", Controller.stop_processing)
    file("stopped", running)
    call("start", Controller.start_processing, message(entrypoint="a.much.longer.Name"))
    file("started", running)
    call("start again", Controller.start_processing, kmsg=message())
    file("overwritten", running)
    call("accents", Controller().start_processing, message(entrypoint="shop.\u00c9\u20ac"))
    file("accents", running)
    call("stop", Controller.stop_processing)
    file("stopped", running)
    os.remove(running)
    call("start", Controller.start_processing, message())
    file("created again", running)
    os.remove(running)


@case("4.start-processing.surrogate")
def the_running_file_takes_a_lone_surrogate() -> None:
    call("start", Controller.start_processing, message(entrypoint="shop.\ud800"))
    file("surrogate", os.environ["RUNNING_FILE"])
    call("stop", Controller.stop_processing)


@case("4.start-processing.unwritable")
def the_running_file_cannot_be_written() -> None:
    kept = os.environ["RUNNING_FILE"]
    os.environ["RUNNING_FILE"] = os.path.join(os.getcwd(), "missing", "run.lock")
    call("start", Controller.start_processing, message())
    call("stop", Controller.stop_processing)
    emit(f"folder {os.path.exists('missing')}")
    os.environ["RUNNING_FILE"] = kept


if __name__ == "__main__":
    main()
