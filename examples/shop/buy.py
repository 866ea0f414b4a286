"""The buyer: two orders fail because the printer is out of paper. When it has paper again, the buyer resumes them."""

from shop import PAPER, PlaceOrder, oregistry


def show(order):
    """Print a table of all attempts of all tasks."""
    print(f"\n{order.params['item']}: {order.status}, {order.result}")
    print("task      attempt  status   in process  seconds  error")
    for attempt in order.attempts:
        task = type(order.tasks[attempt.position]).__name__
        process = attempt.consumer.split(":")[1]  # host:process:random
        seconds = attempt.ended_at - attempt.started_at
        line = f"{task:9} {attempt.number:<8} {attempt.status:8} {process:11} {seconds:<8.2f} {attempt.error or ''}"
        print(line.rstrip())


kettle = PlaceOrder(params={"item": "kettle"}).build()
kettle.send()  # runs in one consumer
teapot = PlaceOrder(params={"item": "teapot"}).build()
teapot.launch()  # runs over the consumers: each task is sent to the topic of its class

for order in (kettle, teapot):
    print(f"{order.params['item']}: {order.wait(timeout=20)}")

PAPER.touch()
print("there is paper again")
for order in (kettle, teapot):
    order.resume()
for order in (kettle, teapot):
    order.wait(timeout=20)
    show(oregistry.get(order.uuid))
