"""Sections 1 to 8: the modules, their classes, and every member with its kind and its parameters."""

import importlib
import inspect

from recorder import case, emit, main

# The underscore triggers that users override. Other private names are not published.
TRIGGERS = frozenset(
    (
        *("_post_init", "_prerun", "_run", "_postrun", "_onsuccess", "_onerror"),
        *("_onmessage", "_send", "_set_status", "_prebuild", "_build_tasks"),
    )
)
SPECIAL = ("__init__", "__repr__", "__del__")

# The published names. Helpers of a module are not part of its surface in either package.
PUBLISHED = {
    "kser.schemas": ("BaseSchema", "MessageSchema", "Base", "Message"),
    "kser.entry": ("EntrypointMeta", "Entrypoint"),
    "kser.controller": ("BaseController", "BaseProducer", "Controller"),
    "kser.sequencing.task": ("Task",),
    "kser.sequencing.operation": ("Operation",),
    "kser.sequencing.registry": ("OperationRegistry",),
    "kser.python_kafka.consumer": ("Consumer",),
    "kser.python_kafka.producer": ("Producer",),
}


def kind_of(owner: type, name: str) -> str:
    """Return the kind of a member."""
    static = inspect.getattr_static(owner, name)
    if isinstance(static, staticmethod | classmethod | property):
        return type(static).__name__
    return "method" if callable(static) and not isinstance(static, type) else "value"


def parameters(member) -> str:
    """Return names, kinds and defaults of the parameters, without annotations, which have no effect at run time."""
    signature = inspect.signature(member)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def declared(owner: type, name: str) -> bool:
    """Return whether a class, or a base class inside the package, declares a special method."""
    return any(name in vars(base) for base in owner.__mro__ if base.__module__.partition(".")[0] == "kser")


def show_class(owner: type) -> None:
    """Print a class, its published base classes, and its members."""
    published = {name for names in PUBLISHED.values() for name in names}
    bases = [base.__name__ for base in owner.__mro__[1:] if base.__name__ in published]
    emit(f"class {owner.__name__}({', '.join(bases)})")
    names = [name for name in SPECIAL if declared(owner, name)]
    inherited = set(dir(object)) | {
        n for b in owner.__mro__ if b.__module__.partition(".")[0] != "kser" for n in dir(b)
    }
    names += sorted(n for n in dir(owner) if n not in inherited and (n in TRIGGERS or not n.startswith("_")))
    for name in names:
        kind = kind_of(owner, name)
        tail = parameters(getattr(owner, name)) if kind in ("method", "classmethod", "staticmethod") else ""
        emit(f"  {kind} {name}{tail}")


def show_module(name: str) -> None:
    """Print the published classes of a module, the module that each one names, and the module's logger."""
    module = importlib.import_module(name)
    logger = getattr(module, "logger", None)
    emit(f"module {name} logger={logger and logger.name}")
    for member in PUBLISHED[name]:
        owner = getattr(module, member)
        emit(f"from {owner.__module__}")
        show_class(owner)


@case("1.members")
def the_package() -> None:
    module = importlib.import_module("kser")
    for name in ("__version__", "__hostname__", "KSER_METRICS_ENABLED", "KSER_TASK_COUNT", "KSER_TASKS_STATUS"):
        emit(f"{name} {hasattr(module, name)}")


@case("2.members")
def the_schemas() -> None:
    show_module("kser.schemas")


@case("3.members")
def the_entrypoint() -> None:
    show_module("kser.entry")


@case("4.members")
def the_controllers() -> None:
    show_module("kser.controller")


@case("5.members")
def the_task() -> None:
    show_module("kser.sequencing.task")


@case("6.members")
def the_operation() -> None:
    show_module("kser.sequencing.operation")


@case("7.members")
def the_registry() -> None:
    show_module("kser.sequencing.registry")


@case("8.members.consumer")
def the_kafka_python_consumer() -> None:
    show_module("kser.python_kafka.consumer")


@case("8.members.producer")
def the_kafka_python_producer() -> None:
    show_module("kser.python_kafka.producer")


if __name__ == "__main__":
    main()
