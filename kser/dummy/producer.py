"""Producer of the in-memory transport. Behaviour page, section 10."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cdumay_result import Result

from kser.controller import BaseProducer
from kser.dummy.bus import Bus
from kser.schemas import Message


class Producer(BaseProducer):
    """Puts messages on the bus that ``config["bootstrap_servers"]`` names.

    :param config: ``bootstrap_servers`` is looked at, the rest is not.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self.client = Bus.at(str(self.config.get("bootstrap_servers", "")))

    def _send(self, topic: str, kmsg: Message, timeout: float = 60) -> Any:
        try:
            self.client.send(topic, self._onmessage(kmsg).dumps().encode("utf-8"))
            text = f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic} (timeout: {timeout})"
            result = Result(uuid=kmsg.uuid, stdout=text)
        except Exception as exc:
            result = Result.from_exception(exc, uuid=kmsg.uuid)
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
                self.client.send(topic, self._onmessage(kmsg).dumps().encode("utf-8"))
                count += 1
        except Exception as exc:
            return Result.from_exception(exc)
        return Result(stdout=f"{count} message(s) sent to {topic} (timeout: {timeout})")
