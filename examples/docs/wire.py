"""Write and read a message."""

from kser import Message

written = Message("order-1", "shop.PlaceOrder", params={"amount": 42, "name": "Zoë"})
print(written.dumps())

read = Message.loads('{"uuid": "order-2", "entrypoint": "shop.PlaceOrder", "colour": "blue"}')
print(read.params, read.metadata, read.result.retcode, read.result.uuid)
