"""Settings from a Flask application, and tasks that run inside its context."""

from cdumay_result import Result
from flask import Flask, current_app

from kser import OperationRegistry, Task
from kser.embedded import EmbeddedBroker
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer

oregistry = OperationRegistry()


@oregistry.subscribe
class Welcome(Task):
    def run(self):
        text = f"welcome to {current_app.config['SHOP']}"
        print(text)
        return Result(stdout=text)


with EmbeddedBroker("orders") as broker:
    app = Flask(__name__)
    app.config["SHOP"] = "the corner shop"
    app.config["KSER_CONFIG"] = {**broker.config, "group_id": "shop"}
    app.config["KSER_TOPICS"] = ["orders"]

    oregistry.init_app(app)
    consumer = Consumer(app=app)
    consumer.REGISTRY = oregistry.controller

    producer = Producer(app=app)
    result = producer.send("orders", Welcome(uuid="1").to_Message())
    print(result)
    producer.close()

    while not consumer.step():  # consumer.run() in a real program
        pass
    consumer.close()
