"""Tests of the example programs: they print the documented output, and the documented tests pass."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.docs.harness import (
    DICE_OUTPUT,
    QUICKSTART,
    SCRIPTS,
    SHOP_OUTPUT,
    TESTING,
    normalized,
    output_of,
    output_of_dice_game,
    output_of_shop,
    outputs_of_quickstart,
    without_figures,
)
from tests.support import ROOT


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_program_prints_the_documented_output(script: Path, tmp_path: Path) -> None:
    assert normalized(output_of(script, lock_path=tmp_path)) == normalized(script.with_suffix(".txt").read_text())


def test_quickstart_prints_the_documented_output(tmp_path: Path) -> None:
    for path, output in outputs_of_quickstart(tmp_path).items():
        assert normalized(output) == normalized(path.read_text()), path.name


def test_dice_game_prints_the_documented_output(tmp_path: Path) -> None:
    printed, documented = output_of_dice_game(tmp_path), DICE_OUTPUT.read_text()
    # Sort the lines, because the two messages may be in different partitions, and then have no order.
    assert sorted(normalized(printed).splitlines()) == sorted(normalized(documented).splitlines())


def test_shop_prints_the_documented_output(tmp_path: Path) -> None:
    assert without_figures(output_of_shop(tmp_path)) == without_figures(SHOP_OUTPUT.read_text())


def test_documented_tests_pass(tmp_path: Path) -> None:
    options = ("-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", TESTING)
    assert " passed" in output_of("-m", "pytest", *options, TESTING, lock_path=tmp_path)


def test_quickstart_installs_existing_extras() -> None:
    extras = re.search(r"\[(.+)\]", (QUICKSTART / "install.sh").read_text())[1].split(",")
    setup = (ROOT / "setup.py").read_text()
    assert [extra for extra in extras if f'"{extra}": ' not in setup] == []
