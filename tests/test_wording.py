"""Texts name things: the number of phrases that hide a name may only fall.

``python -m tests.test_wording [DIR]`` prints the number of each kind and every hit, of this checkout or of another one.

At the commit fe26848 it was 806: first words of docstrings 144 (What 92, Whether 46, Those 2, Somebody 2, Nobody 1,
Whoever 1) and of comments 104 (What 74, Whether 13, Whoever 7, Nobody 4, Somebody 3, Those 2, That 1); anywhere 351
(nobody, somebody, whoever 134; go on 100; is to be 61; in vain, anew, once more 25; that one 13; give back 11; take up
7); names of tests 207 (what 143, one 28, it 18, who 13, those 3, that 2).
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

#: The number of hits that are allowed. It may only fall.
LIMIT = 0

DOCUMENTS = (
    *("docs/*.rst", "docs/logs.csv", "README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst"),
    "benchmarks/README.md",
)

#: Texts that kser 0.8.27 published, to the letter.
PUBLISHED: tuple[str, ...] = ()


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
    """A banned phrase, and its place."""

    path: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.text}"


def comments(source: str) -> Iterator[Text]:
    """The comments of a module: lines in a row that have only a comment are one block."""
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        alone = token.line.lstrip().startswith("#")
        if block and not (alone and line == first + len(block)):
            yield Text("comment", first, "\n".join(block))
            block = []
        if not block:
            first = line
        block.append(token.string.lstrip("#:").strip())
    if block:
        yield Text("comment", first, "\n".join(block))


def strings(source: str) -> Iterator[Text]:
    """The docstrings of a module, and its other strings with a space in them: texts of the log and of errors."""
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    docstrings = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield Text("docstring" if id(node) in docstrings else "string", node.lineno, node.value)


def banned(path: str, text: Text) -> Iterator[Hit]:
    """The hits in a text."""
    prose = text.text
    for literal in PUBLISHED:
        prose = prose.replace(literal, " " * len(literal))
    if text.kind in ("docstring", "comment") and (found := FIRST_WORD.match(prose)):
        yield Hit(path, text.line, f"{text.kind} begins with {found[1].capitalize()}", prose.strip().splitlines()[0])
    for kind, pattern in ANYWHERE.items():
        for found in pattern.finditer(prose):
            before, after = prose[: found.start()], prose[found.end() :]
            around = before.rpartition("\n")[2] + " ".join(found[0].split()) + after.partition("\n")[0]
            yield Hit(path, text.line + before.count("\n"), kind, around.strip())


def hits(root: Path) -> list[Hit]:
    """All hits below a folder."""
    found: list[Hit] = []
    for path in sorted(root.glob("kser/**/*.py")):
        source = path.read_text(encoding="utf-8")
        for text in (*comments(source), *strings(source)):
            found += banned(str(path.relative_to(root)), text)
    for path in sorted(path for pattern in DOCUMENTS for path in root.glob(pattern)):
        found += banned(str(path.relative_to(root)), Text("document", 1, path.read_text(encoding="utf-8")))
    for path in sorted(root.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (name := TEST_NAME.match(node.name)):
                found.append(Hit(str(path.relative_to(root)), node.lineno, f"test_{name[1]}_…", node.name))
    return sorted(found)


def test_number_of_banned_phrases_only_falls() -> None:
    found = hits(ROOT)
    assert len(found) <= LIMIT, f"{len(found)} phrases, {LIMIT} allowed:\n" + "\n".join(map(str, found))
    assert len(found) == LIMIT, f"lower LIMIT to {len(found)}"


if __name__ == "__main__":
    everything = hits(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    print(*everything, "", sep="\n")
    for counted_kind, count in sorted(Counter(hit.kind for hit in everything).items()):
        print(f"{count:6} {counted_kind}")
    print(f"{len(everything):6} altogether")
