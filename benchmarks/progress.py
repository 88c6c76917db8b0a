"""How far a run is, on stderr where that is a terminal. Drawn between measurements alone: no thread, no timer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from shutil import get_terminal_size

Progress = Callable[[int, int, str], None]


def show(done: int, total: int, text: str) -> None:
    """A line that the next one replaces; none when all is done."""
    if not sys.stderr.isatty():
        return
    width = max(20, get_terminal_size().columns - 1)
    filled = 24 * done // max(1, total)
    line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {text}"
    if done < total:
        sys.stderr.write(f"\r{line[:width]:<{width}}")
    else:
        sys.stderr.write(f"\r{'':<{width}}\r")
    sys.stderr.flush()
