"""Section 8: the consumer, its client and its lock files, without consuming anything."""

import gc
import os
from pathlib import Path

from kafka import KafkaConsumer
from recorder import call, case, emit, file, main, show
from wire import CLIENT

from kser.controller import Controller
from kser.python_kafka.consumer import Consumer

TOPICS = ("any", "other")

FILES = ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")


def write_files() -> None:
    """Create the three control files."""
    for name in FILES:
        Path(os.environ[name]).write_text("shop.Order[u]")


def show_files() -> None:
    """Print the content of the three control files."""
    for name in FILES:
        file(name, os.environ[name])


def remove_files() -> None:
    """Delete the three control files."""
    for name in FILES:
        Path(os.environ[name]).unlink(missing_ok=True)


def consumer(**options) -> Consumer:
    """Return a consumer that never joins its group."""
    return Consumer({**CLIENT, "group_id": "files", **options}, ["any"])


@case("8.consumer.client", "8.consumer.registry")
def a_consumer_holds_a_client_of_kafka_python() -> None:
    target = Consumer({**CLIENT, "group_id": "files"}, ["any", "other"])
    show("client", type(target.client) is KafkaConsumer)
    show("topics", target.client.subscription())
    show("registry", target.REGISTRY is Controller)
    show("auto commit", target.client.config["enable_auto_commit"])
    target.REGISTRY = "assigned"
    show("assigned", (target.REGISTRY, Consumer.REGISTRY is Controller))
    target.client.close(autocommit=False)


@case("8.consumer.topics")
def topics_are_a_list_or_tuple() -> None:
    show("tuple", Consumer({**CLIENT, "group_id": "files"}, ("any",)).client.subscription())
    call("text", lambda: Consumer({**CLIENT, "group_id": "files"}, "any").client.subscription())
    call("set", lambda: Consumer({**CLIENT, "group_id": "files"}, {"any"}).client.subscription())


@case("8.consumer.clean-lock", "8.log.cleaning-pause")
def construction_removes_the_pause_file() -> None:
    remove_files()
    write_files()
    target = consumer()
    show_files()
    target.client.close(autocommit=False)
    emit("again, with no file")
    call("clean_lock", Consumer.clean_lock)
    Path(os.environ["LOCK_FILE"]).write_text("")
    call("clean_lock", target.clean_lock)
    show_files()
    remove_files()


@case("8.consumer.is-active", "8.consumer.should-stop")
def the_files_are_looked_at_by_static_methods() -> None:
    remove_files()
    show("none", (Consumer.is_active(), Consumer.should_stop()))
    write_files()
    show("all", (Consumer.is_active(), Consumer.should_stop()))
    remove_files()


@case("8.consumer.should-stop.old")
def a_terminate_file_that_is_older_than_the_process() -> None:
    remove_files()
    write_files()
    os.utime(os.environ["TERMINATE_FILE"], (0, 0))
    show("old", Consumer.should_stop())
    show("again", Consumer.should_stop())
    remove_files()


@case("8.consumer.del", "8.log.cleaning-lock")
def what_becomes_of_the_files_with_the_consumer() -> None:
    target = consumer()
    write_files()
    target.client.close(autocommit=False)
    del target
    gc.collect()
    show_files()
    remove_files()


@case("8.consumer.del.failed")
def what_becomes_of_the_files_after_a_failed_constructor() -> None:
    write_files()
    call("construct", lambda: type(Consumer({**CLIENT, "nonsense": 1}, ["any"])))
    gc.collect()
    show_files()
    remove_files()


@case("8.consumer.unreachable")
def a_consumer_without_a_broker() -> None:
    call("construct", lambda: type(Consumer({"bootstrap_servers": "127.0.0.1:9", "api_version": (2, 0)}, ["any"])))


if __name__ == "__main__":
    main()
