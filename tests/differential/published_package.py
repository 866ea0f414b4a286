"""A virtual environment with the published package, which is built once and kept in ``.cache``."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "published_package"

PUBLISHED = "kser==0.8.27"

#: The dependencies that have the same version with both packages, so that only kser can cause a difference.
SHARED_DEPENDENCIES = ("marshmallow", "cdumay-error", "cdumay-result", "kafka-python")

_COMPLETE_MARKER = "complete"
_TIMEOUT_SECONDS = 300


class PublishedPackageMissing(Exception):
    """The published package cannot be installed here."""


def published_python() -> Path:
    """Return the interpreter of the published package, and build its environment at the first call.

    :raises PublishedPackageMissing: the environment cannot be built, usually because there is no network.
    """
    requirements = [PUBLISHED, *(f"{name}=={version(name)}" for name in SHARED_DEPENDENCIES)]
    description = "\n".join((sys.version, sys.base_prefix, *requirements))
    home = CACHE / hashlib.sha256(description.encode()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        # Test runs may share a checkout, so one of them builds while the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / _COMPLETE_MARKER).exists():
            shutil.rmtree(home, ignore_errors=True)
            _build(home, requirements)
            (home / _COMPLETE_MARKER).write_text(description)
    return home / "bin" / "python"


def _build(home: Path, requirements: list[str]) -> None:
    """Build the environment. The output of pip goes to a file, because it names the package indexes of the machine."""
    log = CACHE / "pip.log"
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    for command in ([sys.executable, "-m", "venv", str(home)], [*pip, "--log", str(log), *requirements]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            raise PublishedPackageMissing(
                f"{PUBLISHED} could not be installed ({type(error).__name__}); {log.relative_to(ROOT)} says why"
            ) from None
