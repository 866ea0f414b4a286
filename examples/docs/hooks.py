"""The hooks of a task, in the order in which kser calls them."""

from cdumay_result import Result

from kser import Controller, Message, Task


class Greet(Task):
    REQUIRED_FIELDS = ("name",)

    def postinit(self):
        print("postinit: the object is made from the message")

    def prerun(self):
        print("prerun:   the required parameters are there, the status is", self.status)

    def run(self):
        print("run:      the work")
        return Result(stdout=f"hello {self.params['name']}")

    def postrun(self, result):
        print("postrun:  run returned a Result that says", repr(str(result)))
        return result

    def onsuccess(self, result):
        print("onsuccess: the final result says", repr(str(result)))
        return result

    def onerror(self, result):
        print("onerror:  return code", result.retcode, "because", repr(result.stderr))
        return result


Controller.register("greet", Greet)
Controller.run(Message("1", "greet", params={"name": "Ada"}).dumps())
print("-- and without the parameter:")
Controller.run(Message("2", "greet").dumps())
