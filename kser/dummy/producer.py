"""Producer of the in-memory transport. In place of ``kser.dummy`` of 0.8.27, which neither sent nor received."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cdumay_result import Result

from kser import signals
from kser.config import Settings
from kser.controller import BaseProducer
from kser.dummy.bus import Bus
from kser.results import failure
from kser.schemas import Message


class Producer(BaseProducer):
    """Puts messages on the bus that ``config["bootstrap_servers"]`` names.

    :param config: ``bootstrap_servers`` is looked at, the rest is not; ``KSER_CONFIG`` when None.
    :param app: a Flask application whose ``config`` is looked at before the environment.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, *, app: Any = None) -> None:
        self.config = dict((Settings.of(app).client if config is None else config) or {})
        self.client = Bus.at(str(self.config.get("bootstrap_servers", "")))

    def _send(self, topic: str, kmsg: Message, timeout: float = 60) -> Any:
        try:
            result = self._put(topic, kmsg, timeout)
        except Exception as exc:
            result = failure(exc, kmsg.uuid)
        return self._sent(topic, kmsg, result)

    def bulk_send(self, topic: str, kmsgs: Iterable[Message], timeout: float = 60) -> Result:
        """Send many messages; all or, when one has no JSON form, those before it.

        :param topic: where to.
        :param kmsgs: the messages; any iterable.
        :param timeout: not needed here; shown in the result.
        """
        count = 0
        try:
            for kmsg in kmsgs:
                result = self._put(topic, kmsg, timeout)
                signals.emit(signals.message_sent, type(self), topic=topic, kmsg=kmsg, result=result)
                count += 1
        except Exception as exc:
            return Result.from_exception(exc)
        return Result(stdout=f"{count} message(s) sent to {topic} (timeout: {timeout})")

    def _put(self, topic: str, kmsg: Message, timeout: float) -> Result:
        self.client.send(topic, self._onmessage(kmsg).dumps().encode("utf-8"))
        text = f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic} (timeout: {timeout})"
        return Result(uuid=kmsg.uuid, stdout=text)
