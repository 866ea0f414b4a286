"""Tests of the documentation: its examples run, and its tables match the code.

``python -m tests.test_docs`` writes the outputs that it shows again.
"""

from __future__ import annotations

import ast
import configparser
import csv
import importlib
import inspect
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from cdumay_result import Result

import kser
from kser import Controller, Message, Operation, OperationRegistry, Task, errors, schemas
from kser.config import Settings
from kser.consumer.options import ConsumerOptions
from kser.dummy.consumer import Consumer
from kser.embedded import EmbeddedBroker

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
QUICKSTART = EXAMPLES / "docs" / "quickstart"
TESTING = EXAMPLES / "docs" / "testing"
DEMO = EXAMPLES / "docs" / "demo.txt"
SHOP = EXAMPLES / "docs" / "shop.txt"
DIFFERENTIAL = ROOT / "tests" / "differential" / "accepted_differences.txt"

PRODUCTION = EXAMPLES / "production"

SCRIPTS = [EXAMPLES / "readme.py", *sorted((EXAMPLES / "docs").glob("*.py"))]
PAGES = sorted(DOCS.glob("*.rst"))

#: Of a program that should have ended long before.
TIMEOUT_SECONDS = 60

CHANGING = (
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<uuid>"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"), "<time>"),
    (re.compile(r"You made a [1-6]"), "You made a <number>"),
    # On a busy machine kafka-python warns of itself, and of a topic that is being made.
    (re.compile(r".*(It is blocking the event loop|No partition metadata for topic).*\n"), ""),
)

IDENTIFIER = re.compile(r"[A-DS]\d{1,2}[a-z]?")


def lasting(text: str) -> str:
    """``text`` without what is another at each run."""
    for pattern, name in CHANGING:
        text = pattern.sub(name, text)
    return text


# -- what programs print ---


def surroundings(locks: Path) -> dict[str, str]:
    """The environment of a program of the documentation: this kser, and lock files of its own."""
    left_out = ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KSER_") and name not in left_out}
    package = str(Path(kser.__file__).parent.parent)
    return {**kept, "LOCK_PATH": str(locks), "PYTHONPATH": package, "PYTHONUNBUFFERED": "1"}


def output_of(*arguments: str | Path, locks: Path, errors_too: bool = True, **options: Any) -> str:
    """What a Python program prints; it has to end well."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors_too else subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        **{"env": surroundings(locks), **options},
    )
    assert done.returncode == 0, done.stdout + (done.stderr or "")
    return done.stdout


def play_quickstart(locks: Path) -> dict[Path, str]:
    """The three terminals of the quickstart, and what two of them show."""
    broker = subprocess.Popen(**_terminal(1, surroundings(locks)), stderr=subprocess.DEVNULL)
    consumer = None
    watchdog = threading.Timer(TIMEOUT_SECONDS, broker.kill)
    watchdog.start()
    try:
        exports = [shlex.split(broker.stdout.readline()) for _ in range(2)]
        pasted = dict(words[1].split("=", 1) for words in exports if words)
        env = {**surroundings(locks), **pasted}
        consumer = subprocess.Popen(**_terminal(2, env), stderr=subprocess.STDOUT)
        order = output_of(*_words(3)[1:], locks=locks, env=env, cwd=QUICKSTART)
        shop = []
        for line in consumer.stdout:
            shop.append(line)
            if line.startswith("Controller."):
                consumer.send_signal(signal.SIGINT)
        assert consumer.wait() == 0, shop
        return {QUICKSTART / "order.txt": order, QUICKSTART / "shop.txt": "".join(shop)}
    finally:
        watchdog.cancel()
        watchdog.join()
        for process in filter(None, (consumer, broker)):
            process.terminate()
            process.wait()
            process.stdout.close()


def _words(number: int) -> list[str]:
    words = shlex.split((QUICKSTART / f"terminal-{number}.sh").read_text())
    assert words[0] == "python"
    return words


def _terminal(number: int, env: dict[str, str]) -> dict[str, Any]:
    arguments = [sys.executable, *_words(number)[1:]]
    return {"args": arguments, "env": env, "cwd": QUICKSTART, "stdout": subprocess.PIPE, "text": True}


def play_dice(locks: Path) -> str:
    """What ``scripts/demo`` shows."""
    return output_of(ROOT / "scripts" / "_demo.py", locks=locks, errors_too=False)


def play_shop(locks: Path) -> str:
    """What the buyer of ``scripts/demo shop`` sees."""
    shown = output_of(ROOT / "scripts" / "_demo.py", "shop", locks=locks, errors_too=False)
    lines = shown.partition("Output of buy.py::\n\n")[2].splitlines()
    return "".join(f"{line[4:]}\n" for line in lines)


def without_figures(table: str) -> str:
    """The buyer's table without processes and seconds."""
    return re.sub(r" +\d+ +\d+\.\d\d *", " <process> <seconds> ", table)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_program_prints_the_documented_output(script: Path, tmp_path: Path) -> None:
    assert lasting(output_of(script, locks=tmp_path)) == lasting(script.with_suffix(".txt").read_text())


