"""User code that never runs: mypy checks that it is fully typed, and must find its errors.

Each ``type: ignore`` marks an error; if mypy does not find the error, it reports the comment as unused.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import Controller, Entrypoint, Message, Operation, OperationRegistry, Task
from kser.consumer.dead_letters import DeadLetter
from kser.consumer.replay import ReplayCount, iter_dead_letters, replay
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer as InMemoryConsumer
from kser.embedded import EmbeddedBroker
from kser.errors import KserError, SendError
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from kser.retry import Retry
from kser.sequencing.registry import OperationPage
from kser.store import open_store
from kser.store.base import Store

oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    REQUIRED_FIELDS = ["amount"]  # noqa: RUF012  (as users write it)
    TOPIC = "payments"
    RETRY = Retry(max_attempts=5, delay=1, backoff=2, max_delay=60, jitter=True, on=(ConnectionError, TimeoutError))
    TIME_LIMIT = 30

    def run(self) -> Result:
        if self.attempt > 3:
            raise Retry.later(seconds=600)
        self.log("charging", extra={"amount": self.params["amount"]})
        return Result(uuid=self.uuid, stdout="charged", retval={"paid": True})

    def charged(self) -> int:
        return int(self.params["amount"])


@oregistry.subscribe
class PlaceOrder(Operation):
    TASKS = (Charge,)

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Charge(params=kwargs), Charge(params={"amount": 1}, metadata={"trace": "x"})]

    def onsuccess(self, result: Result) -> Result:
        return result


@oregistry.subscribe
class Plain(Entrypoint):
    def run(self) -> None:
        raise ValidationError("not today", extra={"field": "day"})


class Strict(Controller):
    @classmethod
    def onmessage(cls, kmsg: Message) -> Message:
        return kmsg


# The decorator returns the class with its own type.
assert_type(oregistry.subscribe(Charge), type[Charge])
assert_type(Charge(), Charge)
assert_type(Charge().charged(), int)
assert_type(PlaceOrder().tasks, list[Task])

charge = Charge(uuid="1", params={"amount": 12}, status="PENDING", result=Result(), metadata={})
assert_type(charge.uuid, str)
assert_type(charge.status, str)
assert_type(charge.result, Result)
assert_type(charge.to_Message(), Message)
assert_type(Charge.from_Message(charge.to_Message()), Charge)
assert_type(Message.loads(b"{}"), Message)

operation = PlaceOrder()
assert_type(operation.launch(), Result)
assert_type(operation.launch_next(task=charge, result=charge.result), Result)
assert_type(operation.next(charge), Task | None)
assert_type(operation.compute_tasks(amount=3), list[Task])

result = Result(retcode=1, stderr="no")
assert_type(result + Result(), Result)
assert_type(result.retval, dict[str, Any])
assert_type(Result.from_exception(ValueError("no"), uuid="1"), Result)

try:
    operation.send()
except SendError as error:
    assert_type(error.result, Result)
    assert_type(error.code, int)
except KserError as error:
    assert_type(error.message, str)
    assert_type(error.to_dict(), dict[str, Any])

with EmbeddedBroker("payments") as broker:
    assert_type(broker, EmbeddedBroker)
    assert_type(broker.bootstrap_servers, str)
    assert_type(broker.config, dict[str, Any])

policy = Retry(on=ConnectionError, give_up_on=(ValueError, KeyError))
assert_type(policy.max_attempts, int)
assert_type(policy.delay_after(1), float | None)

consumer = Consumer(
    {"bootstrap_servers": "localhost"},
    ["payments"],
    workers=8,
    ordering="partition",
    commit="after",
    retry=policy,
    dead_letter=True,
    shutdown_timeout=30,
    revoke_timeout=2.5,
    max_in_flight=500,
    max_buffered_bytes=1 << 20,
    stall_timeout=60,
    producer_config={"max_request_size": 5_000_000},
)
assert_type(consumer.counts, dict[str, int])
assert_type(consumer.step(timeout=0.1), int)
assert_type(InMemoryConsumer({}, ["payments"], dead_letter="broken").run_until_idle(), int)
assert_type(InMemoryBroker.at("").values("payments"), list[bytes | None])
InMemoryBroker.at("").send("payments", b"{}", key=b"customer", headers=[("trace", b"1"), ("empty", None)])
Producer().send("payments", charge.to_Message(), key="customer", headers={"trace": b"1"})
Producer().bulk_send("payments", [charge.to_Message()], key=lambda kmsg: kmsg.uuid)

for letter in iter_dead_letters(Consumer, {}, "payments.dlq"):
    assert_type(letter, DeadLetter)
    assert_type(letter.attempts, int)
    assert_type(letter.message, Message | None)
assert_type(replay(Consumer, {}, "payments.dlq", where=lambda letter: letter.reason == "failed", limit=5), ReplayCount)

registry = OperationRegistry(store=open_store("sqlite:///shop.db"), producer=Producer())
assert_type(registry.store, Store)
found = registry.get("872c3be0-51ac-457f-a4d9-12c2f7667b80")
assert_type(found, Operation | None)
if found is not None:
    assert_type(found.wait(timeout=30), Result)
    assert_type(found.cancel(reason="changed my mind"), str)
    assert_type(found.resume(), Operation)
    assert_type(found.launch(), Result)
    for task in found.tasks:
        assert_type(task, Task)
page = registry.find(
    status=["FAILED", "CANCELLED"],
    entrypoint=PlaceOrder,
    since=datetime.now(UTC) - timedelta(days=1),
    metadata={"customer": 7},
    limit=50,
    after=None,
)
assert_type(page, OperationPage)
assert_type(page.cursor, str | None)
assert_type(page[0], Operation)
assert_type(registry.purge(older_than=timedelta(days=30), status="SUCCESS"), int)

# Errors that mypy must find.
registry.get(7)  # type: ignore[arg-type]
registry.find(limit="50")  # type: ignore[arg-type]
registry.purge(timedelta(days=30))  # type: ignore[call-arg]
OperationRegistry(store="sqlite:///shop.db")  # type: ignore[arg-type]
oregistry.subscribe(int)  # type: ignore[type-var]
oregistry.subscribe(Charge())  # type: ignore[type-var]
Charge(params=["amount"])  # type: ignore[arg-type]
Charge(statut="PENDING")  # type: ignore[call-arg]
Message(entrypoint="shop.Charge")  # type: ignore[call-arg]
Result(retcode="1")  # type: ignore[arg-type]
charge.charged("all of it")  # type: ignore[call-arg]
EmbeddedBroker(topics=["payments"])  # type: ignore[call-arg]
Retry(max_attempts="5")  # type: ignore[arg-type]
Retry(on=(5,))  # type: ignore[arg-type]
Retry(attempts=5)  # type: ignore[call-arg]
Consumer({}, ["payments"], worker=8)  # type: ignore[call-arg]
Consumer({}, ["payments"], workers="8")  # type: ignore[arg-type]
Consumer({}, ["payments"], retry=5)  # type: ignore[arg-type]
InMemoryBroker.at("").send("payments", "text")  # type: ignore[arg-type]


class InvalidPolicies(Task):
    RETRY = 5  # type: ignore[assignment]
    TIME_LIMIT = "30 s"  # type: ignore[assignment]
