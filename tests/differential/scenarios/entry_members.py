"""Section 3: the members of an entrypoint, apart from its life cycle."""

import logging

from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.entry import Entrypoint, EntrypointMeta
from kser.schemas import Message


class Probe(Entrypoint):
    """An entrypoint that does nothing."""

    def run(self):
        return Result(stdout="done")


class Outer:
    """A class with a nested entrypoint."""

    class Probe(Entrypoint):
        """An entrypoint in the namespace of a class."""


class Pathed(Entrypoint):
    """An entrypoint with an attribute named path."""

    path = "mine"


@case("3.ctor.falsy")
def falsy_arguments_are_replaced() -> None:
    for value in (None, {}, "", 0):
        entry = Probe(value, value, value, value)
        show(repr(value), (entry.uuid, entry.params, entry.result, entry.metadata))
    show("fresh", Probe().params is Probe().params)


@case("3.ctor.identity")
def truthy_arguments_are_kept_without_a_check() -> None:
    params, result, metadata, uuid = {"a": 1}, Result(uuid="r"), {"m": 1}, ("not", "a", "string")
    entry = Probe(uuid=uuid, params=params, result=result, metadata=metadata)
    show("same", (entry.uuid is uuid, entry.params is params, entry.result is result, entry.metadata is metadata))
    show("vars", sorted(vars(entry)))
    show("odd", vars(Probe("u", 5, "text", [1]))["result"])
    call("too many", Probe, 1, 2, 3, 4, 5)
    call("unknown", Probe, other=1)


@case("3.ctor.post-init")
def construction_ends_with_the_post_init_trigger() -> None:
    class Triggered(Probe):
        def _post_init(self):
            emit(f"_post_init {sorted(vars(self))}")

        def postinit(self):
            emit("postinit")

    show("made", Triggered(uuid="u"))

    class Hooked(Probe):
        def postinit(self):
            emit("postinit")
            return "ignored"

    show("made", Hooked(uuid="u"))


@case("3.required.kinds")
def required_fields_may_be_any_iterable() -> None:
    show("default", Entrypoint.REQUIRED_FIELDS)
    for fields in (["a"], ("a", "b"), "ab", None, {"a": 1}, []):
        Probe.REQUIRED_FIELDS = fields
        call(f"{fields!r} none given", Probe(uuid="u").check_required_params)
        call(f"{fields!r} a given", Probe(uuid="u", params={"a": None}).check_required_params)
    del Probe.REQUIRED_FIELDS


@case("3.path")
def the_path_of_a_class_is_its_module_and_name() -> None:
    class Local(Entrypoint):
        """An entrypoint in the namespace of a function."""

    show("paths", (Entrypoint.path, Probe.path, Outer.Probe.path, Local.path))
    show("meta", type(Probe) is EntrypointMeta)
    call("assigned", setattr, Probe, "path", "x")


@case("3.path.instance")
def the_path_of_an_instance() -> None:
    call("instance", getattr, Probe(), "path")


@case("3.path.own")
def an_attribute_named_path_shows_on_instances_only() -> None:
    show("class", Pathed.path)
    show("instance", Pathed().path)
    entry = Probe()
    entry.path = "assigned"
    show("assigned", entry.path)


@case("3.label")
def a_label_names_class_and_uuid() -> None:
    entry = Probe(uuid="u")
    for action in (None, "", "Run", 0, 5):
        call(repr(action), entry.label, action)
    call("keyword", entry.label, action="x")


@case("3.check.first-missing", "3.check.presence")
def the_first_missing_parameter_is_reported() -> None:
    class Needy(Probe):
        REQUIRED_FIELDS = ("a", "b")

    for params in ({}, {"a": 1}, {"b": 1}, {"a": None, "b": 0}):
        call(repr(params), Needy(uuid="u", params=params).check_required_params)


@case("3.log.text", "3.log.kwargs")
def log_prefixes_its_message() -> None:
    entry = Probe(uuid="u")
    call("default", entry.log, "hello")
    call("level", entry.log, "hello", logging.ERROR)
    call("keywords", entry.log, message="hello", level=logging.DEBUG)
    call("percent", entry.log, "100 %s %d")
    call("extra", entry.log, "hello", extra={"mine": 1})
    call("not text", entry.log, 5)
    try:
        raise ValueError("inner")
    except ValueError:
        call("exc_info", entry.log, "hello", exc_info=True)


@case("3.log.args")
def log_with_arguments_to_format() -> None:
    call("args", Probe(uuid="u").log, "hello %s", logging.INFO, "world")
    call("two", Probe(uuid="u").log, "%s-%s", logging.INFO, "a", "b")


@case("3.hooks.default")
def hooks_do_nothing_by_default() -> None:
    entry = Probe(uuid="u")
    call("postinit", entry.postinit)
    call("prerun", entry.prerun)
    for name in ("postrun", "onsuccess", "onerror"):
        marker = object()
        show(name, getattr(entry, name)(marker) is marker)


@case("3.run.base")
def an_entrypoint_without_run() -> None:
    call("run", Entrypoint(uuid="u").run)
    call("execute", Entrypoint(uuid="u").execute)


@case("3.to-message")
def an_entrypoint_becomes_a_message() -> None:
    entry = Probe("u", {"a": 1}, Result(uuid="r"), {"m": 1})
    message = call("own result", entry.to_Message)
    show("shared", (message.params is entry.params, message.result is entry.result, message.metadata is entry.metadata))
    other = Result(uuid="o")
    show("given", call("given result", entry.to_Message, other).result is other)
    call("keyword", entry.to_Message, result=other)
    show("type", type(message))


@case("3.from-message", "3.from-message.shared")
def a_message_becomes_an_entrypoint() -> None:
    class Greedy(Probe):
        def __init__(self, *args, **kwargs):
            emit(f"args {args!r} keywords {sorted(kwargs)}")
            super().__init__(*args, **kwargs)

    message = Message("u", "some.Other", {"a": 1}, Result(uuid="r"), {"m": 1})
    entry = Greedy.from_Message(message)
    show("type", type(entry))
    show("shared", (entry.params is message.params, entry.result is message.result, entry.metadata is message.metadata))
    show("uuid", entry.uuid)
    call("nothing", Probe.from_Message, None)


@case("3.repr")
def an_entrypoint_has_the_default_repr() -> None:
    show("repr", repr(Probe()).partition(" at ")[0])


if __name__ == "__main__":
    main()