def test_quickstart_prints_the_documented_output(tmp_path: Path) -> None:
    for path, text in play_quickstart(tmp_path).items():
        assert lasting(text) == lasting(path.read_text()), path.name


def test_dice_game_prints_the_documented_output(tmp_path: Path) -> None:
    # The two messages may be in different partitions, so either may come first.
    assert sorted(lasting(play_dice(tmp_path)).splitlines()) == sorted(lasting(DEMO.read_text()).splitlines())


def test_shop_prints_the_documented_output(tmp_path: Path) -> None:
    assert without_figures(play_shop(tmp_path)) == without_figures(SHOP.read_text())


def test_documented_tests_pass(tmp_path: Path) -> None:
    options = ("-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", TESTING)
    assert " passed" in output_of("-m", "pytest", *options, TESTING, locks=tmp_path)


def test_quickstart_installs_existing_extras() -> None:
    extras = re.search(r"\[(.+)\]", (QUICKSTART / "install.sh").read_text())[1].split(",")
    declared = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": ' in declared for extra in extras)


# -- production ---


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(PRODUCTION / "shop@.service")
    return parser


def environment_file() -> dict[str, str]:
    return dict(line.split("=", 1) for line in (PRODUCTION / "shop.env").read_text().splitlines())


def pod() -> dict[str, Any]:
    deployment = yaml.safe_load((PRODUCTION / "deployment.yaml").read_text())
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    return deployment["spec"]["template"]["spec"]


def seconds_to_end(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> float:
    """What a consumer with these settings may need to end, as the page says."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    options = ConsumerOptions.from_settings(Settings(), {})
    return options.shutdown_timeout + options.revoke_timeout + 10


def test_systemd_unit_leaves_time_for_a_graceful_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    service = unit()["Service"]
    assert (service["KillSignal"], service["KillMode"], service["Restart"]) == ("SIGTERM", "mixed", "on-failure")
    assert float(service["TimeoutStopSec"]) > seconds_to_end(environment_file(), monkeypatch)
    assert Settings().client["group_id"] == "shop"
    assert Settings().topics == ["orders"]


def test_kubernetes_deployment_leaves_time_for_a_graceful_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pod()["containers"]
    settings = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert pod()["terminationGracePeriodSeconds"] > seconds_to_end(settings, monkeypatch)
    known = {"PYTHONUNBUFFERED", "LOCK_PATH", "KSER_CONFIG", "KSER_TOPICS"}
    options = {f"KSER_{field.name.upper()}" for field in fields(ConsumerOptions)}
    assert {entry["name"] for entry in container["env"]} - known <= options
    folders = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert settings["LOCK_PATH"] in folders
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}


def test_deployed_consumer_starts_stays_alive_and_ends(tmp_path: Path) -> None:
    (container,) = pod()["containers"]
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    probes = [container[name]["exec"]["command"] for name in ("readinessProbe", "livenessProbe")]
    with EmbeddedBroker("orders", "orders.dlq") as broker:
        config = json.dumps({**broker.config, "api_version": "2.0", "group_id": "shop"})
        env = {**surroundings(tmp_path), **environment, "KSER_CONFIG": config, "LOCK_PATH": str(tmp_path)}
        python, *script = container["command"]
        assert python == "python"
        arguments = {"cwd": PRODUCTION, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen([sys.executable, *script], text=True, **arguments) as consumer:
            watchdog = threading.Timer(TIMEOUT_SECONDS, consumer.kill)
            watchdog.start()
            try:
                while consumer.poll() is None and any(subprocess.run(probe, env=env).returncode for probe in probes):
                    time.sleep(0.1)
                consumer.terminate()
                output = consumer.communicate()[0]
            finally:
                watchdog.cancel()
                watchdog.join()
        assert consumer.returncode == 0, output
        assert "commit=after, workers=8, ordering=key, group=shop, topics=orders" in output


def test_security_examples_use_options_that_the_clients_know() -> None:
    kafka = pytest.importorskip("kafka")
    confluent = json.loads((PRODUCTION / "security-confluent.json").read_text())
    known = importlib.import_module("kser.confluent.options")
    assert set(confluent) <= known._COMMON | known.CONSUMER_ONLY
    assert set(json.loads((PRODUCTION / "security-python-kafka.json").read_text())) <= set(
        kafka.KafkaConsumer.DEFAULT_CONFIG
    )


# -- the pages ---


def included(page: Path) -> Iterator[Path]:
    for name in re.findall(r"^ *\.\. literalinclude:: (.+)$", page.read_text(), re.MULTILINE):
        yield (page.parent / name).resolve()


def test_every_example_file_is_included_in_a_page() -> None:
    shown = {path for page in PAGES for path in included(page)}
    kinds = (".py", ".sh", ".txt", ".env", ".service", ".yaml", ".json")
    files = {path for path in EXAMPLES.rglob("*.*") if path.suffix in kinds and path.is_file()}
    assert files - shown == set()


def test_pages_contain_no_inline_code() -> None:
    languages = {
        (page.name, language)
        for page in [*PAGES, ROOT / "CONTRIBUTING.rst"]
        for language in re.findall(r"^ *\.\. code-block:: *(\S*)$", page.read_text(), re.MULTILINE)
    }
    assert {pair for pair in languages if pair[1] != "text"} == {("CONTRIBUTING.rst", "sh")}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of reStructuredText, without their indentation."""
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") + "\n" for block in found]


def test_readme_contains_the_example_and_its_outputs() -> None:
    readme = (ROOT / "README.rst").read_text()
    assert blocks(readme, "python") == [(EXAMPLES / "readme.py").read_text()]
    assert blocks(readme, "text") == [
        (EXAMPLES / "readme.txt").read_text(),
        DEMO.read_text().strip("\n") + "\n",
        SHOP.read_text(),
    ]


def test_every_module_is_in_the_reference() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "kser").rglob("*.py")}
    own_words = {
        "kser.python_kafka.options",
        "kser.confluent.options",
        *(name for name in modules if name.endswith("__init__") or ".migrations." in name),
    }
    text = "\n".join(page.read_text() for page in PAGES)
    directives = re.findall(r"^ *\.\. (?:automodule|autoclass|py:module):: (\S+)$", text, re.MULTILINE)
    assert (
        modules - own_words - {".".join(name.split(".")[:depth]) for name in directives for depth in (2, 3, 4)} == set()
    )


