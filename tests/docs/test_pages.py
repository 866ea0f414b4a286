"""Tests of the pages: they show every example file, and document every module, member, error, setting and decision."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from kser import Operation, OperationRegistry, Task, errors
from kser.consumer.options import ConsumerOptions
from tests.docs.harness import DICE_OUTPUT, DOCS, EXAMPLES, PAGES, SHOP_OUTPUT
from tests.support import ROOT

DIFFERENTIAL = ROOT / "tests" / "differential" / "accepted_differences.txt"

#: The identifier of a decision or of an intended difference.
IDENTIFIER = re.compile(r"[A-DS]\d{1,2}[a-z]?")


def included_files(page: Path) -> Iterator[Path]:
    """Yield the files that a page includes."""
    for name in re.findall(r"^ *\.\. literalinclude:: (.+)$", page.read_text(), re.MULTILINE):
        yield (page.parent / name).resolve()


def test_every_example_file_is_included_in_a_page() -> None:
    included = {path for page in PAGES for path in included_files(page)}
    kinds = (".py", ".sh", ".txt", ".env", ".service", ".yaml", ".json")
    files = {path for path in EXAMPLES.rglob("*.*") if path.suffix in kinds and path.is_file()}
    assert files - included == set()


def test_pages_contain_no_inline_code() -> None:
    languages = {
        (page.name, language)
        for page in [*PAGES, ROOT / "CONTRIBUTING.rst"]
        for language in re.findall(r"^ *\.\. code-block:: *(\S*)$", page.read_text(), re.MULTILINE)
    }
    assert {pair for pair in languages if pair[1] != "text"} == {("CONTRIBUTING.rst", "sh")}


def code_blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a reStructuredText, without their indentation."""
    blocks = re.findall(rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") + "\n" for block in blocks]


def test_readme_contains_the_example_and_its_outputs() -> None:
    readme = (ROOT / "README.rst").read_text()
    assert code_blocks(readme, "python") == [(EXAMPLES / "readme.py").read_text()]
    assert code_blocks(readme, "text") == [
        (EXAMPLES / "readme.txt").read_text(),
        DICE_OUTPUT.read_text().strip("\n") + "\n",
        SHOP_OUTPUT.read_text(),
    ]


def test_every_module_is_in_the_reference() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "kser").rglob("*.py")}
    documented_in_prose = {
        "kser.python_kafka.options",
        "kser.confluent.options",
        *(name for name in modules if name.endswith("__init__") or ".migrations." in name),
    }
    text = "\n".join(page.read_text() for page in PAGES)
    directives = re.findall(r"^ *\.\. (?:automodule|autoclass|py:module):: (\S+)$", text, re.MULTILINE)
    documented = {".".join(name.split(".")[:depth]) for name in directives for depth in (2, 3, 4)}
    assert modules - documented_in_prose - documented == set()


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


def row_identifiers(page: str) -> list[str]:
    """Return the identifiers in the first column of the tables of a page."""
    return re.findall(rf"^   \* - ({IDENTIFIER.pattern})$", page, re.MULTILINE)


def test_every_decision_has_one_row_and_one_changelog_line() -> None:
    changed, unchanged = (DOCS / "differences.rst").read_text().split("Kept on purpose")
    identifiers = row_identifiers(changed) + row_identifiers(unchanged)
    assert len(identifiers) == len(set(identifiers))
    assert set(IDENTIFIER.findall((ROOT / "CHANGELOG.rst").read_text())) == set(row_identifiers(changed))


def test_every_accepted_difference_is_documented() -> None:
    headings = re.findall(r"^\[([^\]]+)\] ", DIFFERENTIAL.read_text(), re.MULTILINE)
    used = {identifier for heading in headings for identifier in heading.split()}
    assert len(used) > 30
    assert used - set(row_identifiers((DOCS / "differences.rst").read_text())) == set()
