"""A cluster of three Apache Kafka nodes; each is broker and controller, and has a copy of every partition."""

from __future__ import annotations

from typing import Any, Self

from confluent_kafka.admin import AdminClient

from tests.kafka.broker import PROPERTIES, Kafka, KafkaBroker, free_ports, new_cluster

NODES = 3

#: Settings that differ from those of a single node; the later line of a properties file wins.
REPLICATED = """
node.id={node}
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
min.insync.replicas=2
# Elect a new leader soon after the old one is gone.
broker.session.timeout.ms=2000
controller.quorum.election.timeout.ms=500
controller.quorum.fetch.timeout.ms=1000
# Leaders move only when a test kills a node: a restarted node does not become leader by itself.
auto.leader.rebalance.enable=false
"""

OFFSETS = "__consumer_offsets"


class Node(KafkaBroker):
    """One node of a cluster."""

    def __init__(self, number: int, port: int, controller_ports: list[int], cluster: str) -> None:
        controllers = ",".join(f"127.0.0.1:{controller_port}" for controller_port in controller_ports)
        voters = ",".join(f"{node}@127.0.0.1:{voter_port}" for node, voter_port in enumerate(controller_ports, 1))
        properties = PROPERTIES.format(port=port, controller_port=controller_ports[number - 1], folder="{folder}")
        quorum = f"controller.quorum.bootstrap.servers={controllers}\ncontroller.quorum.voters={voters}\n"
        self.number = number
        self._prepare(port, properties + REPLICATED.format(node=number) + quorum)
        try:
            self._format(cluster)
        except BaseException:
            self.close()
            raise


class Cluster(Kafka):
    """A running cluster; each record has three replicas, and is acknowledged when two have it.

    :raises tests.kafka.broker.ServiceMissing: Java or the jars are missing.
    """

    copies = NODES

    def __init__(self) -> None:
        ports = free_ports(2 * NODES)
        cluster = new_cluster()
        super().__init__(",".join(f"127.0.0.1:{port}" for port in ports[:NODES]))
        self.nodes: dict[int, Node] = {}
        try:
            for number, port in enumerate(ports[:NODES], 1):
                self.nodes[number] = Node(number, port, ports[NODES:], cluster)
            # Launch all nodes first, because no node responds before a quorum of them runs.
            for node in self.nodes.values():
                node.launch()
            for node in self.nodes.values():
                node.wait()
        except BaseException:
            self.close()
            raise

    def leaders(self, topic: str) -> dict[int, int]:
        """Return the number of the leading node by partition; -1 for a partition without a leader."""
        client = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        partitions = client.list_topics(topic, timeout=10).topics[topic].partitions
        return {number: partition.leader for number, partition in partitions.items()}

    def close(self) -> None:
        """Stop all nodes, and delete their data."""
        for node in self.nodes.values():
            # Kill the nodes, because a graceful shutdown of the last two would wait for the third.
            node.kill()
        for node in self.nodes.values():
            node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
