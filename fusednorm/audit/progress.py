"""How far the audit is, on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import TextIO

Progress = Callable[[int, int, str], None]


@contextmanager
def progress_bar(stream: TextIO | None = None) -> Iterator[Progress]:
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield lambda done, total, text: None
        return
    try:
        import rich  # noqa: F401
    except ImportError:
        with _one_line(stream) as bar:
            yield bar
    else:
        with _rich(stream) as bar:
            yield bar


@contextmanager
def _rich(stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with RichProgress(*columns, console=Console(file=stream), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total, text: shown.update(task, completed=done, total=total, description=text)


@contextmanager
def _one_line(stream: TextIO) -> Iterator[Progress]:
    def show(done: int, total: int, text: str) -> None:
        filled = 24 * done // max(1, total)
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {text}"
        width = max(20, get_terminal_size().columns - 1)
        stream.write("\r" + line[:width].ljust(width))
        stream.flush()

    try:
        yield show
    finally:
        stream.write("\r" + " " * max(20, get_terminal_size().columns - 1) + "\r")
        stream.flush()
