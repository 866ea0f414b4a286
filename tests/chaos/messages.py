"""Messages made from a seed: short, long and failing ones, and payloads that are no messages."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
import zlib
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from kser.schemas import Message

WORK = "__main__.Work"
UNKNOWN = "nobody.HasThis"
KEYS = 40

#: What tasks do besides taking time: raise SystemExit at the first attempt in a process; fail whenever they are tried.
EXIT, POISON = "exit", "poison"


class Order(NamedTuple):
    """A record to send."""

    subject: str
    partition: int
    key: str | None
    value: bytes | None


def work(seed: int, partitions: int, *, first: int = 0, exits: float = 0, poison: float = 0) -> Iterator[Order]:
    """Messages without end: most are short, one in twelve takes long enough to be found at work.

    :param first: the number of the first one.
    :param exits: share of messages that raise SystemExit once.
    :param poison: share of messages that always fail.
    """
    chance = random.Random(f"work {seed}")
    for number in count(first):
        key = f"key-{chance.randrange(KEYS)}" if chance.random() < 0.8 else None
        # Said, not left to the client: keys stay where they are when partitions are added.
        partition = zlib.crc32(key.encode()) % partitions if key else chance.randrange(partitions)
        seconds = chance.uniform(0.3, 0.9) if chance.random() < 0.08 else chance.uniform(0, 0.03)
        then = chance.choices((EXIT, POISON, None), (exits, poison, 1 - exits - poison))[0]
        yield order(f"{partition}-{number}", partition, key, chance, seconds=round(seconds, 3), then=then)


def order(
    subject: str, partition: int, key: str | None, chance: random.Random, *, seconds: float = 0, then: str | None = None
) -> Order:
    """A message that asks for work."""
    params = {"subject": subject, "seconds": seconds, "then": then}
    name = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    return Order(subject, partition, key, Message(uuid=name, entrypoint=WORK, params=params).dumps().encode())


def payload_name(value: bytes | str | None) -> str:
    """What the ledger calls a payload that no task is looked up for."""
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value or b""
    return f"x{hashlib.sha1(raw).hexdigest()[:20]}"


def rubbish(seed: int, number: int, partitions: int) -> list[Order]:
    """So many payloads, no two alike, that are not messages for any task."""
    chance = random.Random(f"rubbish {seed}")
    payloads: dict[str, bytes | None] = {payload_name(None): None}
    while len(payloads) < number:
        value = chance.choice(_KINDS)(chance)
        payloads.setdefault(payload_name(value), value)
    return [Order(name, chance.randrange(partitions), None, value) for name, value in payloads.items()]


def _bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, 300))


def _cut_off(chance: random.Random) -> bytes:
    """A message that ends too early."""
    value = order("cut", 0, None, chance).value or b""
    return value[: chance.randrange(1, len(value) - 1)]


def _other_json(chance: random.Random) -> bytes:
    """JSON that is no object."""
    value: object = chance.choice((chance.random(), chance.getrandbits(2000), [chance.random()], str(chance.random())))
    return json.dumps(value).encode()


def _deep(chance: random.Random) -> bytes:
    """What a reader that calls itself cannot read."""
    return b"[" * chance.randrange(1, 5000)


def _wrong_types(chance: random.Random) -> bytes:
    """Objects with the right names, of which one at least has no sense."""
    wrong: list[object] = [None, 7, [], ["x"], {"x": 1}, True]
    data: dict[str, object] = {"uuid": str(uuid.UUID(int=chance.getrandbits(128))), "entrypoint": UNKNOWN, "params": {}}
    data["uuid" if chance.random() < 0.5 else "entrypoint"] = chance.choice(wrong)
    return json.dumps(data | {"noise": chance.random()}).encode()


def _unknown(chance: random.Random) -> bytes:
    """A message for a task that nobody has."""
    return Message(uuid=str(uuid.UUID(int=chance.getrandbits(128))), entrypoint=UNKNOWN, params={}).dumps().encode()


def _broken_text(chance: random.Random) -> bytes:
    """A message with a byte in it that is no text."""
    value = bytearray(order("broken", 0, None, chance).value or b"")
    value[chance.randrange(len(value))] = chance.randrange(0xF8, 0x100)
    return bytes(value)


_KINDS = (_bytes, _bytes, _cut_off, _other_json, _deep, _wrong_types, _unknown, _broken_text)
