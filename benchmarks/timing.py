"""Contestants, timed in turns: a disturbance of the machine meets all of them, and ratios are taken within a turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .native import native


@dataclass(frozen=True)
class Call:
    """function(*arguments), the last of which are given by the names in `keywords`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[str, ...] | None = None

    def __call__(self) -> Any:
        named = len(self.keywords or ())
        positional = self.arguments[: len(self.arguments) - named]
        return self.function(*positional, **dict(zip(self.keywords or (), self.arguments[len(positional) :])))

    def nanoseconds(self, calls: int) -> float:
        """How long so many calls take, one after the other, in a C loop."""
        elapsed: int = native().repeat(self.function, self.arguments, self.keywords, calls)
        return float(elapsed)


@dataclass
class Contestant:
    """`sample(n)` makes n calls and gives the nanoseconds. `times` are per call; NaN for a turn that it sat out."""

    name: str
    sample: Callable[[int], float]
    calls: int = 1
    times: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min((t for t in self.times if not math.isnan(t)), default=math.nan)

    @property
    def median(self) -> float:
        return _median(self.times)


def race(
    contestants: Sequence[Contestant],
    rounds: int,
    sample_ns: float,
    slow_ns: float = 1e8,
    slow_rounds: int = 3,
    pause_s: float = 0.0,
) -> None:
    """Fills `times`. A sample takes `sample_ns` or one call; whoever takes `slow_ns` a call joins `slow_rounds` turns.

    Each sample follows an untimed call, so that it finds its own data in the caches as far as they hold it, and
    `pause_s` of sleep, in which idle threads of another library's pool stop spinning.
    """
    slow = set()
    for contestant in contestants:
        first = contestant.sample(1)
        estimate = contestant.sample(1)
        if estimate < sample_ns:
            trial = max(1, int(sample_ns / 10 / max(estimate, 1.0)))
            estimate = contestant.sample(trial) / trial
        contestant.calls = max(1, round(sample_ns / max(estimate, 1.0)))
        if min(first, estimate) > slow_ns:
            slow.add(contestant.name)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            start = turn % len(contestants)
            for contestant in [*contestants[start:], *contestants[:start]]:
                if contestant.name in slow and turn >= slow_rounds:
                    contestant.times.append(math.nan)
                    continue
                if contestant.name not in slow:
                    if pause_s:
                        time.sleep(pause_s)
                    contestant.sample(1)
                contestant.times.append(contestant.sample(contestant.calls) / contestant.calls)
    finally:
        if collecting:
            gc.enable()


def ratio(numerator: Contestant, denominator: Contestant) -> float:
    """The median of the ratios of times within a turn."""
    return _median([a / b for a, b in zip(numerator.times, denominator.times)])


def _median(values: Sequence[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return statistics.median(present) if present else math.nan
