"""Transport on confluent-kafka (librdkafka), installed by the extra ``confluent``."""

from kser.errors import MissingDependency

try:
    import confluent_kafka  # noqa: F401
except ImportError as error:
    raise MissingDependency(
        f"kser.confluent needs confluent-kafka ({error}); install it with: pip install 'kser[confluent]'"
    ) from error
