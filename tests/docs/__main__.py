"""Write the outputs of the example programs into the documentation: ``python -m tests.docs``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.docs.harness import (
    DICE_OUTPUT,
    SCRIPTS,
    SHOP_OUTPUT,
    normalized,
    output_of,
    output_of_dice_game,
    output_of_shop,
    outputs_of_quickstart,
    without_figures,
)


def programs() -> Iterator[Callable[[Path], dict[Path, str]]]:
    """Yield functions that run programs and return their outputs by file."""
    for script in SCRIPTS:
        yield lambda lock_path, script=script: {script.with_suffix(".txt"): output_of(script, lock_path=lock_path)}
    yield outputs_of_quickstart
    yield lambda lock_path: {DICE_OUTPUT: output_of_dice_game(lock_path)}
    yield lambda lock_path: {SHOP_OUTPUT: output_of_shop(lock_path)}


def comparable(text: str) -> str:
    """Return a text without the parts that differ from run to run."""
    return without_figures(normalized(text))


def main() -> None:
    for program in programs():
        with tempfile.TemporaryDirectory() as lock_path:
            for path, text in program(Path(lock_path)).items():
                # Keep an unchanged output, so that a new uuid is no difference.
                if not path.exists() or comparable(path.read_text()) != comparable(text):
                    path.write_text(text)


if __name__ == "__main__":
    main()
