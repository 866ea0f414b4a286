"""Section 8: the consumer's loop, without a group, so that a trace contains only the loop."""

import os
import threading

from looping import Registry, patch_long_sleeps, pause, run, terminate
from recorder import call, case, file, main
from wire import CLIENT, feed

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer

TOPICS = (
    "waiting",
    "plain",
    "idle",
    "early",
    "paused",
    "null",
    "bytes",
    "raising",
    "exiting",
    "finished",
    "controller",
    "own",
)

patch_long_sleeps()


def consumer(topic: str, kind=Consumer, special=None, **options) -> Consumer:
    """Return a consumer of all records of a topic."""
    target = kind({**CLIENT, "auto_offset_reset": "earliest", "enable_auto_commit": True, **options}, [topic])
    target.REGISTRY = Registry(special)
    return target


@case("8.run.loop", "8.log.starting", "8.log.closing", "8.run.exit", "8.run.value-ignored")
def messages_go_to_the_registry_until_the_terminate_file() -> None:
    feed("plain", b'{"uuid": "1"}', "\u00e9".encode(), b"end")
    run(consumer("plain"))


@case("8.run.starting-name")
def the_name_of_a_subclass_is_logged() -> None:
    class Own(Consumer):
        """A consumer class of the user."""

    feed("own", b"end")
    run(consumer("own", Own))


@case("8.run.controller")
def a_controller_handles_the_messages() -> None:
    class Probe(Entrypoint):
        def run(self):
            file("running", os.environ["RUNNING_FILE"])
            terminate()

    Controller.register("probe", Probe)
    feed("controller", b'{"uuid": "u", "entrypoint": "probe"}')
    target = consumer("controller")
    target.REGISTRY = Controller
    run(target)


@case("8.run.terminate-early")
def a_terminate_file_at_the_start() -> None:
    feed("early", b"never")
    target = consumer("early")
    terminate()
    run(target)


@case("8.run.terminate-kept")
def the_terminate_file_is_kept() -> None:
    feed("finished", b"end")
    target = consumer("finished")
    call("run", target.run)
    file("terminate", os.environ["TERMINATE_FILE"])


@case("8.run.terminate-idle")
def a_terminate_file_while_no_message_comes() -> None:
    target = consumer("waiting")
    timers = [threading.Timer(0.5, terminate), threading.Timer(3, feed, ("waiting", b"late"))]
    for timer in timers:
        timer.start()
    run(target)
    for timer in timers:
        timer.join()


@case("8.run.paused", "8.log.paused")
def a_paused_consumer_waits() -> None:
    feed("paused", b"pause", b"end")
    run(consumer("paused", special={"pause": pause}))


@case("8.run.null")
def a_null_value() -> None:
    feed("null", None, b"end")
    run(consumer("null"))


@case("8.run.undecodable")
def a_value_that_is_not_utf_8() -> None:
    feed("bytes", b"\xff\xfe", b"end")
    run(consumer("bytes"))


@case("8.run.registry-raises")
def the_registry_raises() -> None:
    def broken() -> None:
        raise ValueError("registry failed")

    feed("raising", b"bad", b"end")
    run(consumer("raising", special={"bad": broken}))


@case("8.run.registry-exits")
def the_registry_exits() -> None:
    def leave() -> None:
        raise SystemExit(3)

    feed("exiting", b"leave", b"end")
    run(consumer("exiting", special={"leave": leave}))


@case("8.run.consumer-timeout")
def an_idle_consumer_with_a_timeout() -> None:
    target = consumer("idle", consumer_timeout_ms=500)
    timer = threading.Timer(2.5, terminate)
    timer.start()
    run(target)
    timer.cancel()


if __name__ == "__main__":
    main()
