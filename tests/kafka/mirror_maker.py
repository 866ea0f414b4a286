"""MirrorMaker 2 for the tests: it copies a topic and the committed offsets of groups to another Apache Kafka."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.kafka.broker import HERE, Kafka, jars

PROPERTIES = """\
clusters = source, target
source.bootstrap.servers = {source}
target.bootstrap.servers = {target}
source->target.enabled = true
target->source.enabled = false
source->target.topics = {topic}
source->target.groups = .*
# The topic keeps its name.
replication.policy.class = org.apache.kafka.connect.mirror.IdentityReplicationPolicy
replication.factor = 1
offset-syncs.topic.replication.factor = 1
checkpoints.topic.replication.factor = 1
offset.storage.replication.factor = 1
status.storage.replication.factor = 1
config.storage.replication.factor = 1
offset.storage.partitions = 1
status.storage.partitions = 1
emit.heartbeats.enabled = false
sync.topic.acls.enabled = false
sync.group.offsets.enabled = true
sync.group.offsets.interval.seconds = 1
emit.checkpoints.interval.seconds = 1
refresh.topics.interval.seconds = 2
refresh.groups.interval.seconds = 2
tasks.max = 1
"""


@contextlib.contextmanager
def mirror_maker(source: Kafka, target: Kafka, topic: str) -> Iterator[Path]:
    """Run MirrorMaker inside the ``with`` block; return the file with its output."""
    classes = f"{jars(HERE / 'mirror' / 'pom.xml')}{os.sep}*"
    with tempfile.TemporaryDirectory(prefix="kser-mirror-") as name:
        folder = Path(name)
        properties, output = folder / "mirror.properties", folder / "output.log"
        properties.write_text(
            PROPERTIES.format(source=source.bootstrap_servers, target=target.bootstrap_servers, topic=topic)
        )
        java = ["java", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"]
        with output.open("wb") as log:
            process = subprocess.Popen(
                [
                    *java,
                    f"-Djava.io.tmpdir={folder}",
                    "-cp",
                    classes,
                    "org.apache.kafka.connect.mirror.MirrorMaker",
                    str(properties),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield output
        finally:
            process.kill()
            process.wait()
