"""Tests of the structure: imports between modules point one way, and modules, classes and functions are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from _modules import FUNCTION, MODULES, imports, tree

#: A module may import only from modules in lines above its own.
ORDER = (
    {"kser"},
    {"kser.errors", "kser.backoff", "kser.escaping"},
    {"kser.config", "kser.forks", "kser.masking"},
    {"kser.limits", "kser.connection"},
    {"kser.retry"},
    {"kser.signals"},
    {"kser.status"},
    {"kser.store.model"},
    {"kser.store.base"},
    {"kser.store.transitions"},
    {"kser.store.memory", "kser.store.sql.tables", "kser.store.sql.statements", "kser.store.sql.group_commit"},
    {"kser.store.sql.migrations", "kser.store.sql.migrations.versions"},
    {"kser.store.sql.migrations.versions.v0001", "kser.store.sql.migrations.versions.v0002"},
    {"kser.store.sql.database", "kser.store.sql.ids", "kser.store.sql.migrations.env"},
    {"kser.store.sql.sqlite", "kser.store.sql.postgresql", "kser.store.sql.schema"},
    {"kser.store.sql.inserts", "kser.store.sql.queries", "kser.store.sql.schedule"},
    {"kser.store.sql.claims", "kser.store.sql.leases", "kser.store.sql.lifecycle"},
    {"kser.store.sql.saves", "kser.store.sql.checkpoints", "kser.store.sql.due_steps"},
    {"kser.store.sql.writer"},
    {"kser.store.sql.store"},
    {"kser.store.sql"},
    {"kser.store"},
    {"kser.store.__main__"},
    {"kser.results"},
    {"kser.schemas"},
    {"kser.log_lines"},
    {"kser.lockfiles"},
    {"kser.takeover"},
    {"kser.attempt"},
    {"kser.store.retrying"},
    {"kser.entry"},
    {"kser.controller"},
    {"kser.producer"},
    {
        "kser.consumer",
        "kser.consumer.admission",
        "kser.consumer.client",
        "kser.consumer.logs",
        "kser.consumer.services",
        "kser.consumer.green_threads",
    },
    {"kser.consumer.subscription", "kser.consumer.unreadable", "kser.consumer.starts"},
    {"kser.consumer.client_watch", "kser.consumer.exit_status", "kser.consumer.recoveries"},
    {"kser.consumer.dead_letters"},
    {"kser.consumer.offsets", "kser.consumer.shutdown_signals"},
    {"kser.consumer.commit_metadata"},
    {"kser.consumer.start_positions"},
    {"kser.consumer.work_item"},
    {"kser.consumer.lanes"},
    {"kser.consumer.takeovers"},
    {"kser.consumer.work_queue"},
    {"kser.consumer.isolation", "kser.consumer.takeover_host"},
    {"kser.consumer.options", "kser.consumer.partition_table"},
    {"kser.consumer.membership", "kser.consumer.stalls"},
    {"kser.consumer.poller", "kser.consumer.worker_pool"},
    {"kser.consumer.base"},
    {"kser.consumer.replay"},
    {"kser.sequencing", "kser.sequencing.task"},
    {"kser.sequencing.runner"},
    {"kser.sequencing.operation"},
    {"kser.durable", "kser.durable.serialization"},
    {"kser.durable.execution_state", "kser.durable.context"},
    {"kser.durable.step_runner", "kser.durable.periodic", "kser.durable.takeovers"},
    {"kser.durable.execution", "kser.durable.heartbeat"},
    {"kser.durable.manager", "kser.durable.message_handler", "kser.durable.recovery"},
    {"kser.sequencing.registry"},
    {"kser.python_kafka", "kser.python_kafka.logs", "kser.dummy", "kser.dummy.broker"},
    {"kser.python_kafka.options"},
    {"kser.confluent", "kser.confluent.logs", "kser.confluent.delivery_reports", "kser.confluent.records"},
    {"kser.confluent.options", "kser.confluent.patterns", "kser.confluent.producer_client"},
    {
        "kser.confluent.committer",
        "kser.confluent.damage",
        "kser.confluent.group_errors",
        "kser.python_kafka.decompression",
        "kser.python_kafka.group_errors",
        "kser.python_kafka.heartbeats",
        "kser.python_kafka.rebalances",
        "kser.python_kafka.null_values",
        "kser.python_kafka.idempotence",
        "kser.python_kafka.topics",
    },
    {"kser.python_kafka.batches", "kser.python_kafka.metadata", "kser.python_kafka.metadata_request"},
    {"kser.confluent.client_errors", "kser.python_kafka.health"},
    {"kser.confluent.topic_ids", "kser.python_kafka.topic_ids", "kser.python_kafka.offset_queries"},
    {"kser.python_kafka.client", "kser.confluent.client"},
    {"kser.python_kafka.producer", "kser.confluent.producer", "kser.dummy.producer"},
    {"kser.python_kafka.consumer", "kser.confluent.consumer", "kser.dummy.consumer"},
    {"kser.embedded"},
)
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}

#: The first package must not import the second: transports do not depend on each other, nor consumers on sequencing.
SEPARATE = (
    ("kser.dummy", "kser.python_kafka"),
    ("kser.dummy", "kser.confluent"),
    ("kser.python_kafka", "kser.dummy"),
    ("kser.python_kafka", "kser.confluent"),
    ("kser.confluent", "kser.dummy"),
    ("kser.confluent", "kser.python_kafka"),
    ("kser.consumer", "kser.sequencing"),
    ("kser.python_kafka", "kser.sequencing"),
    ("kser.confluent", "kser.sequencing"),
    ("kser.dummy", "kser.sequencing"),
    ("kser.consumer", "kser.durable"),
    ("kser.python_kafka", "kser.durable"),
    ("kser.confluent", "kser.durable"),
    ("kser.dummy", "kser.durable"),
    ("kser.sequencing", "kser.consumer"),
    ("kser.durable", "kser.consumer"),
    ("kser.store", "kser.durable"),
    ("kser.store", "kser.sequencing"),
)

#: Modules that a function may import, because they may not be installed.
OPTIONAL = {
    "kser.embedded": {"confluent_kafka"},
    "kser.store": {"kser.store.sql"},
    "kser.store.sql.schema": {"alembic", "alembic.config"},
}

#: Modules that import each other for annotations alone. Every other cycle is a fault.
KNOWN_CYCLES = [["kser.sequencing.operation", "kser.sequencing.runner"]]


def test_every_module_has_a_rank_in_the_order() -> None:
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_lower_ranked_modules(module: str) -> None:
    imported = {name for name in imports(tree(module)) if name.split(".")[0] == "kser"}
    assert {name for name in imported if RANK[name] >= RANK[module]} == set()


@pytest.mark.parametrize(("package", "other"), SEPARATE)
def test_separate_packages_do_not_import_each_other(package: str, other: str) -> None:
    members = [module for module in MODULES if f"{module}.".startswith(f"{package}.")]
    assert members
    imported = {name for module in members for name in imports(tree(module))}
    assert {name for name in imported if f"{name}.".startswith(f"{other}.")} == set()


@pytest.mark.parametrize("module", MODULES)
def test_functions_import_only_optional_dependencies(module: str) -> None:
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, FUNCTION)]
    assert {name for function in functions for name in imports(function)} <= OPTIONAL.get(module, set())


def _cycles() -> list[list[str]]:
    """Return the strongly connected components of the import graph, annotations included, with more than one module."""
    graph = {module: set(imports(tree(module), for_annotations=True)) & MODULES.keys() for module in MODULES}
    reached: dict[str, set[str]] = {}
    for module in graph:
        seen: set[str] = set()
        unvisited = [module]
        while unvisited:
            new = graph[unvisited.pop()] - seen
            seen |= new
            unvisited += new
        reached[module] = seen
    groups = {frozenset(other for other in seen if module in reached[other]) for module, seen in reached.items()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_import_cycles_for_annotations_are_the_known_ones() -> None:
    assert _cycles() == KNOWN_CYCLES


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 600
    long_functions = [
        node.name
        for node in ast.walk(tree(module))
        if isinstance(node, FUNCTION) and (node.end_lineno or 0) - node.lineno + 1 > 50
    ]
    assert long_functions == []


#: Classes that users subclass. Their public methods are the interface of the library, so only private ones count.
INTERFACES = {"BaseConsumer", "Entrypoint", "KafkaProducerBase", "Operation", "OperationRegistry", "Task"}

#: Classes with more methods, with the reason. The list may only shrink.
LARGE_CLASSES = {
    "ConfluentClient": "callbacks of librdkafka, start positions and probes share its state; a split needs a seam",
}


def _classes() -> Iterator[ast.ClassDef]:
    for module in MODULES:
        yield from (node for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef))


def _methods(node: ast.ClassDef) -> set[str]:
    """Return the names of the methods of a class; overloads and property setters share a name, so they count once."""
    return {child.name for child in node.body if isinstance(child, FUNCTION)}


def test_classes_have_at_most_twenty_methods() -> None:
    """Methods that implement a contract of a base class do not count."""
    methods = {node.name: _methods(node) for node in _classes()}
    bases = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)] for node in _classes()}

    def inherited(name: str) -> set[str]:
        return {method for base in bases.get(name, ()) for method in methods.get(base, set()) | inherited(base)}

    def counted(name: str) -> set[str]:
        own = methods[name] - inherited(name)
        return {method for method in own if method.startswith("_kser_")} if name in INTERFACES else own

    assert {name for name in methods if len(counted(name)) > 20} == set(LARGE_CLASSES)
