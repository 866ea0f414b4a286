"""Tests of producers that were created before a fork and are used in the child."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kafka.broker import Kafka
from tests.kafka.helpers import read_uuids
from tests.support import run_python

PROGRAM = """
import os, sys, threading, time
from kser.schemas import Message
servers, topic, kind = sys.argv[1:]
if kind == "confluent":
    from kser.confluent.producer import Producer
    producer = Producer({"bootstrap.servers": servers})
else:
    from kser.python_kafka.producer import Producer
    producer = Producer({"bootstrap_servers": servers})

def send(uuid):
    result = producer.send(topic, Message(uuid, "x"), timeout=60)
    assert result.retcode == 0, result.stderr

def fork(run):
    "Run a function in a child, which ends like any program, and wait for the child."
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException as error:
            print("child:", repr(error), flush=True)
            os._exit(1)
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def keep_sending():
    number = 0
    while not ended.is_set():
        send(f"thread {number}")
        number += 1

called = []
ended = threading.Event()
send("parent")
sender = threading.Thread(target=keep_sending)
sender.start()
producer.send_nowait(topic, Message("pending", "x"), lambda result: called.append(os.getpid()))
fork(lambda: send("child"))
fork(lambda: None)
fork(producer.close)

def fork_again():
    send("second child")
    pid = os.fork()
    if pid == 0:
        send("grandchild")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def check_no_callback():
    send("third child")
    time.sleep(0.2)
    assert os.getpid() not in called

fork(fork_again)
fork(check_no_callback)
ended.set()
sender.join()
send("end")
producer.close()
assert called in ([], [os.getpid()]), called
"""


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", ["python_kafka", "confluent"])
def test_forked_process_sends_with_a_client_of_its_own(kafka: Kafka, topic: Callable[..., str], kind: str) -> None:
    name = topic()
    done = run_python(PROGRAM, kafka.bootstrap_servers, name, kind)
    assert done.returncode == 0, done.stdout + done.stderr
    arrived = read_uuids(kafka, name)
    by_name = [uuid for uuid in arrived if not uuid.startswith("thread")]
    assert sorted(by_name) == sorted(["parent", "pending", "child", "second child", "grandchild", "third child", "end"])
    threads = [uuid for uuid in arrived if uuid.startswith("thread")]
    assert len(threads) == len(set(threads)) > 0
