"""Section 8: the producer with a broker that responds."""

from cdumay_result import Result
from kafka import KafkaProducer
from recorder import call, case, emit, main, show
from wire import CLIENT, show_wire

from kser.controller import BaseProducer
from kser.python_kafka.producer import Producer
from kser.schemas import Message

TOPICS = ("plain", "replaced", "bulk", "bulk-generator", "bulk-broken", "hooks", "odd")

UUID = "11111111-1111-4111-8111-111111111111"


def message(**fields) -> Message:
    """Return a message with the given fields."""
    return Message(**{"uuid": UUID, "entrypoint": "shop.Order", **fields})


class Noisy(Producer):
    """A producer whose hooks print their calls and return values of their own."""

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


def watched(producer: Producer) -> Producer:
    """Print the arguments of the calls to the client."""
    send, flush = producer.client.send, producer.client.flush

    def watched_send(*args, **kwargs):
        emit(f"client.send {len(args)} {sorted(kwargs)}")
        return send(*args, **kwargs)

    def watched_flush(*args, **kwargs):
        emit(f"client.flush {args} {sorted(kwargs)}")
        return flush(*args, **kwargs)

    producer.client.send, producer.client.flush = watched_send, watched_flush
    return producer


@case("8.producer.client")
def a_producer_holds_a_client_of_kafka_python() -> None:
    producer = Producer(CLIENT)
    show("client", type(producer.client) is KafkaProducer)
    show("config", producer.client.config["api_version"])
    show("base", isinstance(producer, BaseProducer))
    producer.client.close()


@case("8.producer.send", "8.producer.wire")
def send_waits_logs_and_answers() -> None:
    producer = Producer(CLIENT)
    kmsg = message(params={"a": "\u00e9"}, metadata={"m": 1}, result=Result(uuid="r", stdout="x", retval={"b": None}))
    call("send", producer.send, "plain", kmsg)
    call("keywords", producer.send, topic="plain", kmsg=message(), timeout=5)
    call("_send", producer._send, "plain", message())
    producer.client.close()
    show_wire("plain")


@case("8.producer.send.client")
def what_the_client_is_called_with() -> None:
    producer = watched(Producer(CLIENT))
    call("send", producer.send, "odd", message(), timeout=5)
    call("bulk", producer.bulk_send, "odd", [message()], timeout=5)
    del producer.client.flush
    producer.client.close()


@case("8.producer.send.hooks")
def the_value_of_the_hook_is_returned() -> None:
    producer = Noisy(CLIENT)
    call("send", producer.send, "hooks", message())
    call("failure", producer.send, "hooks", message(params={"a": {1}}))
    call("bulk", producer.bulk_send, "hooks", [message()])
    producer.client.close()
    show_wire("hooks")


@case("8.producer.send.hook-raises")
def a_hook_raises() -> None:
    class Broken(Producer):
        @classmethod
        def onsuccess(cls, kmsg, result):
            raise ValueError("onsuccess failed")

        @classmethod
        def onerror(cls, kmsg, result):
            raise KeyError("onerror failed")

    producer = Broken(CLIENT)
    call("success", producer.send, "odd", message())
    call("failure", producer.send, "odd", message(params={"a": {1}}))
    producer.client.close()


@case("8.producer.send.replaced")
def onmessage_may_replace_the_message() -> None:
    class Replacing(Producer):
        @classmethod
        def onmessage(cls, kmsg):
            return Message("other", "some.Other", result=Result(uuid="r"))

    producer = Replacing(CLIENT)
    call("send", producer.send, "replaced", message())
    producer.client.close()
    show_wire("replaced")


@case("8.producer.send.none")
def sending_nothing() -> None:
    producer = Producer(CLIENT)
    call("send", producer.send, "odd", None)
    producer.client.close()


@case("8.producer.send.unserialisable")
def a_message_that_cannot_be_dumped() -> None:
    producer = Producer(CLIENT)
    call("send", producer.send, "odd", message(params={"a": {1}}))
    producer.client.close()


@case("8.producer.bulk")
def bulk_send_answers_with_a_count() -> None:
    producer = Producer(CLIENT)
    call("two", producer.bulk_send, "bulk", [message(), message(uuid="second", result=Result(uuid="r"))])
    call("none", producer.bulk_send, "bulk", [])
    call("keywords", producer.bulk_send, topic="bulk", kmsgs=(message(),), timeout=5)
    producer.client.close()
    show_wire("bulk")


@case("8.producer.bulk.generator")
def bulk_send_of_a_generator() -> None:
    producer = Producer(CLIENT)
    call("generator", producer.bulk_send, "bulk-generator", (message() for _ in range(2)))
    producer.client.close()
    show_wire("bulk-generator")


@case("8.producer.bulk.exception")
def bulk_send_with_a_message_that_cannot_be_dumped() -> None:
    producer = Producer(CLIENT)
    call("broken", producer.bulk_send, "bulk-broken", [message(), message(uuid="bad", params={"a": {1}}), message()])
    producer.client.flush()
    producer.client.close()
    show_wire("bulk-broken")


if __name__ == "__main__":
    main()
