"""Tests of the producer on librdkafka: its options, its log lines, and polling shared by several threads."""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import confluent_kafka
import pytest
from flask import Flask

from kser.config import Settings
from kser.confluent import delivery_reports as reports_module
from kser.confluent.consumer import Consumer
from kser.confluent.delivery_reports import DeliveryReportPoller, DeliveryWaiter
from kser.confluent.options import CONSUMER_ONLY, PRODUCER_ONLY, connect, options_for, own_options, servers
from kser.confluent.producer import MAX_IN_FLIGHT, Producer
from kser.embedded import EmbeddedBroker
from kser.errors import DeliveryError, SettingError
from kser.producer import CONSUMER_SIZE_LIMIT
from tests.support import UUID, WAIT_SECONDS, lines, message, run_concurrently, run_python, wait_until
from tests.transports.client_contract import PROMPT_SECONDS

#: Valid values of the options that are not numbers.
OPTION_VALUES: dict[str, Any] = {
    "auto.commit.enable": True,
    "auto.offset.reset": "earliest",
    "check.crcs": True,
    "compression.codec": "none",
    "compression.level": 1,
    "compression.type": "none",
    "enable.auto.commit": True,
    "enable.auto.offset.store": True,
    "enable.gapless.guarantee": False,
    "enable.idempotence": False,
    "enable.partition.eof": True,
    "delivery.report.only.error": False,
    "fetch.max.bytes": 2_000_000,
    "group.id": "g",
    "group.instance.id": "i",
    "group.protocol": "classic",
    "group.protocol.type": "consumer",
    "group.remote.assignor": "range",
    "isolation.level": "read_committed",
    "max.poll.interval.ms": 300_000,
    "offset.store.method": "broker",
    "offset.store.path": "/",
    "partition.assignment.strategy": "range",
    "partitioner": "murmur2",
    "produce.offset.report": True,
    "queuing.strategy": "fifo",
    "session.timeout.ms": 6000,
    "transaction.timeout.ms": 60_000,
    "transactional.id": "t",
}
#: Options of confluent-kafka itself, about which librdkafka does not warn.
CALLBACKS = {"on_commit", "on_delivery"}


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker("dice") as broker:
        yield broker


def producer_for(broker: EmbeddedBroker, **options: Any) -> Any:
    """Return a context manager of a producer; an underscore in the name of an option stands for a dot."""
    dotted = {name.replace("_", "."): value for name, value in options.items()}
    return closing(Producer({"bootstrap.servers": broker.bootstrap_servers, **dotted}))


# -- options -----------------------------------------------------------------------------------------------------------


def client_options(**options: Any) -> dict[str, str]:
    """Return the options of a producer's client, which librdkafka logs with ``debug=conf``."""
    log: list[str] = []

    class LogCollector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.append(record.getMessage())

    client_logger = logging.Logger("conf", logging.DEBUG)
    client_logger.addHandler(LogCollector())
    dotted = {name.replace("_", "."): value for name, value in options.items()}
    producer = Producer({"bootstrap.servers": "127.0.0.1:1", "debug": "conf", **dotted, "logger": client_logger})
    producer.client.poll(0)
    producer.close()
    pairs = [line.rsplit("]:", 1)[-1].split("=", 1) for line in log if "=" in line]
    return {name.strip(): value.strip() for name, value in pairs}


def test_defaults_are_safe_and_fast() -> None:
    options = client_options()
    assert (options["enable.idempotence"], options["queue.buffering.max.ms"]) == ("true", "0")
    assert (options["request.required.acks"], options["partitioner"]) == ("-1", "murmur2_random")


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"acks": 1}, "request.required.acks", "1"),
        ({"acks": 0}, "request.required.acks", "0"),
        ({"acks": "0"}, "request.required.acks", "0"),
        ({"request_required_acks": 0}, "request.required.acks", "0"),
        ({"default_topic_config": {"acks": 0}}, "request.required.acks", "0"),
        ({"acks": -1}, "enable.idempotence", "true"),
        ({"request_required_acks": 1}, "request.required.acks", "1"),
        ({"default_topic_config": {"acks": 1}}, "request.required.acks", "1"),
        ({"linger_ms": 7}, "queue.buffering.max.ms", "7"),
        ({"queue_buffering_max_ms": 7}, "queue.buffering.max.ms", "7"),
        ({"partitioner": "random"}, "partitioner", "random"),
        ({"retries": 0}, "message.send.max.retries", "0"),
        ({"max_in_flight": 100}, "max.in.flight.requests.per.connection", "100"),
        ({"queuing_strategy": "lifo"}, "queuing.strategy", "lifo"),
        ({"enable_idempotence": False, "acks": 0}, "request.required.acks", "0"),
    ],
)
def test_user_options_override_the_defaults(options: dict[str, Any], name: str, value: str) -> None:
    assert client_options(**options)[name] == value


