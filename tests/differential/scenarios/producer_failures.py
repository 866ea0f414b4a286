"""Section 8: the producer when sending fails."""

from kafka.errors import KafkaTimeoutError
from recorder import call, case, emit, main
from wire import CLIENT, DEAD

from kser.python_kafka.producer import Producer
from kser.schemas import Message

TOPICS = ("any",)

UUID = "11111111-1111-4111-8111-111111111111"


def message(**fields) -> Message:
    """Return a message with the given fields."""
    return Message(**{"uuid": UUID, "entrypoint": "shop.Order", **fields})


def producer_whose_client(send) -> Producer:
    """Return a producer whose client has another send method."""
    producer = Producer(CLIENT)
    producer.client.send = send
    return producer


class Undelivered:
    """A future of a record that the client could not deliver."""

    def get(self, timeout=None):
        raise KafkaTimeoutError("the broker died")


@case("8.producer.unreachable")
def no_broker_answers() -> None:
    producer = Producer(DEAD)
    call("send", producer.send, "any", message())
    producer.client.close(timeout=0)


@case("8.producer.unreachable-bulk")
def no_broker_answers_in_bulk() -> None:
    producer = Producer(DEAD)
    call("bulk", producer.bulk_send, "any", [message()])
    producer.client.close(timeout=0)


@case("8.producer.undelivered")
def delivery_fails_after_queueing() -> None:
    producer = producer_whose_client(lambda *args, **kwargs: Undelivered())
    call("send", producer.send, "any", message())
    producer.client.close(timeout=0)


@case("8.producer.undelivered-bulk")
def delivery_fails_after_queueing_in_bulk() -> None:
    producer = producer_whose_client(lambda *args, **kwargs: Undelivered())
    call("bulk", producer.bulk_send, "any", [message()])

    def flush(timeout=None):
        raise KafkaTimeoutError("Timeout waiting for future")

    producer.client.flush = flush
    call("flush", producer.bulk_send, "any", [message()])
    del producer.client.flush
    producer.client.close(timeout=0)


@case("8.producer.interrupt")
def an_interrupt_while_sending() -> None:
    def send(*args, **kwargs):
        raise KeyboardInterrupt

    producer = producer_whose_client(send)
    call("send", producer.send, "any", message())
    emit("bulk")
    call("bulk", producer.bulk_send, "any", [message()])
    producer.client.close(timeout=0)


@case("8.producer.config")
def options_that_the_client_does_not_know() -> None:
    call("unknown", lambda: type(Producer({**CLIENT, "nonsense": 1})))


if __name__ == "__main__":
    main()
