"""Who takes part in a case: its tensors, everyone's calls, first calls made and results checked."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from .cuda_cases import CudaCase, Tensors, weight_of
from .cuda_check import TOLERANCE, Expected, expected
from .cuda_graphs import Chain, Gpu, Timed, copy_calls, count_of_calls
from .cuda_peers import CudaPeer
from .report import reason_of

COPY = "device copy"
SLOW_S = 0.05  # a peer that takes as long to begin a case, on average, is left out once time is short
LAST = 1.3  # times the budget, when nothing more is begun


class Budget:
    """Seconds for a benchmark. Past them, slow beginners are left out; much later, everyone."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.started = seconds, clock, clock()
        self.beginnings: dict[str, list[float]] = {}

    def elapsed(self) -> float:
        return self.clock() - self.started

    def over(self) -> bool:
        return self.elapsed() > LAST * self.seconds

    def refuses(self, name: str) -> str | None:
        taken = self.beginnings.get(name, [])
        if self.elapsed() > self.seconds and taken and sum(taken) / len(taken) > SLOW_S:
            return f"left out after {self.seconds:.0f} s: it takes {sum(taken) / len(taken):.2f} s to begin a case"
        return None

    def began(self, name: str, seconds: float) -> None:
        self.beginnings.setdefault(name, []).append(seconds)


@dataclass
class Entry:
    name: str
    calls: Sequence[Callable[[], Any]]
    mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    error: float = 0.0
    first_s: float = 0.0
    ours: bool = False
    fills_out: bool = False  # of the tensors that it is given

    def chain(self, count: int, between: Callable[[], Any] | None = None) -> Chain:
        return Chain(self.name, self.calls, count, self.mode, between)


@dataclass
class Entries:
    case: CudaCase
    sets: list[Tensors]
    count: int
    truth: Expected
    entries: list[Entry] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def wrong(self, entry: Entry) -> bool:
        return not entry.error <= TOLERANCE[self.case.dtype]


def enter(case: CudaCase, peers: Sequence[CudaPeer], gpu: Gpu, budget: Budget) -> Entries:
    weight = weight_of(case, gpu.device)
    sets = [Tensors(case, weight, gpu.device) for _ in range(case.sets(gpu.l2_bytes()))]
    truth = expected(case, sets[0])
    found = Entries(case, sets, count_of_calls(case.moved_bytes, len(sets)), truth)
    found.entries.append(Entry(COPY, [copy_calls(t.source, t.target) for t in sets]))
    enter_peers(found, peers, gpu, budget)
    return found


def enter_peers(
    found: Entries,
    peers: Sequence[CudaPeer],
    gpu: Gpu,
    budget: Budget,
    look: Callable[[CudaPeer], None] = lambda peer: None,
) -> None:
    """Into `found`, each as an entry or absent; `look` at what a peer that takes the case has just written."""
    case, sets, truth = found.case, found.sets, found.truth
    for peer in peers:
        reason = peer.refuses(case) or budget.refuses(peer.name)
        if reason:
            found.absent[peer.name] = reason
            continue
        truth.restore(sets[0])
        gpu.synchronize()
        started = time.perf_counter()
        try:
            entry = _begin(peer, case, sets, gpu, truth)
            if entry:
                look(peer)
        except Exception as error:  # whatever a foreign kernel raises; one that breaks the device breaks the next call
            found.absent[peer.name] = reason_of(error)
            gpu.synchronize()
            continue
        budget.began(peer.name, time.perf_counter() - started)
        if entry:
            found.entries.append(entry)
        else:
            found.absent[peer.name] = "does not take it"
    truth.restore(sets[0])


def _begin(peer: CudaPeer, case: CudaCase, sets: list[Tensors], gpu: Gpu, truth: Expected) -> Entry | None:
    calls = [peer.prepare(case, tensors) for tensors in sets]
    if any(call is None for call in calls):
        return None
    ready = [call for call in calls if call]
    with peer.mode():
        started = time.perf_counter()
        result = ready[0]()
        gpu.synchronize()
        first_s = time.perf_counter() - started
        error = truth.error(result)
        fills_out = result is sets[0].out
        del result
        for call in ready[1:]:
            call()
    return Entry(peer.name, ready, peer.mode, error, first_s, peer.ours, fills_out)


def race(found: Entries, chains: Sequence[tuple[Entry, Chain]], gpu: Gpu, rounds: int) -> dict[str, Timed]:
    """Captures and times; whoever can't be captured is taken out, with the reason."""
    captured = []
    for entry, chain in chains:
        try:
            graph = gpu.capture(chain)
        except Exception as error:
            found.absent[entry.name] = f"not captured: {reason_of(error)}"
            if entry in found.entries:
                found.entries.remove(entry)
            gpu.synchronize()
            continue
        captured.append((chain, graph))
        if entry.fills_out and found.truth.total is None:
            # Once more in a chain, where launches overlap; an operation in place has no known input by then.
            found.truth.restore(found.sets[0])
            gpu.replay(graph)
            gpu.synchronize()
            entry.error = max(entry.error, found.truth.error(found.sets[0].out))
    return gpu.race(captured, rounds)


def share(base: Timed, other: Timed) -> float:
    """The median of the ratios of times within a turn."""
    return median([a / b for a, b in zip(base.times, other.times)])


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
