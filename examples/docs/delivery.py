"""The effect of a crash: a message is processed twice, or is lost."""

from kser import Message, OperationRegistry, Task
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry()
attempts = []


@oregistry.subscribe
class Charge(Task):
    def run(self):
        attempts.append(self.uuid)
        if len(attempts) == 1:
            raise KeyboardInterrupt  # the process ends here


def consume(commit):
    consumer = Consumer({"enable_auto_commit": False}, ["orders"], commit=commit)
    consumer.REGISTRY = oregistry.controller
    consumer.run_until_idle()
    consumer.close()


for commit in ("after", "before"):
    attempts.clear()
    if commit == "before":
        consume(commit)  # with commit="before", a new group starts at the end of the topic
    Producer().send("orders", Message("order-1", Charge.path))
    try:
        consume(commit)
    except KeyboardInterrupt:
        print(f"commit={commit!r}: the consumer died in the task")
        InMemoryBroker.at("").groups["dummy"].members[0].expel()  # as Kafka does after a session timeout
    consume(commit)  # another consumer of the same group
    print(f"commit={commit!r}: the task was started {len(attempts)} time(s)")
