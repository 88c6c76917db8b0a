"""How near to a copy of the same bytes: norms from in-cache sizes to sizes beyond the last-level cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import machine
from .cases import DTYPES, OPERATIONS, Case, Operands, numpy_dtype
from .peers import BASE, MEMCPY, STREAMING, TORCH, Peer
from .progress import Progress
from .report import Report, Table, figure, judge, size
from .timing import Contestant, race, ratio

SIZES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)
QUICK_SIZES = (64 << 10, 64 << 20)
COLUMNS = (128, 4096, 7168)
QUICK_COLUMNS = (4096,)
METHOD = "contestants in turns within one process, medians over turns; ratios are taken within a turn"
WITH_OUT, ALLOCATING = f"{BASE}, tensors", f"{BASE}, new tensors"


@dataclass(frozen=True)
class Settings:
    quick: bool
    threads: tuple[int, ...]
    sizes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] = DTYPES


def cases(settings: Settings) -> list[Case]:
    found = []
    for threads in settings.threads:
        for operation in OPERATIONS.values():
            for x_bytes in settings.sizes or (QUICK_SIZES if settings.quick else SIZES):
                for dtype in settings.dtypes:
                    for columns in QUICK_COLUMNS if settings.quick else COLUMNS:
                        rows = max(1, x_bytes // (columns * numpy_dtype(dtype).itemsize))
                        found.append(Case(operation, dtype, columns, rows, threads))
    return found


def measure(case: Case, peers: list[Peer], settings: Settings) -> dict[str, Contestant]:
    operands = Operands(case)
    contestants = [peer.contestant(case, operands) for peer in peers]
    taking_part = [contestant for contestant in contestants if contestant]
    return race_all(taking_part, settings, slow_ns=5e7, slow_rounds=3)


def race_all(
    contestants: list[Contestant], settings: Settings, slow_ns: float, slow_rounds: int
) -> dict[str, Contestant]:
    rounds, sample_ns = (5, 1e6) if settings.quick else (15, 3e6)
    race(contestants, rounds, sample_ns, slow_ns=slow_ns, slow_rounds=slow_rounds, pause_s=0.001)
    return {contestant.name: contestant for contestant in contestants}


def record_all(
    report: Report, wanted: Sequence[Any], peers: list[Peer], do: Callable[[Any], dict[str, Any]], progress: Progress
) -> None:
    """Into `report`: what `do` makes of each case, with the number of threads that the case has."""
    last: int | None = None
    with _no_grad():
        for done, case in enumerate(wanted):
            progress(done, len(wanted), case.text())
            if case.threads != last:
                for peer in peers:
                    peer.set_threads(case.threads)
                last = case.threads
            report.records.append(do(case))
        progress(len(wanted), len(wanted), "")


def run(peers: list[Peer], settings: Settings, head: dict[str, str], progress: Progress) -> Report:
    import numpy as np

    head = {
        **head,
        "memory": f"{machine.keep_freed_memory()}; outputs and in-place operands are warm",
        "method": METHOD,
    }
    report = Report("bandwidth", head)
    with np.errstate(all="ignore"):
        record_all(report, cases(settings), peers, lambda case: record(case, measure(case, peers, settings)), progress)
    runtimes = machine.openmp_runtimes()
    report.head["openmp"] = f"{', '.join(runtimes) or 'none'} in the process"
    report.notes = [
        "memcpy in GB/s, read and written, counted together; every peer as a share of memcpy's speed in the same turn.",
        f"{MEMCPY}: the C library's, on as many threads. {STREAMING}: 16-byte loads, stores that bypass the caches.",
        f"{BASE}: ndarrays, out= or in place; {WITH_OUT}: torch tensors, out= or in place; {ALLOCATING}: as {TORCH},",
        "the result is a new tensor. The others allocate their results; NumPy has one thread whatever is asked for.",
        f"'x {TORCH}': how many times as fast as {TORCH}, with out= and with a new tensor.",
    ]
    report.tables = tables(report.records, [peer.name for peer in peers])
    report.goals = goals(report.records)
    return report


def record(case: Case, results: dict[str, Contestant]) -> dict[str, Any]:
    copy = results.get(MEMCPY)
    found: dict[str, Any] = {}
    for name, contestant in results.items():
        found[name] = {
            "median_ns": contestant.median,
            "best_ns": contestant.best,
            "gb_per_s": case.moved_bytes / contestant.median,
            "share_of_memcpy": ratio(copy, contestant) if copy else math.nan,
        }
    torch = results.get(TORCH)
    for name in (WITH_OUT, ALLOCATING):
        if torch and name in results:
            found[name]["times_torch"] = ratio(torch, results[name])
    return {
        "operation": case.operation.name,
        "dtype": case.dtype,
        "rows": case.rows,
        "columns": case.columns,
        "threads": case.threads,
        "x_bytes": case.x_bytes,
        "moved_bytes": case.moved_bytes,
        "peers": found,
    }


def tables(records: list[dict[str, Any]], names: list[str]) -> list[Table]:
    made: dict[tuple[str, int], Table] = {}
    shown = [name for name in names if name != MEMCPY and any(name in r["peers"] for r in records)]
    for r in records:
        key = (r["operation"], r["threads"])
        if key not in made:
            threads = f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
            title = f"{OPERATIONS[r['operation']].title}; {threads}"
            fast = [f"x {TORCH}", f"x {TORCH}, new"]
            made[key] = Table(title, ["x", "dtype", "H", "rows", f"{MEMCPY} GB/s", *shown, *fast])
        peers = r["peers"]
        cells = [size(r["x_bytes"]), r["dtype"], str(r["columns"]), str(r["rows"])]
        cells.append(figure(_of(peers, MEMCPY, "gb_per_s"), 1))
        cells += [figure(_of(peers, name, "share_of_memcpy"), 2) for name in shown]
        cells += [figure(_of(peers, name, "times_torch"), 1) for name in (WITH_OUT, ALLOCATING)]
        made[key].rows.append(cells)
    return list(made.values())


def goals(records: list[dict[str, Any]]) -> list[Any]:
    cache = machine.last_level_cache_bytes()

    def values(name: str, key: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, float]:
        return {_title(r): _of(r["peers"], name, key) for r in records if wanted(r)}

    def beyond(r: dict[str, Any]) -> bool:
        return bool(r["threads"] == 2 and r["x_bytes"] > cache)

    return [
        judge(
            f">= 0.9 of {MEMCPY} beyond the last-level cache ({size(cache)}) at two threads",
            values(BASE, "share_of_memcpy", beyond),
            0.9,
        ),
        judge(f">= 2 times {TORCH} at every size, with out=", values(WITH_OUT, "times_torch", lambda r: True), 2.0),
        judge(
            f">= 2 times {TORCH} at every size, with a new result",
            values(ALLOCATING, "times_torch", lambda r: True),
            2.0,
        ),
    ]


def _of(peers: dict[str, Any], name: str, key: str) -> float:
    return float(peers.get(name, {}).get(key, math.nan))


def _title(r: dict[str, Any]) -> str:
    return f"{r['operation']}, {size(r['x_bytes'])}, {r['dtype']}, H {r['columns']}, {r['threads']} threads"


@contextlib.contextmanager
def _no_grad() -> Any:
    try:
        import torch
    except ImportError:
        yield
    else:
        with torch.no_grad():
            yield
