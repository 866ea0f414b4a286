"""Three nodes of Apache Kafka, each broker and controller, that hold copies of everything."""

from __future__ import annotations

from typing import Any, Self

from confluent_kafka.admin import AdminClient

from tests.kafka.broker import PROPERTIES, Kafka, KafkaBroker, free_ports, new_cluster

NODES = 3

#: Where the settings differ from those of one node alone; what stands later in a file of properties wins.
REPLICATED = """
node.id={node}
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
min.insync.replicas=2
# A leader that is gone is missed soon.
broker.session.timeout.ms=2000
controller.quorum.election.timeout.ms=500
controller.quorum.fetch.timeout.ms=1000
# A node that is back leads nothing until it is asked to: leaders move when a test says so.
auto.leader.rebalance.enable=false
"""

OFFSETS = "__consumer_offsets"


class Node(KafkaBroker):
    """One of several."""

    def __init__(self, number: int, port: int, controller_ports: list[int], cluster: str) -> None:
        controllers = ",".join(f"127.0.0.1:{each}" for each in controller_ports)
        voters = ",".join(f"{node}@127.0.0.1:{each}" for node, each in enumerate(controller_ports, 1))
        own = PROPERTIES.format(port=port, controller_port=controller_ports[number - 1], folder="{folder}")
        quorum = f"controller.quorum.bootstrap.servers={controllers}\ncontroller.quorum.voters={voters}\n"
        self.number = number
        self._prepare(port, own + REPLICATED.format(node=number) + quorum)
        try:
            self._format(cluster)
        except BaseException:
            self.close()
            raise


class Cluster(Kafka):
    """A running cluster; every topic has three copies, of which two must have what counts as written.

    :raises tests.kafka.broker.ServiceMissing: Java or the jars cannot be had.
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
            # Together: none answers before there are enough of them.
            for node in self.nodes.values():
                node.launch()
            for node in self.nodes.values():
                node.wait()
        except BaseException:
            self.close()
            raise

    def leaders(self, topic: str) -> dict[int, int]:
        """The number of the node that leads, by partition; -1 where there is none."""
        client = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        found = client.list_topics(topic, timeout=10).topics[topic].partitions
        return {number: partition.leader for number, partition in found.items()}

    def close(self) -> None:
        """Stop all nodes, and delete their data."""
        for node in self.nodes.values():
            # At once: two that are left would wait for the third.
            node.kill()
        for node in self.nodes.values():
            node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
