"""Apache Kafka for the tests: one node that is broker and controller, on loopback, in a temporary folder."""

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

from confluent_kafka.admin import AdminClient, NewPartitions
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

HERE = Path(__file__).parent
START_SECONDS = 60
STOP_SECONDS = 30

# Started and stopped many times, each time for some seconds: a quick start counts more than a quick compiler. Without
# the last two, files would stay in the system's temporary folder after a kill.
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
# What takes longer than a session, or than a poll may take, should not take long.
group.min.session.timeout.ms=1000
# Tests have no group whose members all arrive at once.
group.initial.rebalance.delay.ms=0
# A topic that nobody created is missing, as it is where topics are managed.
auto.create.topics.enable=false
# A broker that was killed may come back only when its session is over; by default after 9 s.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
log.cleaner.dedupe.buffer.size=2097152
"""


class ServiceMissing(Exception):
    """What is needed to run Apache Kafka is not there; the text says what."""


class Kafka:
    """A running Apache Kafka, whoever started it."""

    #: How many copies of a topic there are.
    copies = 1

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic."""
        with self._admin() as admin:
            admin.create_topics([NewTopic(name, num_partitions=partitions, replication_factor=self.copies)])

    def grow_topic(self, name: str, partitions: int) -> None:
        """Add partitions to a topic, so that it has so many."""
        # kafka-python 2 and 3 want to be asked in different ways.
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
    """An Apache Kafka of our own; it keeps its ports and its data until :meth:`close`.

    :raises ServiceMissing: Java or the jars cannot be had.
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
        """Make a folder for it, and its settings."""
        self._jars = jars()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port
        Kafka.__init__(self, f"127.0.0.1:{port}")
        self.folder = Path(tempfile.mkdtemp(prefix="kser-kafka-"))
        self._properties = self.folder / "server.properties"
        self._properties.write_text(properties.format(folder=self.folder))

    @property
    def pid(self) -> int | None:
        """The process id, None while it does not run."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start it."""
        assert self._process is None, "it runs already"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._properties)), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait(self) -> None:
        """Wait until it answers."""
        assert self._process is not None, "it was not launched"
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.port):
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                self.kill()
                happened = f"ended with status {status}" if status is not None else f"took over {START_SECONDS} s"
                raise RuntimeError(f"Apache Kafka {happened} while it started; it wrote:\n{self._log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ask it to end in order, and wait for that."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as a crash of its machine would."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop it if it runs, and delete its data."""
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


def jars() -> Path:
    """The folder with the jars, fetched through Maven at the first time.

    :raises ServiceMissing: Java, Maven or the network is not there.
    """
    if shutil.which("java") is None:
        raise ServiceMissing("there is no java on the PATH; install a Java runtime, 17 or newer")
    pom = HERE / "pom.xml"
    folder = HERE / "target" / f"jars-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    if shutil.which("mvn") is None:
        raise ServiceMissing("there is no mvn on the PATH to fetch Apache Kafka; install Maven")
    # Renamed when it is whole: an interrupted download is not taken for a complete one.
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
            # Somebody else was faster: theirs is as good.
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def new_cluster() -> str:
    """An identifier for a cluster."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on.

    Below those that systems give to outgoing connections: while the broker is down, one of these could take its port.
    """
    with contextlib.ExitStack() as sockets:
        found: list[int] = []
        while len(found) < count:
            port = random.randrange(20000, 32000)
            candidate = sockets.enter_context(socket.socket())
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                found.append(port)
        return found


def answers(port: int) -> bool:
    """Whether a broker handles requests on this port; it listens before it does."""
    size, api_versions, version, correlation, no_client = 10, 18, 0, 1, -1
    request = struct.pack(">ihhih", size, api_versions, version, correlation, no_client)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(request)
            return bool(connection.recv(4))
    except OSError:
        return False
