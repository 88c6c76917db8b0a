"""How far a run is, on stderr. Drawn between measurements alone: no thread, no timer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from shutil import get_terminal_size

Progress = Callable[[int, int, str], None]
EVERY_S = 10.0  # a line in a file
last_line = 0.0


def show(done: int, total: int, text: str) -> None:
    """On a terminal a line that the next one replaces, none when all is done; elsewhere a line from time to time."""
    global last_line
    if not sys.stderr.isatty():
        if done < total and time.monotonic() - last_line >= EVERY_S:
            last_line = time.monotonic()
            print(f"{done}/{total} {text}", file=sys.stderr, flush=True)
        return
    width = max(20, get_terminal_size().columns - 1)
    filled = 24 * done // max(1, total)
    line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {text}"
    if done < total:
        sys.stderr.write(f"\r{line[:width]:<{width}}")
    else:
        sys.stderr.write(f"\r{'':<{width}}\r")
    sys.stderr.flush()
