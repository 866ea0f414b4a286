"""The metadata of topics, with a time limit that kafka-python lacks."""

from __future__ import annotations

from kafka import KafkaConsumer
from kafka.errors import KafkaTimeoutError

from kser.python_kafka.rebalances import ASYNC

#: Timeout in milliseconds of a request for metadata.
METADATA_TIMEOUT_MS = 2000


def partitions_of(client: KafkaConsumer, topic: str) -> set[int]:
    """Return the partitions of a topic to which the client has subscribed; empty if the topic does not exist.

    ``KafkaConsumer.partitions_for_topic`` waits without a limit while no broker responds.

    :raises kafka.errors.KafkaTimeoutError: no broker responded within ``METADATA_TIMEOUT_MS``.
    """
    network = client._client
    partitions = network.cluster.partitions_for_topic(topic)
    if partitions is None:
        update = network.cluster.request_update()
        if ASYNC:
            client._net.run(client._manager.wait_for, update, METADATA_TIMEOUT_MS)
        else:
            network.poll(timeout_ms=METADATA_TIMEOUT_MS, future=update)
            if not update.is_done:
                raise KafkaTimeoutError(f"no metadata of topic {topic!r} within {METADATA_TIMEOUT_MS} ms")
        partitions = network.cluster.partitions_for_topic(topic)
    return set(partitions or ())
