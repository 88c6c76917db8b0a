"""The norms with another kernel between: a chain of one kernel alone flatters whoever launches dependently."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .cases import OPERATIONS
from .cuda_cases import CudaCase, between_cases
from .cuda_entries import Budget, Entry, enter, median, race
from .cuda_graphs import Gpu
from .cuda_peers import CudaPeer
from .cuda_time import OURS, against, best_peer, measure_all, microseconds, names_in
from .cuda_time import QUICK_ROUNDS as FEWER_TURNS
from .cuda_time import ROUNDS as TURNS
from .peers import BASE
from .progress import Progress
from .report import Goal, Report, Table, figure, judge

PRODUCT, ELEMENTWISE = "torch.mm", "torch.add"
KINDS = {
    PRODUCT: "a product, 64 x 512 by 512 x 512 (torch.mm, out=)",
    ELEMENTWISE: "an elementwise kernel on 65536 elements (torch.add, out=)",
}


def neighbours(device: str) -> dict[str, Callable[[], Any]]:
    """On data of their own, in bfloat16."""
    import torch

    def random(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    a, b, product = random(64, 512), random(512, 512), random(64, 512)
    p, q, total = random(1 << 16), random(1 << 16), random(1 << 16)
    return {
        PRODUCT: lambda: torch.mm(a, b, out=product),
        ELEMENTWISE: lambda: torch.add(p, q, out=total),
    }


def measure(case: CudaCase, peers: Sequence[CudaPeer], gpu: Gpu, budget: Budget, rounds: int) -> list[dict[str, Any]]:
    """A record for each kind of neighbour: what a norm adds to the time of the neighbour alone, within a turn."""
    found = enter(case, peers, gpu, budget)
    count = max(len(found.sets), found.count // 2 // len(found.sets) * len(found.sets))
    records = []
    for kind, neighbour in neighbours(gpu.device).items():
        neighbour()
        alone = Entry(f"{kind} alone", [lambda: None])
        chains = [(alone, alone.chain(count, neighbour))]
        chains += [(entry, entry.chain(count, neighbour)) for entry in found.entries]
        times = race(found, chains, gpu, rounds)
        records.append(
            {
                "operation": case.operation.name,
                "dtypes": case.dtypes,
                "rows": case.rows,
                "columns": case.columns,
                "between": kind,
                "alone_us": times[alone.name].median,
                "contestants": {
                    entry.name: {
                        "median_us": _added(times[entry.name].times, times[alone.name].times),
                        "with_neighbour_us": times[entry.name].median,
                        "error": entry.error,
                        "wrong": found.wrong(entry),
                    }
                    for entry in found.entries
                },
                "absent": dict(found.absent),
            }
        )
    return records


def _added(both: Sequence[float], alone: Sequence[float]) -> float:
    return median([a - b for a, b in zip(both, alone)])


def run(
    peers: Sequence[CudaPeer], quick: bool, seconds: float, gpu: Gpu, head: dict[str, str], progress: Progress
) -> Report:
    method = (
        "as in cuda_time, but each call in the chain is followed by another kernel on other data; shown is the time of "
        "the chain less that of the other kernels alone, a call, the difference taken within a turn"
    )
    report = Report("cuda_between", {**head, "method": method})
    budget = Budget(seconds)
    measure_all(
        report,
        between_cases(quick),
        lambda case: report.records.extend(measure(case, peers, gpu, budget, FEWER_TURNS if quick else TURNS)),
        budget,
        progress,
    )
    names = names_in(report, peers)
    report.notes = [
        "Microseconds that a call adds. alone: the other kernel, a call. -: not measured; the JSON says why.",
        "over best: what fusednorm adds, less what the best peer adds; a ratio would mean little beside 0.",
    ]
    report.tables, report.goals = tables(report.records, names), goals(report.records)
    return report


def tables(records: list[dict[str, Any]], names: list[str]) -> list[Table]:
    made: dict[tuple[str, str], Table] = {}
    for r in records:
        key = (r["operation"], r["between"])
        if key not in made:
            heading = f"{OPERATIONS[r['operation']].title}; bfloat16; between: {KINDS[r['between']]}"
            made[key] = Table(heading, ["rows", "H", "alone", *names[:1], "over best", *names[1:]], text_columns=0)
        cells = [str(r["rows"]), str(r["columns"]), figure(r["alone_us"], 2), *[microseconds(r, n) for n in names[:1]]]
        cells += [figure(over_best(r), 2), *[microseconds(r, n) for n in names[1:]]]
        made[key].rows.append(cells)
    return list(made.values())


def over_best(r: dict[str, Any], name: str = BASE) -> float:
    """Microseconds; NaN without a peer."""
    ours = r["contestants"].get(name)
    return ours["median_us"] - best_peer(r)[1] if ours else math.nan


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    found = []
    for name in OURS:
        for operation in OPERATIONS:
            of = [r for r in records if r["operation"] == operation]
            values = {f"{against(r)}, {r['between']}": over_best(r, name) for r in of}
            text = f"{name}: {operation} with another kernel between: adds no more us than the best peer"
            found.append(judge(text, values, 0.0, at_least=False, digits=3))
    return found
