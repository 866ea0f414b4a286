"""Log lines of a task. They contain the task and its status."""

import logging

from kser import Task

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")


class Charge(Task):
    def run(self):
        self.log("charging %d EUR", logging.WARNING, self.params["amount"])


charge = Charge(uuid="1", params={"amount": 42})
charge.log("ready")
charge.execute()
charge.log("over")
