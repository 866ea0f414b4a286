"""Count starts, failures and rejected messages with signals, without changing the classes."""

from collections import Counter

from kser import Controller, Message, Task, signals

counts = Counter()


@signals.entry_started.connect
def started(sender, entry):
    counts["started", sender.__name__] += 1


@signals.entry_failed.connect
def failed(sender, entry, result):
    counts["failed", sender.__name__, result.retcode] += 1


@signals.message_refused.connect
def refused(sender, raw_data, error, result):
    counts["refused", type(error).__name__] += 1


class Fine(Task):
    def run(self):
        pass


class Broken(Task):
    def run(self):
        raise RuntimeError("broken")


Controller.register("fine", Fine)
Controller.register("broken", Broken)
for raw in (Message("1", "fine").dumps(), Message("2", "broken").dumps(), b"{not json"):
    Controller.run(raw)
for key, count in counts.items():
    print(*key, count)
