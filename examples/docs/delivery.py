"""What a crash costs: a message that is handled twice, or one that is not handled at all."""

from kser import Message, OperationRegistry, Task
from kser.dummy.bus import Bus
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
        consume(commit)  # in this mode a group begins with what is sent from now on
    Producer().send("orders", Message("order-1", Charge.path))
    try:
        consume(commit)
    except KeyboardInterrupt:
        print(f"commit={commit!r}: the consumer died in the task")
        Bus.at("").groups["dummy"].members[0].expel()  # as Kafka does when a session has ended
    consume(commit)  # another consumer of the same group
    print(f"commit={commit!r}: the task was started {len(attempts)} time(s)")