@pytest.mark.parametrize("owner", [Task, Operation, OperationRegistry])
def test_every_public_member_is_on_the_sequencing_page(owner: type) -> None:
    text = (DOCS / "sequencing.rst").read_text()
    documented = set(
        re.findall(rf"^ *\.\. auto(?:method|attribute|property):: (?:{owner.__name__}\.)?(\w+)", text, re.M)
    )
    members = {name for name in vars(owner) if not name.startswith("_")}
    assert members - documented == set()


def test_errors_page_lists_every_error() -> None:
    text = (DOCS / "errors.rst").read_text()
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.KserError)
    ]
    for error in classes:
        assert re.search(rf"── {error.__name__} +{error.MSGID}  {error.CODE} ", text), error
        assert f".. autoexception:: {error.__name__}\n" in text, error
    assert len(re.findall("── .* ERR-503", text)) == len(classes)


def test_every_environment_variable_is_on_the_configuration_page() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "kser").rglob("*.py"))
    variables = {*re.findall(r'"(KSER_[A-Z]+(?:_[A-Z]+)*)"', sources), *re.findall(r'environ\["([A-Z_]+)"\]', sources)}
    page = (DOCS / "configuration.rst").read_text()
    internal = {"KSER_TASK_COUNT", "KSER_TASKS_STATUS"}
    assert {name for name in variables - internal if f"``{name}``" not in page} == set()


def test_every_consumer_option_is_on_the_configuration_page() -> None:
    page = (DOCS / "configuration.rst").read_text()
    for field in fields(ConsumerOptions):
        name = f"KSER_{field.name.upper()}"
        row = re.search(rf"^   \* - ``{name}``\n(?:     - .+\n(?:       .+\n)*)+", page, re.MULTILINE)
        assert row, name
        default = {None: "none", False: "``false``"}.get(field.default, field.default)
        assert row[0].splitlines()[-1].strip("- `") == str(default).strip("`"), name


def rows(page: str) -> list[str]:
    return re.findall(rf"^   \* - ({IDENTIFIER.pattern})$", page, re.MULTILINE)


