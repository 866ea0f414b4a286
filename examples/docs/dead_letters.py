"""Dead letters: write messages that failed permanently to a separate topic, fix the cause, and replay the messages."""

from kser import Message, OperationRegistry, Task
from kser.consumer.replay import iter_dead_letters, replay
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry()
bank_is_open = False


@oregistry.subscribe
class Charge(Task):
    REQUIRED_FIELDS = ("amount",)

    def run(self):
        if not bank_is_open:
            raise ConnectionError("the bank is closed")
        print(f"{self.uuid} is charged")


consumer = Consumer({"group_id": "shop"}, ["orders"], dead_letter=True)
consumer.REGISTRY = oregistry.controller
Producer().send("orders", Message("order-1", Charge.path, {"amount": 42}), key="ann")
Producer().send("orders", Message("order-2", Charge.path, {"amount": 7}), key="bob")
Producer().send("orders", Message("order-3", Charge.path))
InMemoryBroker.at("").send("orders", b"no message")
consumer.run_until_idle()

for letter in iter_dead_letters(Consumer, {}, "orders.dlq"):
    uuid = letter.message.uuid if letter.message else "-"
    print(f"offset {letter.offset}, key {letter.key}, {uuid}: {letter.reason}")
    print(f"    {letter.error_class}: {letter.error_message}")

bank_is_open = True


def is_of_the_bank(letter):
    return letter.error_class == "ConnectionError"


print("sent again:", replay(Consumer, {}, "orders.dlq", where=is_of_the_bank, limit=1))
print("sent again:", replay(Consumer, {}, "orders.dlq", where=is_of_the_bank))
print("sent again:", replay(Consumer, {}, "orders.dlq", where=is_of_the_bank))
consumer.run_until_idle()
