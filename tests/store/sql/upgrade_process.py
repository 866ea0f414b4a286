"""Process that upgrades the tables, and that kills itself before the statement that starts with a certain text."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sqlalchemy import Engine, event

from kser.store.__main__ import main

if __name__ == "__main__":
    uri, text = sys.argv[1:]

    @event.listens_for(Engine, "before_cursor_execute")
    def kill(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        """Kill this process."""
        if statement.startswith(text):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.exit(main(["upgrade", "--uri", uri]))