def test_every_decision_has_one_row_and_one_changelog_line() -> None:
    page, kept = (DOCS / "differences.rst").read_text().split("Kept on purpose")
    identifiers = rows(page) + rows(kept)
    assert len(identifiers) == len(set(identifiers))
    assert set(IDENTIFIER.findall((ROOT / "CHANGELOG.rst").read_text())) == set(rows(page))


def test_every_accepted_difference_is_documented() -> None:
    headings = re.findall(r"^\[([^\]]+)\] ", DIFFERENTIAL.read_text(), re.MULTILINE)
    used = {identifier for heading in headings for identifier in heading.split()}
    assert len(used) > 30
    assert used - set(rows((DOCS / "differences.rst").read_text())) == set()


# -- the wire format ---

SCHEMA = json.loads((DOCS / "message.schema.json").read_text())
JSON_TYPES = {"string": str, "integer": int, "object": dict, "null": type(None)}
KEYWORDS = {"$schema", "title", "description", "type", "required", "properties"}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a JSON schema that has no other keywords than ours accepts ``value``."""
    assert set(schema) <= KEYWORDS
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not isinstance(value, tuple(JSON_TYPES[name] for name in types)):
        return False
    if not isinstance(value, dict):
        return True
    known = schema.get("properties", {})
    return set(schema.get("required", ())) <= set(value) and all(
        accepts(known[key], value[key]) for key in known if key in value
    )


@pytest.mark.parametrize(
    ("schema", "declaration"), [(SCHEMA, schemas.MESSAGE), (SCHEMA["properties"]["result"], schemas.RESULT)]
)
def test_json_schema_declares_the_same_fields_as_the_code(schema: dict[str, Any], declaration: Any) -> None:
    kinds = {str: "string", int: "integer", dict: "object", Result: "object"}
    expected = {
        field.name: [kinds[field.kind], "null"] if field.nullable else kinds[field.kind] for field in declaration
    }
    assert {name: part["type"] for name, part in schema["properties"].items()} == expected
    assert list(schema["properties"]) == [field.name for field in declaration]
    assert schema.get("required", []) == [field.name for field in declaration if field.required]


BASE = {"uuid": "1", "entrypoint": "e"}


@pytest.mark.parametrize(
    "data",
    [
        BASE,
        {**BASE, "unknown": 1},
        {**BASE, "params": {"a": [1]}, "metadata": {}, "result": None},
        {**BASE, "result": {"uuid": None, "retcode": None, "stdout": None, "stderr": None, "retval": None}},
        {**BASE, "result": {"retcode": 500, "stderr": "x", "retval": {"error": {}}, "unknown": 1}},
        {"uuid": "1"},
        {"entrypoint": "e"},
        {**BASE, "uuid": None},
        {**BASE, "uuid": 1},
        {**BASE, "params": None},
        {**BASE, "params": []},
        {**BASE, "metadata": None},
        {**BASE, "result": []},
        {**BASE, "result": {"retcode": True}},
        {**BASE, "result": {"retcode": "x"}},
        {**BASE, "result": {"stdout": 1}},
        {**BASE, "result": {"retval": []}},
        [],
    ],
)
def test_json_schema_and_code_accept_the_same_messages(data: Any) -> None:
    try:
        written = json.loads(Message.loads(json.dumps(data)).dumps())
    except Exception:
        assert not accepts(SCHEMA, data)
    else:
        assert accepts(SCHEMA, data)
        assert accepts(SCHEMA, written)


# -- log lines ---


class LogRow(NamedTuple):
    """A row of the table of log lines."""

    logger: str
    level: str
    text: str
    extra: frozenset[str]

    def is_of(self, logger: str, level: str) -> bool:
        pattern = re.escape(self.logger).replace("<transport>", r"kser\.(python_kafka|confluent|dummy)")
        return self.level in (level, "any") and re.fullmatch(pattern, logger) is not None

    def matches(self, record: logging.LogRecord) -> bool:
        pattern = re.sub(r"<[^<>]+>", ".*", re.escape(self.text))
        keys = {key for key in ("kmsg", "kresult", "error", "kafka_raw_data") if hasattr(record, key)}
        always = {key for key in self.extra if not key.startswith("[")}
        return (
            self.is_of(record.name, record.levelname)
            and re.fullmatch(pattern, record.getMessage(), re.DOTALL) is not None
            and always <= keys <= {key.strip("[]") for key in self.extra}
        )


with (DOCS / "logs.csv").open(newline="") as _table:
    LOG_ROWS = [
        LogRow(
            row["Logger"].strip("`"),
            row["Level"],
            row["Text"].strip("`"),
            frozenset(row["Extra"].replace("`", "").split()),
        )
        for row in csv.DictReader(_table)
    ]


def logging_calls() -> Iterator[tuple[str, str, list[str]]]:
    """Module, level and the fixed parts of the text, for each call of a logger in kser."""
    for path in sorted((ROOT / "kser").rglob("*.py")):
        module = ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")
        # What all consumers share logs in the name of the transport.
        lent = module.startswith("kser.consumer.") and module not in (
            "kser.consumer.work_queue",
            "kser.consumer.services",
        )
        module = "kser.dummy.consumer" if lent else module
        if module == "kser.log_lines":
            # Writes with the loggers of those who call it: the live records show its lines.
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            level = {"exception": "ERROR"}.get(node.func.attr, node.func.attr.upper())
            if level not in ("DEBUG", "INFO", "WARNING", "ERROR") or not node.args:
                continue
            constants = (part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))
            pieces = (piece for text in constants if isinstance(text, str) for piece in re.split("%[rs]", text))
            # The table may shorten the end of a piece.
            yield module, level, [piece[:20] for piece in pieces if len(piece) > 3]


def test_every_logging_call_has_a_row_in_the_table() -> None:
    calls = [call for call in logging_calls() if call[2]]
    assert len(calls) > 20
    for module, level, pieces in calls:
        texts = [row.text for row in LOG_ROWS if row.is_of(module, level)]
        assert any(all(piece in text for piece in pieces) for text in texts), (module, level, pieces)


def texts_of_the_package() -> set[str]:
    """All strings in kser, as they are written there."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kser").rglob("*.py")]
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def is_in_the_package(row: LogRow, texts: set[str]) -> bool:
    """Whether the fixed parts of a row are: its line may be put together elsewhere than where it is logged."""
    pieces = [piece.strip("'[]():;,. ") for piece in re.split(r"<[^<>]+>", row.text)]
    return all(any(piece in text for text in texts) for piece in pieces if len(piece) > 3)


