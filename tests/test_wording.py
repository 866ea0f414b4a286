"""Test of the wording: no text contains a phrase that hides a name.

``python -m tests.test_wording [DIR]`` prints every hit and the number of each kind, for this or for another checkout.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

DOCUMENTS = (
    *("docs/*.rst", "docs/logs.csv", "README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst"),
    "benchmarks/README.md",
)


def _words(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b".replace(" ", r"\s+"), re.IGNORECASE)


FIRST_WORD = re.compile(r"[\s\"'(*]*(What|Whoever|That|Those|Nobody|Somebody|Whether)\b", re.IGNORECASE)
ANYWHERE = {
    "nobody, somebody, whoever": _words("nobody", "somebody", "whoever"),
    "in vain, anew, once more": _words("in vain", "anew", "once more"),
    "go on": _words("go on", "goes on", "going on", "went on", "gone on"),
    "take up": _words("takes? up", "took up", "taken up", "taking up"),
    "give back": _words("gives? back", "gave back", "given back", "giving back"),
    "is to be": _words("(?:is|are|was|were) to be"),
    "that one": _words("that one"),
}
TEST_NAME = re.compile(r"test_(what|who|one|it|that|those)_")


class Text(NamedTuple):
    """A docstring, a comment block, another string of a module, or a whole document."""

    kind: str
    line: int
    text: str


class Hit(NamedTuple):
    """A banned phrase with its path and line."""

    path: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.text}"


def comments(source: str) -> Iterator[Text]:
    """Yield the comments of a module; consecutive lines with only a comment are one block."""
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        is_whole_line = token.line.lstrip().startswith("#")
        if block and not (is_whole_line and line == first + len(block)):
            yield Text("comment", first, "\n".join(block))
            block = []
        if not block:
            first = line
        block.append(token.string.lstrip("#:").strip())
    if block:
        yield Text("comment", first, "\n".join(block))


def strings(source: str) -> Iterator[Text]:
    """Yield the docstrings of a module, and its other strings that contain a space: texts of the log and of errors."""
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    docstrings = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield Text("docstring" if id(node) in docstrings else "string", node.lineno, node.value)


def banned(path: str, text: Text) -> Iterator[Hit]:
    """Yield the hits in a text."""
    prose = text.text
    if text.kind in ("docstring", "comment") and (first_word := FIRST_WORD.match(prose)):
        yield Hit(
            path, text.line, f"{text.kind} begins with {first_word[1].capitalize()}", prose.strip().splitlines()[0]
        )
    for kind, pattern in ANYWHERE.items():
        for phrase in pattern.finditer(prose):
            before, after = prose[: phrase.start()], prose[phrase.end() :]
            context = before.rpartition("\n")[2] + " ".join(phrase[0].split()) + after.partition("\n")[0]
            yield Hit(path, text.line + before.count("\n"), kind, context.strip())


def hits(root: Path) -> list[Hit]:
    """Return all hits below a folder, sorted."""
    result: list[Hit] = []
    for path in sorted(root.glob("kser/**/*.py")):
        source = path.read_text(encoding="utf-8")
        for text in (*comments(source), *strings(source)):
            result += banned(str(path.relative_to(root)), text)
    for path in sorted(path for pattern in DOCUMENTS for path in root.glob(pattern)):
        result += banned(str(path.relative_to(root)), Text("document", 1, path.read_text(encoding="utf-8")))
    for path in sorted(root.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (name := TEST_NAME.match(node.name)):
                result.append(Hit(str(path.relative_to(root)), node.lineno, f"test_{name[1]}_…", node.name))
    return sorted(result)


def test_texts_contain_no_banned_phrase() -> None:
    assert "\n".join(map(str, hits(ROOT))) == ""


if __name__ == "__main__":
    all_hits = hits(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    print(*all_hits, "", sep="\n")
    for hit_kind, count in sorted(Counter(hit.kind for hit in all_hits).items()):
        print(f"{count:6} {hit_kind}")
    print(f"{len(all_hits):6} altogether")
