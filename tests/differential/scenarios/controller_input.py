"""Section 4: input that the controller cannot load, and messages that onmessage refuses."""

import json
import os
import subprocess
import sys
from typing import ClassVar

from cdumay_result import Result
from recorder import call, case, describe, emit, file, main, normalise, show

from kser.controller import Controller
from kser.entry import Entrypoint

UUID = "11111111-1111-4111-8111-111111111111"


class Probe(Entrypoint):
    """An entrypoint that prints a line when it runs."""

    def run(self):
        return Result(stdout="ran")


class Noisy(Controller):
    """A controller that prints the calls of its onerror hook."""

    ENTRYPOINTS: ClassVar[dict] = {"probe": Probe}

    @classmethod
    def onerror(cls, kmsg, result):
        emit(f"onerror {type(kmsg).__name__} {describe(kmsg.uuid)} {describe(kmsg.entrypoint)} {result}")
        return result


def raw(**fields) -> str:
    """Return a message as JSON."""
    return json.dumps({"uuid": UUID, "entrypoint": "probe", **fields})


@case("4.log.import-error", "4.case.load-not-json")
def what_is_not_json() -> None:
    for data in ("nonsense", raw() + "x"):
        call(repr(data), Controller.run, data)
    file("untouched", os.environ["RUNNING_FILE"])


@case("4.case.load-not-text")
def what_is_no_text() -> None:
    call("none", Controller.run, None)
    call("bytes", Controller.run, b"\xff\xfe\xfa")


@case("4.case.load-invalid")
def what_is_no_message() -> None:
    call("top level", Controller.run, "[]")
    call("params", Controller.run, raw(params=5))
    call("several", Controller.run, raw(params=5, metadata=[], result=1))


@case("4.case.load-invalid-uuid")
def the_uuid_itself_is_invalid() -> None:
    call("number", Controller.run, raw(uuid=5))
    call("missing", Controller.run, '{"entrypoint": "probe"}')


@case("4.case.load-onerror")
def the_onerror_hook_after_a_load_failure() -> None:
    for data in ("nonsense", raw(params=5), raw(entrypoint=5, uuid=5)):
        show(repr(data), Noisy.run(data).uuid)


@case("4.case.load-null-result")
def a_result_with_null_fields() -> None:
    call("stdout", Noisy.run, raw(result={"uuid": "r", "stdout": None, "stderr": None, "retcode": None}))


@case("4.case.onmessage-raises")
def onmessage_raises() -> None:
    class Broken(Noisy):
        @classmethod
        def onmessage(cls, kmsg):
            raise ValueError("refused")

    call("run", Broken.run, raw())
    file("untouched", os.environ["RUNNING_FILE"])


@case("4.case.onmessage-none")
def onmessage_returns_nothing() -> None:
    class Broken(Noisy):
        @classmethod
        def onmessage(cls, kmsg):
            return None

    call("run", Broken.run, raw())
    file("running", os.environ["RUNNING_FILE"])


@case("4.case.surrogate")
def lone_surrogates_in_a_message() -> None:
    call("uuid", Noisy.run, raw(uuid="\ud800"))
    file("running", os.environ["RUNNING_FILE"])


@case("4.case.limit")
def message_above_a_limit() -> None:
    call("uuid", Noisy.run, raw(uuid="u" * 256))


ASCII_CHILD = """
import json, os, sys
from kser.controller import Controller
from kser.entry import Entrypoint

class Probe(Entrypoint):
    def run(self):
        with open(os.environ["RUNNING_FILE"], "rb") as running:
            print("running", running.read())

Controller.register("shop.\\u00c9", Probe)
result = Controller.run(json.dumps({"uuid": "u", "entrypoint": "shop.\\u00c9"}))
print("retcode", result.retcode, ascii(result.stderr))
"""


@case("4.case.ascii-locale")
def a_name_that_the_locale_cannot_write() -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ASCII_CHILD], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    for line in done.stdout.splitlines():
        emit(normalise(line))
    emit(f"exit {done.returncode}")


if __name__ == "__main__":
    main()