def test_log_lines_match_the_table(caplog: pytest.LogCaptureFixture, lock_path: Path) -> None:
    caplog.set_level(logging.DEBUG, "kser")
    talk()
    seen = [record for record in caplog.records if record.name.startswith("kser")]
    unknown = [
        (record.name, record.levelname, record.getMessage())
        for record in seen
        if not any(row.matches(record) for row in LOG_ROWS)
    ]
    assert unknown == []
    texts = texts_of_the_package()
    never = [
        row for row in LOG_ROWS if not any(row.matches(record) for record in seen) and not is_in_the_package(row, texts)
    ]
    assert never == []


def talk() -> None:
    """Have kser log much of what it can."""
    oregistry = OperationRegistry()

    class Fine(Task):
        def run(self) -> None:
            self.log("text %d", logging.INFO, 1, extra={"kmsg": {}})

    class Broken(Task):
        def run(self) -> None:
            raise ValueError("broken")

        def onerror(self, result: Result) -> Any:
            raise ValueError("broken again")

    class Both(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Fine(), Broken()]

    class OneGood(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Fine()]

    class Loud(Controller):
        @classmethod
        def onsuccess(cls, kmsg: Message, result: Any) -> Any:
            raise ValueError("hook")

    for owner in (Fine, Broken, Both, OneGood):
        oregistry.subscribe(owner)
        Controller.run(Message("1", owner.path).dumps())
    oregistry.subscribe(type("Fine", (Task,), {}))
    Loud.run(Message("1", Fine.path).dumps())
    kser.Entrypoint().log("text")
    Controller.run("no message")
    Controller.run(Message("1", "unknown").dumps())
    consumer = Consumer(topics=["t"])
    consumer.stop()
    with pytest.raises(SystemExit):
        consumer.run()


def write_outputs() -> None:
    """Write what the documentation shows again."""
    runs: list[Callable[[Path], dict[Path, str]]] = [
        *(
            lambda locks, script=script: {script.with_suffix(".txt"): output_of(script, locks=locks)}
            for script in SCRIPTS
        ),
        play_quickstart,
        lambda locks: {DEMO: play_dice(locks)},
        lambda locks: {SHOP: play_shop(locks)},
    ]
    for run in runs:
        with tempfile.TemporaryDirectory() as locks:
            for path, text in run(Path(locks)).items():
                # Only what has changed, so that a new uuid is no difference.
                if not path.exists() or without_figures(lasting(path.read_text())) != without_figures(lasting(text)):
                    path.write_text(text)


if __name__ == "__main__":
    write_outputs()
