"""The published package in a virtual environment of its own, which is built once and kept in ``.cache``."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "oracle"

PUBLISHED = "kser==0.8.27"

# What both packages stand on is the same on both sides: only kser itself may make a difference.
SHARED = ("marshmallow", "cdumay-error", "cdumay-result", "kafka-python")

_STAMP = "complete"
_PATIENCE_SECONDS = 300


class OracleMissing(Exception):
    """The published package cannot be installed here."""


def oracle_python() -> Path:
    """The interpreter of the published package; its environment is built when it is not there yet.

    :raises OracleMissing: it cannot be built, for want of a network as a rule.
    """
    requirements = [PUBLISHED, *(f"{name}=={version(name)}" for name in SHARED)]
    wanted = "\n".join((sys.version, sys.base_prefix, *requirements))
    home = CACHE / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        # Several test runs may share a checkout: one builds, the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / _STAMP).exists():
            shutil.rmtree(home, ignore_errors=True)
            _build(home, requirements)
            (home / _STAMP).write_text(wanted)
    return home / "bin" / "python"


def _build(home: Path, requirements: list[str]) -> None:
    """Make the environment. What pip says goes to a file: it names indexes that are nobody's business."""
    log = CACHE / "pip.log"
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    for command in ([sys.executable, "-m", "venv", str(home)], [*pip, "--log", str(log), *requirements]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            raise OracleMissing(
                f"{PUBLISHED} could not be installed ({type(error).__name__}); {log.relative_to(ROOT)} says why"
            ) from None
