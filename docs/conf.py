"""Settings of the documentation: ``sphinx-build -E -W -n -b html docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kser

project = "kser"
author = "the kser developers"
copyright = "2026, the kser developers"  # noqa: A001  the name that Sphinx wants
version = release = kser.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = True
# What is documented elsewhere; inventories of other projects would need the network at each build.
nitpick_ignore_regex = [
    (r"py:.*", r"(cdumay_error|cdumay_result|kafka|confluent_kafka|blinker|marshmallow|flask)\..*"),
    (r"py:.*", r"(collections|contextlib|datetime|json|logging|types|typing)\..*"),
]
nitpick_ignore = [
    # A type variable.
    ("py:class", "kser.sequencing.registry.EntrypointClass"),
    # In docstrings, which do not see what their module imports; and how autodoc shows a default that is a class.
    ("py:class", "Task"),
    ("py:class", "Result"),
    ("py:class", "ContextVar"),
    ("py:attr", "REGISTRY"),
    ("py:class", "kser.consumer.options.ConsumerKwargs"),
    # Internal classes that signatures name.
    ("py:exc", "AttemptAbandoned"),
    ("py:exc", "kser.attempt.AttemptAbandoned"),
    ("py:class", "kser.confluent.delivery_reports.Waiter"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"kser {version}"


def _leave_out_missing_tables(app: Any, page: str, source: list[str]) -> None:
    """A table of figures is shown once there are figures."""

    def shown(match: re.Match[str]) -> str:
        return match[0] if (Path(app.srcdir) / match[1]).exists() else ""

    source[0] = re.sub(r"^\.\. csv-table::.*\n   :file: (\S+)\n(?:   .*\n)*", shown, source[0], flags=re.MULTILINE)


def setup(app: Any) -> None:
    app.connect("source-read", _leave_out_missing_tables)
