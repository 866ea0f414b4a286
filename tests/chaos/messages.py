"""Records created from a seed: messages for short, long and failing tasks, and payloads that are no messages."""

from __future__ import annotations

import hashlib
import json
import random
import re
import uuid
import zlib
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from kser.schemas import Message

WORK = "__main__.Work"
UNKNOWN = "unknown.Task"
KEYS = 40

#: Failures of tasks: SystemExit at the first attempt in each process, and an exception at each attempt.
EXIT, POISON = "exit", "poison"

#: The prefix of the subjects of hostile records that cannot run. A hostile record that can run has its uuid as subject.
HOSTILE = "hostile-"

#: The default limit of the size of all headers of a record (``KSER_MAX_HEADER_BYTES``).
HEADER_LIMIT = 65536

#: The prefix of the subjects of gated records.
GATED = "gated-"

_MESSAGE_FOR_WORK = re.compile(rf'{{"uuid": "([0-9a-f-]{{36}})", "entrypoint": "{WORK}", '.encode())


class OutgoingRecord(NamedTuple):
    """A record to send."""

    subject: str
    partition: int
    key: str | None
    value: bytes | None


def work_records(
    seed: int, partitions: int, *, first: int = 0, exits: float = 0, poison: float = 0
) -> Iterator[OutgoingRecord]:
    """Yield records without end: most tasks are short, one in twelve is long enough for a fault to hit it.

    :param first: the number of the first record.
    :param exits: the share of tasks that raise SystemExit once.
    :param poison: the share of tasks that always fail.
    """
    chance = random.Random(f"work {seed}")
    for number in count(first):
        key = f"key-{chance.randrange(KEYS)}" if chance.random() < 0.8 else None
        # Do not leave the partition to the client, because its choice for a key changes when partitions are added.
        partition = zlib.crc32(key.encode()) % partitions if key else chance.randrange(partitions)
        seconds = chance.uniform(0.3, 0.9) if chance.random() < 0.08 else chance.uniform(0, 0.03)
        failure = chance.choices((EXIT, POISON, None), (exits, poison, 1 - exits - poison))[0]
        yield work_record(f"{partition}-{number}", partition, key, chance, seconds=round(seconds, 3), failure=failure)


def work_record(
    subject: str,
    partition: int,
    key: str | None,
    chance: random.Random,
    *,
    seconds: float = 0,
    failure: str | None = None,
    gate: str | None = None,
) -> OutgoingRecord:
    """Return a record with a message for the task ``Work``.

    :param gate: a path; the task runs until a file exists there.
    """
    params = {"subject": subject, "seconds": seconds, "failure": failure, "gate": gate}
    message_uuid = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    message = Message(uuid=message_uuid, entrypoint=WORK, params=params)
    return OutgoingRecord(subject, partition, key, message.dumps().encode())


def payload_name(value: bytes | str | None) -> str:
    """Return the subject of a payload that is rejected before a task is constructed."""
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value or b""
    return f"x{hashlib.sha1(raw).hexdigest()[:20]}"


def gated_records(gate: str, partitions: int) -> list[OutgoingRecord]:
    """Return one record for each partition, whose task runs until a file exists."""
    chance = random.Random(gate)
    return [work_record(f"{GATED}{number}", number, None, chance, gate=gate) for number in range(partitions)]


def hostile_subject(partition: int, offset: int, value: bytes | None, header_bytes: int) -> str:
    """Return the subject of a hostile record, which has no header with a subject.

    :param header_bytes: the size of the headers.
    """
    match = _MESSAGE_FOR_WORK.match(value or b"")
    return match[1].decode() if match and header_bytes <= HEADER_LIMIT else f"{HOSTILE}{partition}-{offset}"


def random_payloads(seed: int, count: int, partitions: int) -> list[OutgoingRecord]:
    """Return records with ``count`` different payloads, none of which is a message for a task."""
    chance = random.Random(f"rubbish {seed}")
    payloads: dict[str, bytes | None] = {payload_name(None): None}
    while len(payloads) < count:
        value = chance.choice(_KINDS)(chance)
        payloads.setdefault(payload_name(value), value)
    return [OutgoingRecord(name, chance.randrange(partitions), None, value) for name, value in payloads.items()]


def _bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, 300))


def _cut_off(chance: random.Random) -> bytes:
    """Return a truncated message."""
    value = work_record("cut", 0, None, chance).value or b""
    return value[: chance.randrange(1, len(value) - 1)]


def _other_json(chance: random.Random) -> bytes:
    """Return JSON that is no object."""
    value: object = chance.choice((chance.random(), chance.getrandbits(2000), [chance.random()], str(chance.random())))
    return json.dumps(value).encode()


def _deep(chance: random.Random) -> bytes:
    """Return JSON that is nested too deep for a recursive parser."""
    return b"[" * chance.randrange(1, 5000)


def _wrong_types(chance: random.Random) -> bytes:
    """Return an object with the fields of a message, one of which has a value of a wrong type."""
    wrong: list[object] = [None, 7, [], ["x"], {"x": 1}, True]
    data: dict[str, object] = {"uuid": str(uuid.UUID(int=chance.getrandbits(128))), "entrypoint": UNKNOWN, "params": {}}
    data["uuid" if chance.random() < 0.5 else "entrypoint"] = chance.choice(wrong)
    return json.dumps(data | {"noise": chance.random()}).encode()


def _unknown(chance: random.Random) -> bytes:
    """Return a message for an unknown task."""
    return Message(uuid=str(uuid.UUID(int=chance.getrandbits(128))), entrypoint=UNKNOWN, params={}).dumps().encode()


def _broken_text(chance: random.Random) -> bytes:
    """Return a message with a byte that is not UTF-8."""
    value = bytearray(work_record("broken", 0, None, chance).value or b"")
    value[chance.randrange(len(value))] = chance.randrange(0xF8, 0x100)
    return bytes(value)


#: Functions that create a payload; random bytes are twice as frequent as the others.
_KINDS = (_bytes, _bytes, _cut_off, _other_json, _deep, _wrong_types, _unknown, _broken_text)
