"""Tests of the structure: imports between modules point one way, and modules and functions are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "kser"

#: A module may import from those in lines above its own, and from no other.
ORDER = (
    {"kser"},
    {"kser.errors", "kser.backoff"},
    {"kser.config"},
    {"kser.retry"},
    {"kser.signals"},
    {"kser.status"},
    {"kser.store.model"},
    {"kser.store.base"},
    {"kser.store.transitions"},
    {"kser.store.memory", "kser.store.sql.tables", "kser.store.sql.statements", "kser.store.sql.group_commit"},
    {"kser.store.sql.migrations", "kser.store.sql.migrations.versions", "kser.store.sql.migrations.versions.v0001"},
    {"kser.store.sql.database", "kser.store.sql.ids", "kser.store.sql.migrations.env"},
    {"kser.store.sql.sqlite", "kser.store.sql.postgresql", "kser.store.sql.schema"},
    {"kser.store.sql.inserts", "kser.store.sql.queries"},
    {"kser.store.sql.claims", "kser.store.sql.leases", "kser.store.sql.lifecycle"},
    {"kser.store.sql.saves", "kser.store.sql.checkpoints"},
    {"kser.store.sql.writer"},
    {"kser.store.sql.store"},
    {"kser.store.sql"},
    {"kser.store"},
    {"kser.store.__main__"},
    {"kser.results"},
    {"kser.schemas"},
    {"kser.log_lines"},
    {"kser.lockfiles"},
    {"kser.attempt"},
    {"kser.store.retrying"},
    {"kser.entry"},
    {"kser.controller"},
    {"kser.producer"},
    {"kser.consumer", "kser.consumer.client", "kser.consumer.logs", "kser.consumer.services"},
    {"kser.consumer.offsets", "kser.consumer.shutdown_signals"},
    {"kser.consumer.work_item"},
    {"kser.consumer.lanes"},
    {"kser.consumer.work_queue"},
    {"kser.consumer.options", "kser.consumer.dead_letters", "kser.consumer.partition_table"},
    {"kser.consumer.stalls"},
    {"kser.consumer.poller", "kser.consumer.worker_pool"},
    {"kser.consumer.base"},
    {"kser.consumer.replay"},
    {"kser.sequencing", "kser.sequencing.task"},
    {"kser.sequencing.runner"},
    {"kser.sequencing.operation"},
    {"kser.durable", "kser.durable.serialization"},
    {"kser.durable.execution_state", "kser.durable.context"},
    {"kser.durable.step_runner"},
    {"kser.durable.execution"},
    {"kser.durable.manager", "kser.durable.message_handler", "kser.durable.recovery"},
    {"kser.sequencing.registry"},
    {"kser.python_kafka", "kser.python_kafka.options", "kser.dummy", "kser.dummy.broker"},
    {"kser.confluent", "kser.confluent.logs", "kser.confluent.options", "kser.confluent.delivery_reports"},
    {"kser.confluent.committer", "kser.python_kafka.rebalances"},
    {"kser.python_kafka.client", "kser.confluent.client"},
    {"kser.python_kafka.producer", "kser.confluent.producer", "kser.dummy.producer"},
    {"kser.python_kafka.consumer", "kser.confluent.consumer", "kser.dummy.consumer"},
    {"kser.embedded"},
)
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}

#: Transports that know nothing of each other, and consumers that know nothing of sequencing.
APART = (
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

#: What may be imported inside a function, because it may not be installed.
OPTIONAL = {
    "kser.embedded": {"confluent_kafka"},
    "kser.store": {"kser.store.sql"},
    "kser.store.sql.schema": {"alembic", "alembic.config"},
}

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports below ``node`` that are executed: those for annotations alone are not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from _imports(child)


def _targets(statement: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    assert statement.level == 0, f"line {statement.lineno}: a relative import"
    full = {f"{statement.module}.{alias.name}" for alias in statement.names}
    return {name if name in MODULES else str(statement.module) for name in full}


def _imported(module: str) -> set[str]:
    return {name for statement in _imports(_tree(module)) for name in _targets(statement)}


def test_every_module_has_a_rank_in_the_order() -> None:
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_lower_ranked_modules(module: str) -> None:
    ours = {name for name in _imported(module) if name.split(".")[0] == "kser"}
    assert {name for name in ours if RANK[name] >= RANK[module]} == set()


@pytest.mark.parametrize(("one", "other"), APART)
def test_separate_packages_do_not_import_each_other(one: str, other: str) -> None:
    members = [module for module in MODULES if module == one or module.startswith(f"{one}.")]
    known = {name for module in members for name in _imported(module)}
    assert {name for name in known if name == other or name.startswith(f"{other}.")} == set()


@pytest.mark.parametrize("module", MODULES)
def test_functions_import_only_optional_dependencies(module: str) -> None:
    functions = [node for node in ast.walk(_tree(module)) if isinstance(node, FUNCTION)]
    found = {name for function in functions for statement in _imports(function) for name in _targets(statement)}
    assert found <= OPTIONAL.get(module, set())


#: Pairs of modules that import each other for annotations alone. Every other cycle is a fault.
PAIRS: frozenset[frozenset[str]] = frozenset({frozenset({"kser.sequencing.operation", "kser.sequencing.runner"})})


def _typing_imports(module: str) -> set[str]:
    """Return every kser module that a module names in an import, also those for annotations alone."""
    statements = [node for node in ast.walk(_tree(module)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for statement in statements for name in _targets(statement) if name in MODULES}


def _cycles() -> list[list[str]]:
    """Return the strongly connected components of the import graph with more than one module."""
    graph = {module: _typing_imports(module) for module in MODULES}
    reached: dict[str, set[str]] = {}
    for module in graph:
        seen: set[str] = set()
        todo = [module]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        reached[module] = seen
    groups = {frozenset(other for other in seen if module in reached[other]) for module, seen in reached.items()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_import_cycles_for_annotations_are_the_known_ones() -> None:
    assert [cycle for cycle in _cycles() if frozenset(cycle) not in PAIRS] == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 600
    long = [
        node.name
        for node in ast.walk(_tree(module))
        if isinstance(node, FUNCTION) and (node.end_lineno or 0) - node.lineno + 1 > 50
    ]
    assert long == []


#: Classes that users subclass. Their public methods are the interface of the library, so only private ones count.
INTERFACES = {"BaseConsumer", "Entrypoint", "KafkaProducerBase", "Operation", "OperationRegistry", "Task"}

#: Classes with more methods, with the reason. The list may only shrink.
LARGE_CLASSES = {
    "ConfluentClient": "callbacks of librdkafka, start positions and probes share its state; a split needs a seam",
}


def _classes() -> Iterator[ast.ClassDef]:
    for module in MODULES:
        yield from (node for node in ast.walk(_tree(module)) if isinstance(node, ast.ClassDef))


def _methods(node: ast.ClassDef) -> set[str]:
    """Return the methods of a class, without those that only declare overloads or properties again."""
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
