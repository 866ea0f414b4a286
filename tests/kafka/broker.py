"""Apache Kafka for the tests: one node, broker and controller in one process, on the loopback interface."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, OffsetSpec
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

HERE = Path(__file__).parent
START_SECONDS = 60
STOP_SECONDS = 30

# Tests run a broker for a few seconds, so a fast start is worth more than fast code. Without the last two options, a
# killed broker would leave files in the system's temporary folder.
JAVA_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-Djava.io.tmpdir={folder}",
)

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={folder}/data
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# Allow short sessions, so that tests of expired sessions are short.
group.min.session.timeout.ms=1000
# The delay would make each first rebalance slow, and no test starts many members at once.
group.initial.rebalance.delay.ms=0
# Tests need missing topics, which a broker with this setting does not create.
auto.create.topics.enable=false
# The group protocol "consumer" (KIP-848) has its own limits, which a client cannot set.
group.consumer.min.heartbeat.interval.ms=200
group.consumer.heartbeat.interval.ms=200
group.consumer.min.session.timeout.ms=1500
group.consumer.session.timeout.ms=3000
# A killed broker may restart only after its session has expired, by default after 9 s.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
log.cleaner.dedupe.buffer.size=2097152
"""


class ServiceMissing(Exception):
    """A missing requirement of Apache Kafka; the text names it."""


class Kafka:
    """A running Apache Kafka at an address."""

    #: The replication factor of new topics.
    copies = 1

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic with ``partitions`` partitions, and wait until each partition has a leader."""
        with self._admin() as admin:
            admin.create_topics([NewTopic(name, num_partitions=partitions, replication_factor=self.copies)])
        client = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        latest = {TopicPartition(name, number): OffsetSpec.latest() for number in range(partitions)}
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                # Under load, a broker that has created a topic rejects requests to its partitions for a moment.
                for future in client.list_offsets(latest).values():
                    future.result(START_SECONDS)
                return
            except KafkaException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def grow_topic(self, name: str, partitions: int) -> None:
        """Add partitions to a topic, so that it has ``partitions``."""
        # The call of kafka-python differs between its versions 2 and 3, so librdkafka makes it.
        client = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        (grown,) = client.create_partitions([NewPartitions(name, partitions)]).values()
        grown.result(START_SECONDS)

    def delete_topic(self, name: str) -> None:
        """Delete a topic with its messages."""
        with self._admin() as admin:
            admin.delete_topics([name])

    def _admin(self) -> contextlib.closing[KafkaAdminClient]:
        return contextlib.closing(KafkaAdminClient(bootstrap_servers=self.bootstrap_servers))


class KafkaBroker(Kafka):
    """An Apache Kafka that the tests start; it keeps its ports and its data until :meth:`close`.

    :raises ServiceMissing: Java or the jars are missing.
    """

    def __init__(self) -> None:
        port, controller_port = free_ports(2)
        self._prepare(port, PROPERTIES.format(port=port, controller_port=controller_port, folder="{folder}"))
        try:
            self._format(new_cluster(), "--standalone")
            self.start()
        except BaseException:
            self.close()
            raise

    def _prepare(self, port: int, properties: str) -> None:
        """Create the folder and the settings of the broker."""
        self._jars = jars()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port
        Kafka.__init__(self, f"127.0.0.1:{port}")
        self.folder = Path(tempfile.mkdtemp(prefix="kser-kafka-"))
        self._properties = self.folder / "server.properties"
        self._properties.write_text(properties.format(folder=self.folder))

    @property
    def pid(self) -> int | None:
        """The process id; None while the broker is down."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the broker and wait until it responds."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start the process of the broker."""
        assert self._process is None, "the broker already runs"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._properties)), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait(self) -> None:
        """Wait until the broker responds.

        :raises RuntimeError: the process has ended, or did not respond within ``START_SECONDS``.
        """
        assert self._process is not None, "call launch() first"
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.port):
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                self.kill()
                problem = f"ended with status {status}" if status is not None else f"took over {START_SECONDS} s"
                raise RuntimeError(f"Apache Kafka {problem} while it started; it wrote:\n{self._log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Shut the broker down with SIGTERM, and wait for the end of its process."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the broker with SIGKILL, as after a crash."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the broker if it runs, and delete its data."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _log(self) -> Path:
        return self.folder / "output.log"

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _format(self, cluster: str, *options: str) -> None:
        done = subprocess.run(
            self._java(
                "kafka.tools.StorageTool",
                *("format", f"--cluster-id={cluster}", *options, "--config", str(self._properties)),
            ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"Apache Kafka could not format its storage:\n{done.stdout}{done.stderr}")

    def _java(self, program: str, *arguments: str) -> list[str]:
        options = [option.format(folder=self.folder) for option in JAVA_OPTIONS]
        return ["java", *options, "-cp", f"{self._jars}{os.sep}*", program, *arguments]


def jars(pom: Path = HERE / "pom.xml") -> Path:
    """Return the folder with the jars of Apache Kafka; Maven downloads them at the first call.

    :param pom: the Maven project whose dependencies are the jars.
    :raises ServiceMissing: Java, Maven or the network is missing.
    """
    if shutil.which("java") is None:
        raise ServiceMissing("there is no java on the PATH; install a Java runtime, 17 or newer")
    folder = HERE / "target" / f"jars-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    if shutil.which("mvn") is None:
        raise ServiceMissing("there is no mvn on the PATH to fetch Apache Kafka; install Maven")
    # Rename the folder only after the download, so that an interrupted download never counts as complete.
    unfinished = folder.with_name(f"unfinished-{os.getpid()}")
    try:
        done = subprocess.run(
            [
                *("mvn", "--quiet", "--batch-mode", "--file", str(pom), "dependency:copy-dependencies"),
                *(f"-DoutputDirectory={unfinished}", "-DincludeScope=runtime"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ServiceMissing(f"Maven could not fetch Apache Kafka:\n{done.stdout}{done.stderr}")
        with contextlib.suppress(OSError):
            # Another process has finished the same download first, so use its folder.
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def new_cluster() -> str:
    """Return a new cluster id."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def free_ports(count: int) -> list[int]:
    """Return unused ports of the loopback interface.

    The ports are below the ephemeral range. Otherwise an outgoing connection could take the port of a broker that is
    down.
    """
    with contextlib.ExitStack() as sockets:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(20000, 32000)
            candidate = sockets.enter_context(socket.socket())
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def answers(port: int) -> bool:
    """Return whether a broker responds on this port. A starting broker listens before it responds."""
    size, api_versions, version, correlation, no_client = 10, 18, 0, 1, -1
    request = struct.pack(">ihhih", size, api_versions, version, correlation, no_client)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(request)
            return bool(connection.recv(4))
    except OSError:
        return False