def test_send_succeeds_with_delivery_report_only_error(broker: EmbeddedBroker) -> None:
    with producer_for(broker, delivery_report_only_error=True) as producer:
        assert producer.send("dice", message("x"), timeout=WAIT_SECONDS).retcode == 0


def test_config_shared_with_consumers_gives_no_warning(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = {"bootstrap.servers": broker.bootstrap_servers, "group.id": "g", "auto.offset.reset": "earliest"}
    monkeypatch.setenv("KSER_CONFIG", json.dumps(shared))
    with closing(Producer()) as producer:
        assert producer.send("dice", message("x")).retcode == 0
    assert [record for record in caplog.records if record.name == "confluent_kafka"] == []
    assert options_for("consumer", None, Settings()) == shared
    assert options_for("producer", None, Settings()) == {"bootstrap.servers": broker.bootstrap_servers}


def test_app_config_is_read(broker: EmbeddedBroker) -> None:
    app = Flask("shop")
    app.config["KSER_CONFIG"] = {"bootstrap.servers": broker.bootstrap_servers, "group.id": "g"}
    with closing(Producer(app=app)) as producer:
        assert producer.send("dice", message("x")).retcode == 0


def test_producer_of_a_consumer_accepts_the_size_of_every_record_that_was_read(broker: EmbeddedBroker) -> None:
    config = {"bootstrap.servers": broker.bootstrap_servers, "group.id": "g"}
    app = Flask("shop")
    app.config.update(KSER_CONFIG={**config, "message.max.bytes": 7000}, KSER_PRODUCER_CONFIG={"linger.ms": 3})
    limits = []
    for consumer in (
        Consumer(config, ["dice"]),
        Consumer(config, ["dice"], producer_config={"message.max.bytes": 5000}),
        Consumer(topics=["dice"], app=app),
    ):
        producer: Any = consumer.make_producer()
        limits.append(producer._kser_size_limit)
        producer.close()
        consumer.close()
    assert limits == [CONSUMER_SIZE_LIMIT, 5000, 7000]
    assert options_for("producer", None, Settings.of(app))["linger.ms"] == 3
    assert "linger.ms" not in options_for("consumer", None, Settings.of(app))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group.id": "g"}, "producer_config (KSER_PRODUCER_CONFIG): 'group.id' is an option for consumers only"),
        ({"message.max.byte": 1}, "librdkafka knows no option 'message.max.byte'"),
        ({"acks": "some"}, "the Kafka client cannot be created: "),
        ({"message.max.bytes": 5}, 'the Kafka client cannot be created: Configuration property "message.max.bytes"'),
    ],
)
def test_invalid_producer_option_of_a_consumer_is_rejected_by_its_constructor(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(SettingError) as caught:
        Consumer({"bootstrap.servers": "localhost:1", "group.id": "g"}, ["dice"], producer_config=options)
    assert caught.value.message.startswith(text)
    assert "KSER_PRODUCER_CONFIG" in caught.value.message


def test_config_argument_is_used_as_is_and_not_modified(broker: EmbeddedBroker) -> None:
    config = {"bootstrap.servers": broker.bootstrap_servers, "client.id": "me"}
    copy = dict(config)
    Producer(config).close()
    assert config == copy
    assert options_for("producer", {"group.id": "g"}, Settings()) == {"group.id": "g"}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("bootstrap_servers", "bootstrap.servers"),
        ("bootstrap.server", "bootstrap.servers"),
        ("linger_ms", "linger.ms"),
        ("sasl_plain_password", "sasl.password"),
        ("group_id", "group.id"),
    ],
)
def test_unknown_option_error_names_the_nearest_option(key: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"librdkafka knows no option '{key}', .*: did you mean '{nearest}'"
    with pytest.raises(SettingError, match=text):
        Producer({key: "localhost"})
    monkeypatch.setenv("KSER_CONFIG", json.dumps({key: "localhost"}))
    with pytest.raises(SettingError, match=text):
        Producer()


def test_invalid_option_value_is_a_setting_error() -> None:
    with pytest.raises(SettingError, match=r'Invalid value for configuration property "queue\.buffering\.max\.ms"'):
        Producer({"linger.ms": "soon"})


@pytest.mark.parametrize(
    ("client", "foreign", "base"),
    [(confluent_kafka.Producer, CONSUMER_ONLY, {}), (confluent_kafka.Consumer, PRODUCER_ONLY, {"group.id": "g"})],
    ids=["producer", "consumer"],
)
def test_option_tables_match_the_warnings_of_librdkafka(
    client: Callable[..., Any], foreign: frozenset[str], base: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """librdkafka has several names for some options, so the test compares the tables with its warnings."""
    caplog.set_level(logging.WARNING)
    for name in sorted(foreign - CALLBACKS):
        caplog.clear()
        instance = connect(
            client, {**base, name: OPTION_VALUES.get(name, 1000)}, logger=logging.getLogger("confluent_kafka")
        )
        instance.poll(0)
        assert "property and will be ignored by this" in caplog.text, name


def test_options_of_the_other_client_are_left_out() -> None:
    shared = {"bootstrap.servers": "a", "group.id": "g", "linger.ms": 1}
    assert own_options("consumer", shared) == {"bootstrap.servers": "a", "group.id": "g"}
    assert own_options("producer", shared) == {"bootstrap.servers": "a", "linger.ms": 1}
    assert CONSUMER_ONLY.isdisjoint(PRODUCER_ONLY)


def test_servers_are_named_for_error_texts() -> None:
    assert servers({"bootstrap.servers": "a,b"}) == servers({"metadata.broker.list": "a,b"}) == "a,b"
    assert servers({}) == "no 'bootstrap.servers'"


def test_missing_confluent_kafka_error_names_the_package_to_install() -> None:
    code = "import sys; sys.modules['confluent_kafka'] = None; import kser.confluent.producer"
    done = run_python(code)
    assert "MissingDependency" in done.stderr
    assert "pip install 'kser[confluent]'" in done.stderr


# -- logs and callbacks ------------------------------------------------------------------------------------------------


def test_client_logs_go_to_logging_and_not_to_stderr(unused_address: str) -> None:
    code = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout, level=sys.argv[2]);"
        "from kser.confluent.producer import Producer; from kser.schemas import Message;"
        "p = Producer({'bootstrap.servers': sys.argv[1], 'group.id': 'g'});"
        "p.send('dice', Message('u', 'x'), timeout=0.3); p.close()"
    )
    done = run_python(code, unused_address, "DEBUG")
    assert done.stderr == ""
    assert "DEBUG:confluent_kafka:FAIL" in done.stdout
    assert "WARNING:confluent_kafka:CONFWARN" in done.stdout
    assert "FAIL" not in run_python(code, unused_address, "INFO").stdout


