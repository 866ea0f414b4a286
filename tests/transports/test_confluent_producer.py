"""Tests of the librdkafka producer: its options, its log lines, and polling shared by several threads."""

from __future__ import annotations

import gc
import json
import logging
import socket
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
from kser.confluent.delivery_reports import DeliveryReportPoller, DeliveryWaiter
from kser.confluent.options import CONSUMER_ONLY, PRODUCER_ONLY, connect, options_for, own_options, servers
from kser.confluent.producer import MAX_IN_FLIGHT, Producer
from kser.embedded import EmbeddedBroker
from kser.errors import DeliveryError, SettingError
from tests.support import UUID, lines, message, run_python, wait_until

PATIENCE = 20

#: Values that librdkafka takes, where a number is none.
VALUES: dict[str, Any] = {
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
#: What confluent-kafka itself takes, and so nobody warns about.
CALLBACKS = {"on_commit", "on_delivery"}


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker("dice") as broker:
        yield broker


@pytest.fixture
def nobody() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def producer_for(broker: EmbeddedBroker, **options: Any) -> Any:
    """A producer, to be closed."""
    dotted = {name.replace("_", "."): value for name, value in options.items()}
    return closing(Producer({"bootstrap.servers": broker.bootstrap_servers, **dotted}))


# -- options -----------------------------------------------------------------------------------------------------------


def configured(**given: Any) -> dict[str, str]:
    """What a producer's client is made with: librdkafka tells with ``debug``."""
    log: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.append(record.getMessage())

    listener = logging.Logger("conf", logging.DEBUG)
    listener.addHandler(Listener())
    options = {name.replace("_", "."): value for name, value in given.items()}
    producer = Producer({"bootstrap.servers": "127.0.0.1:1", "debug": "conf", **options, "logger": listener})
    producer.client.poll(0)
    producer.close()
    pairs = [line.rsplit("]:", 1)[-1].split("=", 1) for line in log if "=" in line]
    return {name.strip(): value.strip() for name, value in pairs}


def test_defaults_are_safe_and_fast() -> None:
    mine = configured()
    assert (mine["enable.idempotence"], mine["queue.buffering.max.ms"]) == ("true", "0")
    assert (mine["request.required.acks"], mine["partitioner"]) == ("-1", "murmur2_random")


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"acks": 1}, "request.required.acks", "1"),
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
def test_user_options_override_the_defaults(given: dict[str, Any], name: str, value: str) -> None:
    assert configured(**given)[name] == value


def test_send_succeeds_with_delivery_report_only_error(broker: EmbeddedBroker) -> None:
    with producer_for(broker, delivery_report_only_error=True) as producer:
        assert producer.send("dice", message("x"), timeout=PATIENCE).retcode == 0


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


def test_config_argument_is_used_as_is_and_not_modified(broker: EmbeddedBroker) -> None:
    given = {"bootstrap.servers": broker.bootstrap_servers, "client.id": "me"}
    before = dict(given)
    Producer(given).close()
    assert given == before
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
    """The tables, checked against librdkafka itself, which has other names for some."""
    caplog.set_level(logging.WARNING)
    for name in sorted(foreign - CALLBACKS):
        caplog.clear()
        instance = connect(client, {**base, name: VALUES.get(name, 1000)}, logger=logging.getLogger("confluent_kafka"))
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


# -- what the client says ----------------------------------------------------------------------------------------------


def test_client_logs_go_to_logging_and_not_to_stderr(nobody: str) -> None:
    code = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout);"
        "from kser.confluent.producer import Producer; from kser.schemas import Message;"
        "p = Producer({'bootstrap.servers': sys.argv[1], 'group.id': 'g'});"
        "p.send('dice', Message('u', 'x'), timeout=0.3); p.close()"
    )
    done = run_python(code, nobody)
    assert done.stderr == ""
    assert "ERROR:confluent_kafka:FAIL" in done.stdout
    assert "WARNING:confluent_kafka:CONFWARN" in done.stdout


def test_logger_and_error_callback_of_the_user_are_called(nobody: str, caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Any] = []
    options = {"bootstrap.servers": nobody, "logger": logging.getLogger("mine"), "error_cb": errors.append}
    with closing(Producer(options)) as producer:
        result = producer.send("dice", message("x"), timeout=0.3)
    assert {error.code() for error in errors} >= {confluent_kafka.KafkaError._TRANSPORT}
    assert {record.name for record in caplog.records if "FAIL" in record.getMessage()} == {"mine"}
    assert "(last error of the client: " in result.stderr and "Connection refused" in result.stderr


