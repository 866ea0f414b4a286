"""Settings of the documentation, which ``sphinx-build -E -W -n -b html docs docs/_build/html`` builds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kser

project = "kser"
author = "the kser developers"
copyright = "2026, the kser developers"  # noqa: A001  Sphinx requires this name
version = release = kser.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = True
# Names of other projects. To link these names, each build would need the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(cdumay_error|cdumay_result|kafka|confluent_kafka|blinker|marshmallow|flask)\..*"),
    (r"py:.*", r"(collections|contextlib|datetime|json|logging|threading|types|typing)\..*"),
]
nitpick_ignore = [
    # A type variable.
    ("py:class", "kser.sequencing.registry.EntrypointClass"),
    # Names in docstrings, which autodoc cannot resolve, and defaults that are classes.
    ("py:class", "Task"),
    ("py:class", "Result"),
    ("py:class", "ContextVar"),
    ("py:attr", "REGISTRY"),
    ("py:class", "kser.consumer.options.ConsumerKwargs"),
    # Internal classes in signatures.
    ("py:exc", "AttemptAbandoned"),
    ("py:exc", "kser.attempt.AttemptAbandoned"),
    ("py:class", "kser.confluent.delivery_reports.Waiter"),
    ("py:class", "kser.connection.Connection"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"kser {version}"


def _leave_out_missing_tables(app: Any, page: str, source: list[str]) -> None:
    """Remove a table from a page if the file of the table does not exist."""

    def shown(match: re.Match[str]) -> str:
        return match[0] if (Path(app.srcdir) / match[1]).exists() else ""

    source[0] = re.sub(r"^\.\. csv-table::.*\n   :file: (\S+)\n(?:   .*\n)*", shown, source[0], flags=re.MULTILINE)


def setup(app: Any) -> None:
    app.connect("source-read", _leave_out_missing_tables)
