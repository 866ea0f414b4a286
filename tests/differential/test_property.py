"""Property test: both packages accept and reject the same inputs, and dump accepted ones to the same bytes.

Hypothesis generates values, and a position at which an input is damaged. Each example becomes a batch of inputs,
because an example costs more than an input. ``KSER_TEST_PROPERTY_CASES`` is the number of inputs, and
``KSER_TEST_PROPERTY_SEED`` repeats a run.
"""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from kser.limits import environment_limits

from .harness import HERE, environment_of_ours

CASES = int(os.environ.get("KSER_TEST_PROPERTY_CASES") or (20_000 if os.environ.get("CI") == "true" else 2_000))
SEED = int(os.environ.get("KSER_TEST_PROPERTY_SEED") or random.randrange(2**32))

FIELDS = ("uuid", "entrypoint", "params", "result", "metadata")
RESULT_FIELDS = ("uuid", "retcode", "stdout", "stderr", "retval")
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32-be", "latin-1")

NEW_UUID = "99999999-9999-4999-8999-999999999999"

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["", "12", "{}", "\ud800"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)

Case = tuple[str, bytes]


def inputs(value: Any, other: Any, position: int, junk: bytes) -> Iterator[Case]:
    """Yield inputs with two JSON values: in every field, alone, damaged at a position, and in other encodings."""
    plain = {"uuid": "u", "entrypoint": "e", "params": {"k": other}, "result": {"uuid": "r", "retval": {"k": value}}}
    variants: list[Any] = [value, [value], plain]
    variants += [{**plain, name: value} for name in (*FIELDS, "unknown")]
    variants += [{**plain, "result": {"uuid": "r", name: value}} for name in (*RESULT_FIELDS, "unknown")]
    variants += [{k: v for k, v in plain.items() if k != name} for name in FIELDS]
    variants += [{**plain, "metadata": value, "params": other, "result": {"retcode": value, "stdout": other}}]
    for variant in variants:
        text = json.dumps(variant)
        yield "load_bytes", text.encode()
        yield "load_text", text.encode()
    for arguments in (
        ["u", "e", value],
        ["u", "e", None, {"retval": value}, other],
        [value, other],
        ["u", "e", {}, value],
    ):
        yield "build", json.dumps(arguments).encode()
    raw = json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass")
    position %= len(raw)
    for damaged in (
        raw[:position],
        raw[:position] + junk + raw[position:],
        raw[:position] + junk + raw[position + len(junk) :],
        junk,
    ):
        yield "load_bytes", damaged
        yield "load_text", damaged
    for encoding in ENCODINGS:
        yield "load_bytes", json.dumps(plain, ensure_ascii=False).encode(encoding, "replace")


class VerdictProcess:
    """A process of ``verdicts.py`` with one of the two packages."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def send(self, cases: list[Case]) -> None:
        """Send inputs; the process works on them until :meth:`receive` is called."""
        assert self._process.stdin is not None
        request = [(kind, base64.b64encode(raw).decode()) for kind, raw in cases]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> list[dict[str, Any]]:
        """Return the verdicts on the inputs that were sent."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())  # type: ignore[no-any-return]


@contextmanager
def verdict_process(python: Path, variables: dict[str, str]) -> Iterator[VerdictProcess]:
    """Run a process of ``verdicts.py`` in an interpreter for the duration of a block."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [str(python), str(HERE / "verdicts.py")],
        env=environment | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        yield VerdictProcess(process)


def is_as_decided(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Return whether our verdict equals the published one, apart from the decisions C14, C15 and C22."""
    if theirs == ours:
        return True
    if "UuidTooLong" in (ours.get("refused"), ours.get("again")):
        # C22: the published package accepts a uuid above the limit, as a constructor of ours does.
        return len(json.loads(theirs["accepted"])["uuid"]) > environment_limits().max_uuid_length
    if theirs.get("refused") == "ValidationError" and "accepted" in ours:
        # C14: null in the fields of the result is accepted.
        errors = theirs["extra"].get("result", {})
        return set(theirs["extra"]) == {"result"} and all(v == ["Field may not be null."] for v in errors.values())
    if theirs.get("refused") == ours.get("refused") == "ValidationError":
        # C14: only the other errors remain.
        return without_null_errors(theirs["extra"]) == ours["extra"]
    if "accepted" in theirs and "accepted" in ours:
        # C15: a result without a uuid gets the uuid of the message, not a random one. C14: our output can be loaded.
        return same_but_for_the_uuid(theirs["accepted"], ours["accepted"]) and ours["again"] in (True, theirs["again"])
    return False


def without_null_errors(extra: dict[str, Any]) -> dict[str, Any]:
    """Return the errors of a rejected input, without those about null in the result."""
    result = {k: v for k, v in extra.get("result", {}).items() if v != ["Field may not be null."]}
    return {k: v for k, v in {**extra, "result": result}.items() if v or k != "result"}


def same_but_for_the_uuid(theirs: str, ours: str) -> bool:
    """Return whether two dumped messages are equal if the new uuid of the result is the uuid of the message in ours."""
    first, second = json.loads(theirs), json.loads(ours)
    if first["result"]["uuid"] != NEW_UUID or second["result"]["uuid"] != second["uuid"]:
        return False
    first["result"]["uuid"] = second["uuid"]
    return json.dumps(first) == ours


def test_both_packages_accept_the_same_inputs_with_the_same_bytes(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 0
    per_example = len(list(inputs(None, None, 0, b"")))

    with (
        verdict_process(published, {}) as their_process,
        verdict_process(Path(sys.executable), environment_of_ours()) as our_process,
    ):

        @seed(SEED)
        @settings(
            max_examples=-(-CASES // per_example),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(values, values, st.integers(0, 10_000), st.binary(max_size=4))
        def check(value: Any, other: Any, position: int, junk: bytes) -> None:
            nonlocal count
            cases = list(inputs(value, other, position, junk))
            count += len(cases)
            their_process.send(cases)
            our_process.send(cases)
            verdicts = zip(cases, their_process.receive(), our_process.receive(), strict=True)
            for (kind, raw), theirs, ours in verdicts:
                assert is_as_decided(theirs, ours), f"{kind} {raw!r}\ntheirs {theirs}\nours   {ours}"

        check()

    with capsys.disabled():
        print(f"\n{count} cases, KSER_TEST_PROPERTY_SEED={SEED}")
    assert count >= CASES
