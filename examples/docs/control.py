"""The pause file and the terminate file, which a consumer checks every second."""

import logging
import os
import time
from pathlib import Path

from kser import Message, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
oregistry = OperationRegistry()


@oregistry.subscribe
class Work(Task):
    def run(self):
        print("running file:", Path(os.environ["RUNNING_FILE"]).read_text())


consumer = Consumer(topics=["work"])
consumer.REGISTRY = oregistry.controller
Producer().send("work", Message("1", Work.path))

pause = Path(os.environ["LOCK_FILE"])
pause.touch()
print("handled while the pause file exists:", consumer.step(timeout=0))
pause.unlink()
time.sleep(1)
print("handled when it is gone:", consumer.step(timeout=0))

Path(os.environ["TERMINATE_FILE"]).touch()
try:
    consumer.run()
except SystemExit as end:
    print("run() ended with exit status", end.code)
