"""Tables as text and as JSON: a head that says what was measured where, the rows, and which goals they meet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    text: str
    met: bool | None  # None: not measured
    figures: str

    def line(self) -> str:
        word = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"{word:>12}  {self.text}: {self.figures}"


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    text_columns: int = 1  # the others are figures

    def lines(self) -> list[str]:
        widths = [max(len(row[i]) for row in [self.columns, *self.rows]) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < self.text_columns else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in [self.columns, *self.rows]
        ]
        return ["", self.title, "", lines[0], "-" * len(lines[0]), *[line.rstrip() for line in lines[1:]]]


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
            lines += ["", "Goals", "", *[goal.line() for goal in self.goals]]
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
        return Goal(text, None, "no figures")
    missed = {name: v for name, v in known.items() if (v < reaches if at_least else v > reaches)}
    worst = (min if at_least else max)(known, key=lambda name: known[name])
    figures = f"{len(known) - len(missed)} of {len(known)}; worst {known[worst]:.{digits}f} ({worst})"
    return Goal(text, not missed, figures)
