"""A producer client of librdkafka, with the reader of its delivery reports and its fatal error."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from kser.confluent.delivery_reports import DeliveryReportPoller

#: Errors of messages that were removed from the client.
PURGED = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)


class FatalError:
    """The fatal error of a client, after which the client can send nothing any more.

    librdkafka keeps the messages of such a client until they expire, which takes minutes, so this class purges them.
    Their senders then get a delivery report at once.

    :param client: the client of librdkafka.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        #: The text of the error; empty as long as the client can send.
        self.reason = ""

    def poll(self, seconds: float) -> None:
        """Poll the client, and record its fatal error, which librdkafka reports only once, to any thread that polls.

        :raises KafkaException: the client reported an error that is not fatal.
        """
        try:
            self._client.poll(seconds)
        except KafkaException as error:
            if not self.note(error.args[0]):
                raise

    def note(self, error: Any) -> bool:
        """Record an error of the client if it is fatal; return whether it is.

        The calls after a fatal error only say that there was one, so their text replaces no other text.
        """
        if not isinstance(error, KafkaError):
            return False
        is_repetition = error.code() == KafkaError._FATAL
        if not is_repetition and not error.fatal():
            return False
        is_known = bool(self.reason)
        if not is_known or not is_repetition:
            self.reason = error.str()
        if not is_known:
            self._client.purge()
        return True


class ProducerClient:
    """A producer client of librdkafka, with the reader of its delivery reports and its fatal error.

    :param client: the client of librdkafka.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.fatal = FatalError(client)
        self.poller = DeliveryReportPoller(self.fatal.poll)

    def abandon(self, seconds: float) -> None:
        """Serve the last delivery reports of a client in a fatal state, in a thread of its own.

        :param seconds: the longest time for the reports.
        """
        threading.Thread(
            target=self._serve_last_reports, args=(seconds,), name="kser-fatal-client", daemon=True
        ).start()

    def _serve_last_reports(self, seconds: float) -> None:
        with suppress(KafkaException):
            self.client.purge()
            self.client.flush(seconds)
        self.poller.close()
