"""Section 8: the offsets that a consumer commits, and the time of each commit."""

import logging
import threading
import time

from kafka import TopicPartition
from looping import Registry, patch_long_sleeps, run, terminate
from recorder import case, emit, main
from wire import CLIENT, committed, feed, group

from kser.python_kafka.consumer import Consumer

TOPICS = ("manual", "zero", "auto", "groupless", "poison", "first")

patch_long_sleeps()


def consumer(topic: str, special=None, **options) -> Consumer:
    """Return a consumer of a topic; its group has the name of the topic."""
    target = Consumer(group(topic, **options), [topic])
    target.REGISTRY = Registry(special)
    return target


class Commits(logging.Handler):
    """A fixed order for the end of a scenario with two messages: commit, second message, commit, terminate file.

    A commit at once takes a moment in another thread, and the control files are checked in a third one. So the second
    message waits until the commit of the first one is logged, and the consumer notices the terminate file after the
    second commit. Without a commit, each waits two seconds.
    """

    def __init__(self, target: Consumer) -> None:
        super().__init__()
        self.logged = [threading.Event(), threading.Event()]
        # The handler of the recorder was added before, so it prints the line first.
        logging.getLogger("kser").addHandler(self)
        target.REGISTRY.before["end"] = lambda: self.logged[0].wait(2)
        noticed = target.should_stop
        target.should_stop = lambda: noticed() and (self.logged[1].wait(2) or True)

    def emit(self, record: logging.LogRecord) -> None:
        if "Manual commit done" in record.getMessage():
            next((event for event in self.logged if not event.is_set()), self.logged[1]).set()


@case("8.commit.manual", "8.log.manual-commit")
def commits_when_auto_commit_is_false() -> None:
    feed("manual", b"first", b"end")
    target = consumer("manual", enable_auto_commit=False)

    def note() -> None:
        emit(f"committed meanwhile {target.client.committed(TopicPartition('manual', 0))}")

    target.REGISTRY.special.update(first=note, end=note)
    Commits(target)
    run(target)
    emit(f"committed {committed('manual', 'manual')}")


@case("8.commit.zero")
def commits_when_auto_commit_is_zero() -> None:
    feed("zero", b"first", b"end")
    target = consumer("zero", enable_auto_commit=0)
    Commits(target)
    run(target)
    emit(f"committed {committed('zero', 'zero')}")


@case("8.commit.auto")
def commits_of_a_graceful_end() -> None:
    feed("auto", b"first", b"end")
    run(consumer("auto"))
    emit(f"committed {committed('auto', 'auto')}")


@case("8.commit.without-group")
def manual_commits_without_a_group() -> None:
    feed("groupless", b"first", b"end")
    options = {**CLIENT, "auto_offset_reset": "earliest", "enable_auto_commit": False}
    target = Consumer(options, ["groupless"])
    target.REGISTRY = Registry()
    run(target)


@case("8.commit.poison")
def what_is_committed_after_a_value_that_is_not_utf_8() -> None:
    feed("poison", b"\xff", b"end")
    target = consumer("poison", enable_auto_commit=False)
    Commits(target)
    run(target)
    emit(f"committed {committed('poison', 'poison')}")


@case("8.commit.first-start")
def where_a_new_group_begins() -> None:
    feed("first", b"before the first start")
    options = group("first")
    del options["auto_offset_reset"]
    target = Consumer(options, ["first"])
    seen: list = []

    class First:
        """A registry that records the first message and terminates the consumer."""

        def run(self, data):
            if not seen:
                emit(f"registry.run {data}")
            seen.append(data)
            terminate()

    def keep_sending() -> None:
        while not seen:
            if target.client.assignment():
                feed("first", b"after the start")
            time.sleep(0.3)

    target.REGISTRY = First()
    sender = threading.Thread(target=keep_sending)
    sender.start()
    run(target)
    sender.join()


if __name__ == "__main__":
    main()
