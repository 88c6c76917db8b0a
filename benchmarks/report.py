"""Tables as text and as JSON: a head that says what was measured where, the rows, and which goals they meet."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 4  # of the values that miss a goal, the worst
HEAD_WIDTH = 12  # of a column of figures, where its title can be broken


def reason_of(error: BaseException) -> str:
    """In one line, why something was not measured."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


@dataclass(frozen=True)
class Goal:
    text: str
    met: bool | None  # None: not measured
    figures: list[str]

    def lines(self) -> list[str]:
        word = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return [f"{word:<12}  {self.text}", *[f"{'':14}{figures}" for figures in self.figures]]


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    text_columns: int = 1  # the others are figures

    def lines(self) -> list[str]:
        titles = [textwrap.wrap(c, HEAD_WIDTH, break_long_words=False) or [""] for c in self.columns]
        height = max(map(len, titles))
        padded = [[""] * (height - len(words)) + words for words in titles]
        head = [[words[line] for words in padded] for line in range(height)]
        widths = [max(len(row[i]) for row in [*head, *self.rows]) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < self.text_columns else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in [*head, *self.rows]
        ]
        lines.insert(height, "-" * len(lines[0]))
        return ["", self.title, "", *map(str.rstrip, lines)]


@dataclass
class Report:
    """One benchmark's results. `records` is what JSON holds; `tables` is the same for a reader."""

    name: str
    head: dict[str, str]
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        width = max(map(len, self.head))
        lines = [self.name, "=" * len(self.name), *[f"{key:<{width}}  {value}" for key, value in self.head.items()]]
        lines += ["", *self.notes] if self.notes else []
        for table in self.tables:
            lines += table.lines()
        if self.goals:
            lines += ["", "Goals", "", *[line for goal in self.goals for line in goal.lines()]]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, as_json: bool) -> list[Path]:
        written = [folder / f"{self.name}.txt"]
        written[0].write_text(self.text())
        if as_json:
            written.append(folder / f"{self.name}.json")
            content = {"head": self.head, "goals": [asdict(goal) for goal in self.goals], "results": self.records}
            written[1].write_text(json.dumps(_finite(content), indent=1) + "\n")
        return written


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(value: float, digits: int) -> str:
    """`digits` behind the point; - for what was not measured."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def size(number: int) -> str:
    """Bytes in the largest unit that keeps them whole, or nearly."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            value = number / (1 << power)
            return f"{value:.0f} {unit}" if abs(value - round(value)) < 0.05 else f"{value:.1f} {unit}"
    return f"{number} B"


def judge(text: str, values: dict[str, float], reaches: float, at_least: bool = True, digits: int = 2) -> Goal:
    """A goal that each of the named values must reach."""
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    if not known:
        return Goal(text, None, [])
    by_distance = sorted(known, key=lambda name: known[name], reverse=not at_least)
    missed = [name for name in by_distance if (known[name] < reaches if at_least else known[name] > reaches)]
    figures = [f"{len(known) - len(missed)} of {len(known)} reach it; {'missed by' if missed else 'nearest'}"]
    figures += [f"{known[name]:.{digits}f}  {name}" for name in (missed or by_distance)[:SHOWN]]
    if len(missed) > SHOWN:
        figures.append(f"and {len(missed) - SHOWN} more")
    return Goal(text, not missed, figures)
