"""Send many messages in one call. The Result lists the messages that were not delivered."""

from kser import Message
from kser.embedded import EmbeddedBroker
from kser.python_kafka.producer import Producer

with EmbeddedBroker("orders") as broker:
    producer = Producer(broker.producer_config)

    result = producer.bulk_send("orders", (Message(f"order-{n}", "shop.Charge") for n in range(1000)), timeout=30)
    print(result.retcode, result.stdout)

    good, bad = Message("good", "shop.Charge"), Message("bad", "shop.Charge", params={"when": {1, 2}})
    result = producer.bulk_send("orders", [good, bad])
    print(result.retcode, result.stdout)
    print(result.stderr)
    print(result.retval["failed"])
    producer.close()
