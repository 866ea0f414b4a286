"""The producer: ``python order.py`` sends one operation to the consumer."""

from kser import Message
from kser.python_kafka.producer import Producer

order = Message(
    uuid="6a0ac2f5-9e5c-4a48-8f0a-1f9b8ad5d6f1",
    entrypoint="__main__.PlaceOrder",
    params={"amount": 42},
)
result = Producer().send("orders", order)
print(result.retcode, result)