def test_client_errors_are_reported_while_the_producer_is_idle(
    nobody: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports_module, "IDLE_POLL_INTERVAL", 0.01)
    called = threading.Event()
    with closing(Producer({"bootstrap.servers": nobody, "error_cb": lambda error: called.set()})):
        assert called.wait(PATIENCE)


def test_raising_user_callback_is_logged_and_does_not_fail_sends(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports_module, "IDLE_POLL_INTERVAL", 0.01)
    raised: list[str] = []

    def broken(text: str) -> None:
        raised.append(threading.current_thread().name)
        raise ValueError("as it was told")

    results: list[Any] = []
    options = {"bootstrap.servers": broker.bootstrap_servers, "statistics.interval.ms": 5, "stats_cb": broken}
    with closing(Producer(options)) as producer:
        wait_until(lambda: raised.count("kser-delivery-reports") > 1)
        assert producer.send("dice", message("x")).retcode == 0
        for _ in range(20):
            producer.send_nowait("dice", message("x"), results.append)
        wait_until(lambda: len(results) == 20)
    assert {result.retcode for result in results} == {0}
    assert len(results) == 20
    assert any("a callback in the producer's configuration raised an exception" in line for line in lines(caplog))


def test_unreferenced_producer_leaves_no_thread(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector of leaks looks for it when the test has ended."""
    monkeypatch.setattr(reports_module, "IDLE_POLL_INTERVAL", 0.01)
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    forgotten = weakref.ref(producer)
    del producer
    gc.collect()
    assert forgotten() is None


# -- when it does not work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["send", "bulk_send", "produce"])
def test_unreachable_broker_is_named_within_the_timeout(nobody: str, call: str) -> None:
    """D2"""
    with closing(Producer({"bootstrap.servers": nobody})) as producer:
        begin = time.monotonic()
        if call == "produce":
            with pytest.raises(DeliveryError, match=f"No broker responds at {nobody}"):
                producer.produce("dice", b"x", timeout=0.3)
        else:
            argument: Any = message("x") if call == "send" else [message("x"), message("x", uuid="2")]
            result = getattr(producer, call)("dice", argument, timeout=0.3)
            assert result.retcode == 500
            assert f"No broker responds at {nobody}: start one there, or correct 'bootstrap.servers'" in result.stderr
        assert time.monotonic() - begin < 1.5


def test_threads_sharing_a_producer_wait_no_longer_than_their_timeout(nobody: str) -> None:
    with closing(Producer({"bootstrap.servers": nobody})) as producer:
        results: list[Any] = []

        def send() -> None:
            results.append(producer.send("dice", message("x"), timeout=0.3))

        begin = time.monotonic()
        run_together([send] * 3)
        assert time.monotonic() - begin < 1.5
    assert [result.retcode for result in results] == [500] * 3


def test_full_queue_is_awaited(broker: EmbeddedBroker) -> None:
    broker.create_topic("full")
    with producer_for(broker, queue_buffering_max_messages=10) as producer:
        result = producer.bulk_send("full", [message("x", uuid=str(n)) for n in range(500)], timeout=PATIENCE)
    assert (result.retcode, result.stdout) == (0, "500 message(s) sent")


def test_queue_that_stays_full_is_named_within_the_timeout() -> None:
    with EmbeddedBroker("dice") as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "queue.buffering.max.messages": 2})
        assert producer.send("dice", message("x")).retcode == 0
    with closing(producer):
        begin = time.monotonic()
        result = producer.bulk_send("dice", [message("x", uuid=str(n)) for n in range(5)], timeout=0.3)
        assert time.monotonic() - begin < 1.5
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
    """``message.timeout.ms`` is over before the timeout of the call."""
    with EmbeddedBroker("dice") as broker:
        options = {"bootstrap.servers": broker.bootstrap_servers, "message.timeout.ms": 1500}
        producer = Producer(options)
        assert producer.send("dice", message("x")).retcode == 0
    with closing(producer):
        result = producer.send("dice", message("x"), timeout=PATIENCE)
    assert (result.uuid, result.retcode) == (UUID, 500)
    assert "may still arrive" in result.stderr


def test_close_with_messages_in_flight_is_bounded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedBroker("dice") as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
        producer.send("dice", message("x"))
    producer.send("dice", message("x"), timeout=0)
    begin = time.monotonic()
    producer.close()
    assert time.monotonic() - begin < 2
    text = f"Producer: closed with messages in flight to {broker.bootstrap_servers}: 1 not confirmed"
    assert lines(caplog, logging.WARNING)[-1:] == [text]


# -- who polls ---------------------------------------------------------------------------------------------------------


def run_together(targets: list[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [thread for thread in threads if thread.is_alive()] == []


class Client:
    """What polls: it reports what a test puts in, and counts who polls at once."""

    def __init__(self) -> None:
        self.deliveries: list[DeliveryWaiter] = []
        self.news = threading.Condition()
        self.polling = 0
        self.most = 0

    def poll(self, seconds: float) -> None:
        with self.news:
            self.polling += 1
            self.most = max(self.most, self.polling)
            self.news.notify_all()
            self.news.wait_for(lambda: self.deliveries, seconds)
            waiter = self.deliveries.pop(0) if self.deliveries else None
            self.polling -= 1
        if waiter is not None:
            waiter(None, None)

    def report(self, delivery: DeliveryWaiter) -> None:
        with self.news:
            self.deliveries.append(delivery)
            self.news.notify_all()

    def wait_until_polled(self) -> None:
        with self.news:
            assert self.news.wait_for(lambda: self.polling, PATIENCE)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_polling_thread_serves_all_senders_and_hands_over_the_lead(order: tuple[int, ...]) -> None:
    """The first that waits leads. Whichever report comes first, the others get theirs before their time is over."""
    client = Client()
    reports = DeliveryReportPoller(client.poll)
    deliveries = [DeliveryWaiter() for _ in order]
    begin = time.monotonic()
    threads = []
    for delivery in deliveries:
        thread = threading.Thread(target=reports.wait, args=(delivery, begin + PATIENCE))
        thread.start()
        threads.append(thread)
        client.wait_until_polled()
    for number in order:
        client.report(deliveries[number])
        threads[number].join(PATIENCE)
        assert deliveries[number].done() and not threads[number].is_alive()
    reports.close()
    assert client.most == 1
    assert time.monotonic() - begin < PATIENCE / 2


def test_polling_thread_hands_over_the_lead_after_its_timeout() -> None:
    client = Client()
    reports = DeliveryReportPoller(client.poll)
    late, waits = DeliveryWaiter(), DeliveryWaiter()
    leader = threading.Thread(target=reports.wait, args=(late, time.monotonic() + 0.2))
    leader.start()
    client.wait_until_polled()
    follower = threading.Thread(target=reports.wait, args=(waits, time.monotonic() + PATIENCE))
    follower.start()
    leader.join()
    client.report(waits)
    follower.join(PATIENCE / 2)
    assert (late.done(), waits.done(), follower.is_alive()) == (False, True, False)
    reports.close()


def test_polling_thread_hands_over_the_lead_when_its_poll_raises() -> None:
    """A signal's handler may raise in the thread that polls."""
    client = Client()

    def poll(seconds: float) -> None:
        client.poll(seconds)
        if threading.current_thread().name == "interrupted":
            raise KeyboardInterrupt

    reports = DeliveryReportPoller(poll)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            reports.wait(DeliveryWaiter(), time.monotonic() + PATIENCE)
        except KeyboardInterrupt as error:
            caught.append(error)

    interrupted = threading.Thread(target=wait, name="interrupted")
    interrupted.start()
    interrupted.join()
    waits = DeliveryWaiter()
    client.report(waits)
    reports.wait(waits, time.monotonic() + PATIENCE)
    reports.close()
    assert waits.done() and len(caught) == 1


def test_idle_poller_leaves_delivery_reports_to_senders() -> None:
    client = Client()
    reports = DeliveryReportPoller(client.poll)
    delivery = DeliveryWaiter()
    client.report(delivery)
    with reports:
        reports.poll_if_idle()
        assert not delivery.done()
    reports.poll_if_idle()
    assert delivery.done()
    reports.close()
