"""The idempotent producer of kafka-python 3 after an error of a single record or topic.

After an error such as "message too large" or "topic authorization failed", kafka-python 3 puts its idempotent producer
into a fatal state, in which it can send nothing any more, and fails the records of other threads with the same error.
The Java client only continues with a new epoch. This module makes kafka-python do the same.
"""

from __future__ import annotations

from typing import Any

from kafka import KafkaProducer


def keep_usable(client: KafkaProducer) -> None:
    """Keep an idempotent producer usable after an error of a single record or topic.

    Errors of the producer itself, such as a missing authorization for the cluster, stay fatal, and the producer of kser
    then replaces the client. Producers that are not
    idempotent need no change. Neither do transactional producers, which only abort their transaction.
    """
    manager = getattr(client, "_transaction_manager", None)
    classify = getattr(manager, "classify_batch_error", None)
    if manager is None or classify is None or manager.is_transactional():
        return

    def classify_less_strictly(error: Any, *arguments: Any, **keywords: Any) -> Any:
        outcome = classify(error, *arguments, **keywords)
        kind = error if isinstance(error, type) else type(error)
        if outcome != manager.ERROR_CLASS_FATAL or kind in manager._FATAL_ERRORS:
            return outcome
        # The broker has not counted the failed batch, so the sequence numbers of the client are too high now.
        return (
            manager.ERROR_CLASS_NEEDS_EPOCH_BUMP
            if manager._supports_epoch_bump()
            else manager.ERROR_CLASS_NEEDS_PRODUCER_ID_RESET
        )

    manager.classify_batch_error = classify_less_strictly