def test_logger_and_error_callback_of_the_user_are_called(
    unused_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Any] = []
    options = {"bootstrap.servers": unused_address, "logger": logging.getLogger("mine"), "error_cb": errors.append}
    with closing(Producer(options)) as producer:
        result = producer.send("dice", message("x"), timeout=0.3)
    assert {error.code() for error in errors} >= {confluent_kafka.KafkaError._TRANSPORT}
    assert {record.name for record in caplog.records if "FAIL" in record.getMessage()} == {"mine"}
    assert "(last error of the client: " in result.stderr and "Connection refused" in result.stderr


def test_client_errors_are_reported_while_the_producer_is_idle(
    unused_address: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports_module, "IDLE_POLL_INTERVAL", 0.01)
    called = threading.Event()
    with closing(Producer({"bootstrap.servers": unused_address, "error_cb": lambda error: called.set()})):
        assert called.wait(WAIT_SECONDS)


def test_raising_user_callback_is_logged_and_does_not_fail_sends(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports_module, "IDLE_POLL_INTERVAL", 0.01)
    raised: list[str] = []

    def raising_callback(text: str) -> None:
        raised.append(threading.current_thread().name)
        raise ValueError("raised by the user's callback")

    results: list[Any] = []
    options = {"bootstrap.servers": broker.bootstrap_servers, "statistics.interval.ms": 5, "stats_cb": raising_callback}
    with closing(Producer(options)) as producer:
        wait_until(lambda: raised.count("kser-delivery-reports") > 1)
        assert producer.send("dice", message("x")).retcode == 0
        for _ in range(20):
            producer.send_nowait("dice", message("x"), results.append)
        wait_until(lambda: len(results) == 20)
    assert [result.retcode for result in results] == [0] * 20
    assert any("a callback in the producer's configuration raised an exception" in line for line in lines(caplog))


