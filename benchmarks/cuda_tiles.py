"""Every kernel for gates, forced, at many numbers of rows: is the one that csrc/cuda/mm_split.c chooses the fastest?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fusednorm import _core

from .cuda_entries import Budget, race
from .cuda_graphs import Gpu
from .cuda_product_cases import GATES, WARM, ProductCase, expected, make_sets
from .cuda_product_peers import OurProduct, TorchProduct
from .cuda_products import ProductEntries, enter_peers
from .cuda_time import measure_all
from .peers import BASE
from .product_peers import TORCH
from .progress import Progress
from .report import Goal, Report, Table, figure, judge

ROWS = (40, 64, 72, 96, 128, 160, 200, 256, 300, 384, 512, 600, 768, 1024, 1536, 2048, 3072, 4096, 8192)
QUICK_ROWS = (64, 160, 1024)
ROUNDS, SECONDS = 5, 120.0
MOST = 1.1  # of the fastest kernel's time


def force(kernel: str | None) -> None:
    _core._force_cuda_product(kernel)


def kernels() -> list[str]:
    """What FUSEDNORM_CUDA_PRODUCT may name; none without compute capability 9.0."""
    try:
        force("?")
    except RuntimeError as error:
        return str(error).partition("must be one of ")[2].replace(",", "").split()
    return []


class ForcedProduct(OurProduct):
    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.name = kernel

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        with super().mode():
            force(self.name)
            try:
                yield
            finally:
                force(None)


def cases(quick: bool) -> list[ProductCase]:
    return [ProductCase(WARM, m, n, k, cold=False) for n, k in GATES for m in (QUICK_ROWS if quick else ROWS)]


def measure(case: ProductCase, peers: Sequence[Any], gpu: Gpu, budget: Budget) -> dict[str, Any]:
    sets: list[Any] = make_sets(case, gpu.l2_bytes(), gpu.device)
    truth: Any = expected(case, sets[0])
    product: Any = case
    found = ProductEntries(product, sets, case.count(len(sets)), truth)
    enter_peers(found, peers, gpu, budget)
    times = race(found, [(entry, entry.chain(found.count)) for entry in found.entries], gpu, ROUNDS)
    return {
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "median_us": {name: timed.median for name, timed in times.items()},
        "wrong": [entry.name for entry in found.entries if found.wrong(entry)],
        "absent": found.absent,
    }


def fastest(record: dict[str, Any]) -> str:
    """A kernel's name, or BASE where none was forced."""
    forced = {name: us for name, us in record["median_us"].items() if name not in (BASE, TORCH)}
    return min(forced, key=lambda name: forced[name]) if forced else BASE


def of_fastest(record: dict[str, Any]) -> float:
    """The chosen kernel's time over the fastest's."""
    times: dict[str, float] = record["median_us"]
    return times[BASE] / times[fastest(record)] if BASE in times else float("nan")


def tables(records: list[dict[str, Any]]) -> list[Table]:
    found = []
    for n, k in GATES:
        table = Table(f"{n} x {k}", ["M", "fastest", "us", "chosen", "of fastest", TORCH, f"x {TORCH}"], text_columns=2)
        for r in records:
            if (r["n"], r["k"]) != (n, k):
                continue
            name, times = fastest(r), r["median_us"]
            chosen, torch = (times.get(who, float("nan")) for who in (BASE, TORCH))
            figures = [(times.get(name, float("nan")), 2), (chosen, 2), (of_fastest(r), 3), (torch, 2)]
            table.rows.append([str(r["m"]), name, *(figure(*f) for f in figures), figure(torch / chosen, 2)])
        if table.rows:
            found.append(table)
    return found


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    ratios = {f"{r['n']} x {r['k']}, M {r['m']}, {fastest(r)}": of_fastest(r) for r in records}
    wrong = [f"{r['n']} x {r['k']}, M {r['m']}: {', '.join(r['wrong'])}" for r in records if r["wrong"]]
    return [
        judge(f"the chosen kernel takes at most {MOST} of the fastest's time", ratios, MOST, at_least=False, digits=3),
        Goal("every kernel's result is the product", not wrong if records else None, wrong[:4]),
    ]


def run(quick: bool, gpu: Gpu, head: dict[str, str], progress: Progress, peers: Sequence[Any] | None = None) -> Report:
    method = "microseconds a call in CUDA graphs, as in cuda_products; each kernel of csrc/cuda/mm_split.cuh is forced"
    report = Report("cuda_tiles", {**head, "method": method})
    if peers is None:
        peers = [OurProduct(), *map(ForcedProduct, kernels()), TorchProduct()]
    wanted = [peer for peer in peers if not peer.absent()]
    budget = Budget(SECONDS)

    def do(case: ProductCase) -> None:
        report.records.append(measure(case, wanted, gpu, budget))

    measure_all(report, cases(quick), do, budget, progress)
    report.notes = [
        "chosen: the kernel that a call takes by itself; of fastest: its time over the fastest's.",
        "A kernel's name: weights x tokens of its tile, blocks that share K.",
    ]
    report.tables, report.goals = tables(report.records), goals(report.records)
    return report