def test_unreferenced_producer_leaves_no_thread(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak detector fails the test if a thread is left."""
    monkeypatch.setattr(reports_module, "IDLE_POLL_INTERVAL", 0.01)
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    reference = weakref.ref(producer)
    del producer
    gc.collect()
    assert reference() is None


# -- failures and outages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["send", "bulk_send", "produce"])
def test_unreachable_broker_is_named_within_the_timeout(unused_address: str, call: str) -> None:
    """D2"""
    with closing(Producer({"bootstrap.servers": unused_address})) as producer:
        start = time.monotonic()
        if call == "produce":
            with pytest.raises(DeliveryError, match=f"No broker responds at {unused_address}"):
                producer.produce("dice", b"x", timeout=0.3)
        else:
            argument: Any = message("x") if call == "send" else [message("x"), message("x", uuid="2")]
            result = getattr(producer, call)("dice", argument, timeout=0.3)
            assert result.retcode == 500
            assert (
                f"No broker responds at {unused_address}: start one there, or correct 'bootstrap.servers'"
                in result.stderr
            )
        assert time.monotonic() - start < PROMPT_SECONDS


def test_threads_sharing_a_producer_wait_no_longer_than_their_timeout(unused_address: str) -> None:
    """The timeouts of all threads together are longer than the limit of the test."""
    count = 30
    with closing(Producer({"bootstrap.servers": unused_address})) as producer:
        start = time.monotonic()
        results = run_concurrently(*[lambda: producer.send("dice", message("x"), timeout=0.3)] * count)
        assert time.monotonic() - start < PROMPT_SECONDS < count * 0.3
    assert [result.retcode for result in results] == [500] * count


def test_bulk_send_waits_while_the_client_queue_is_full(broker: EmbeddedBroker) -> None:
    broker.create_topic("full")
    with producer_for(broker, queue_buffering_max_messages=10) as producer:
        result = producer.bulk_send("full", [message("x", uuid=str(n)) for n in range(500)], timeout=WAIT_SECONDS)
    assert (result.retcode, result.stdout) == (0, "500 message(s) sent")


def test_full_client_queue_is_reported_within_the_timeout() -> None:
    with EmbeddedBroker("dice") as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "queue.buffering.max.messages": 2})
        assert producer.send("dice", message("x")).retcode == 0
    with closing(producer):
        start = time.monotonic()
        result = producer.bulk_send("dice", [message("x", uuid=str(n)) for n in range(5)], timeout=0.3)
        assert time.monotonic() - start < PROMPT_SECONDS
    reasons = result.retval["failed"]
    assert len(reasons) == 5
    assert sum("may still arrive" in reason for reason in reasons.values()) == 2
    assert sum("raise 'queue.buffering.max.messages'" in reason for reason in reasons.values()) == 3


def test_bulk_send_may_exceed_the_in_flight_limit(broker: EmbeddedBroker) -> None:
    broker.create_topic("more")
    with producer_for(broker) as producer:
        count = MAX_IN_FLIGHT + 1000
        result = producer.bulk_send("more", (message("x", uuid=str(n)) for n in range(count)), timeout=60)
    assert result.stdout == f"{count} message(s) sent"


def test_message_expired_in_the_client_is_reported_as_possibly_sent() -> None:
    """``message.timeout.ms`` is shorter than the timeout of the call."""
    with EmbeddedBroker("dice") as broker:
        options = {"bootstrap.servers": broker.bootstrap_servers, "message.timeout.ms": 1500}
        producer = Producer(options)
        assert producer.send("dice", message("x")).retcode == 0
    with closing(producer):
        result = producer.send("dice", message("x"), timeout=WAIT_SECONDS)
    assert (result.uuid, result.retcode) == (UUID, 500)
    assert "may still arrive" in result.stderr


def test_close_with_messages_in_flight_is_bounded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedBroker("dice") as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
        producer.send("dice", message("x"))
    producer.send("dice", message("x"), timeout=0)
    start = time.monotonic()
    producer.close()
    assert time.monotonic() - start < PROMPT_SECONDS
    text = f"Producer: closed before all messages were delivered to {broker.bootstrap_servers}: 1 not confirmed"
    assert lines(caplog, logging.WARNING)[-1:] == [text]


# -- polling -----------------------------------------------------------------------------------------------------------


class ScriptedClient:
    """A client whose delivery reports the test queues, and which counts the threads that poll at the same time."""

    def __init__(self) -> None:
        self._reported: list[DeliveryWaiter] = []
        self._changed = threading.Condition()
        self._polling = 0
        #: The highest number of threads that polled at the same time.
        self.max_polling = 0

    def poll(self, seconds: float) -> None:
        """Deliver the next report, if one is queued within ``seconds``."""
        with self._changed:
            self._polling += 1
            self.max_polling = max(self.max_polling, self._polling)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._reported, seconds)
            waiter = self._reported.pop(0) if self._reported else None
            self._polling -= 1
        if waiter is not None:
            waiter(None, None)

    def report(self, waiter: DeliveryWaiter) -> None:
        """Queue a delivery report for a waiter."""
        with self._changed:
            self._reported.append(waiter)
            self._changed.notify_all()

    def wait_until_polled(self) -> None:
        """Wait until a thread polls."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._polling, WAIT_SECONDS)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_polling_thread_serves_all_senders_and_hands_over_the_lead(order: tuple[int, ...]) -> None:
    """The first waiting thread polls for all; after its own report another one polls."""
    client = ScriptedClient()
    poller = DeliveryReportPoller(client.poll)
    waiters = [DeliveryWaiter(has_offset=False) for _ in order]
    start = time.monotonic()
    threads = []
    for waiter in waiters:
        thread = threading.Thread(target=poller.wait, args=(waiter, start + WAIT_SECONDS))
        thread.start()
        threads.append(thread)
        client.wait_until_polled()
    for number in order:
        client.report(waiters[number])
        threads[number].join(WAIT_SECONDS)
        assert waiters[number].done() and not threads[number].is_alive()
    poller.close()
    assert client.max_polling == 1
    # A thread that missed its report would have waited until its deadline.
    assert time.monotonic() - start < WAIT_SECONDS


def test_polling_thread_hands_over_the_lead_after_its_timeout() -> None:
    client = ScriptedClient()
    poller = DeliveryReportPoller(client.poll)
    expired, reported = DeliveryWaiter(has_offset=False), DeliveryWaiter(has_offset=False)
    leader = threading.Thread(target=poller.wait, args=(expired, time.monotonic() + 0.2))
    leader.start()
    client.wait_until_polled()
    follower = threading.Thread(target=poller.wait, args=(reported, time.monotonic() + 2 * WAIT_SECONDS))
    follower.start()
    leader.join()
    client.report(reported)
    # The deadline of the follower is later, so only its report ends the thread.
    follower.join(WAIT_SECONDS)
    assert (expired.done(), reported.done(), follower.is_alive()) == (False, True, False)
    poller.close()


def test_polling_thread_hands_over_the_lead_when_its_poll_raises() -> None:
    """A signal handler may raise in the thread that polls."""
    client = ScriptedClient()

    def poll(seconds: float) -> None:
        client.poll(seconds)
        if threading.current_thread().name == "interrupted":
            raise KeyboardInterrupt

    poller = DeliveryReportPoller(poll)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            poller.wait(DeliveryWaiter(has_offset=False), time.monotonic() + WAIT_SECONDS)
        except KeyboardInterrupt as error:
            errors.append(error)

    interrupted = threading.Thread(target=wait, name="interrupted")
    interrupted.start()
    interrupted.join()
    reported = DeliveryWaiter(has_offset=False)
    client.report(reported)
    poller.wait(reported, time.monotonic() + WAIT_SECONDS)
    poller.close()
    assert reported.done() and len(errors) == 1


def test_idle_poller_leaves_delivery_reports_to_senders() -> None:
    client = ScriptedClient()
    poller = DeliveryReportPoller(client.poll)
    waiter = DeliveryWaiter(has_offset=False)
    client.report(waiter)
    with poller:
        poller.poll_if_idle()
        assert not waiter.done()
    poller.poll_if_idle()
    assert waiter.done()
    poller.close()
