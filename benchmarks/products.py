"""mm_dtype on the CPU beside torch.mm, and for one row beside a read of the weight."""

from __future__ import annotations

import math
from typing import Any

from .bandwidth import METHOD, Settings, race_all, record_all
from .peers import Peer
from .product_cases import LAYOUTS, ProductCase, product_cases
from .product_peers import OURS, OURS_ROUNDED, READ, TORCH, TORCH_FP32, ProductOperands
from .progress import Progress
from .report import Goal, Report, Table, figure, judge, size
from .timing import Contestant, ratio

RATIOS = {  # key in JSON: (title, of whom, to whom)
    "times_torch": (f"x {TORCH}", OURS, TORCH),
    "times_torch_rounded": (f"16 bits out, x {TORCH}", OURS_ROUNDED, TORCH),
    "times_torch_fp32": (f"x {TORCH_FP32}", OURS, TORCH_FP32),
}
GOAL_SHAPES = ((256, 7168), (4096, 4096))


def run(peers: list[Peer], settings: Settings, head: dict[str, str], progress: Progress) -> Report:
    report = Report("products", {**head, "method": METHOD})
    wanted = product_cases(settings.threads, settings.dtypes, settings.quick)
    record_all(report, wanted, peers, lambda case: record(case, measure(case, peers, settings)), progress)
    report.notes = [
        "a (M x K) times the transpose of a weight (N x K), which is read as it lies, into memory that is there. Where",
        "that is K x N, the weight is the transposed view of a K x N array.",
        f"{OURS}: ndarrays of the dtype shown, fp32 result; {OURS_ROUNDED}: 16-bit result. {TORCH}: operands and",
        f"result of the dtype shown. {TORCH_FP32}: the same operands, widened to fp32 before they are timed.",
        "'x PEER': how many times as fast as that peer. Where M is 1, GB/s: the weight's bytes over the time, and 'of",
        f"read': the share of the speed of a plain {READ} by as many threads, in the same turn.",
    ]
    report.tables = tables(report.records, [peer.name for peer in peers])
    report.goals = goals(report.records)
    return report


def measure(case: ProductCase, peers: list[Peer], settings: Settings) -> dict[str, Contestant]:
    operands = ProductOperands(case)
    calls = {peer.name: peer.prepare(case, operands) for peer in peers if case.m == 1 or peer.name != READ}
    contestants = [Contestant(name, call.nanoseconds) for name, call in calls.items() if call]
    return race_all(contestants, settings, slow_ns=3e8, slow_rounds=5)


def record(case: ProductCase, results: dict[str, Contestant]) -> dict[str, Any]:
    def times(slower: str, faster: str) -> float:
        return ratio(results[slower], results[faster]) if {slower, faster} <= {*results} else math.nan

    return {
        "dtype": case.dtype,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "threads": case.threads,
        "layout": case.layout,
        "weight_bytes": case.weight_bytes,
        "peers": {
            name: {"median_ns": each.median, "best_ns": each.best, "gflop_per_s": case.flop / each.median}
            for name, each in results.items()
        },
        "weight_gb_per_s": case.weight_bytes / results[OURS].median,
        "share_of_read": times(READ, OURS),
        **{key: times(theirs, ours) for key, (_, ours, theirs) in RATIOS.items()},
    }


def tables(records: list[dict[str, Any]], names: list[str]) -> list[Table]:
    made: dict[tuple[str, int, str], Table] = {}
    for r in records:
        key = _key(r)
        here = [name for name in names if any(name in other["peers"] for other in records if _key(other) == key)]
        ratios = {k: title for k, (title, _, _) in RATIOS.items() if any(_known(o[k]) for o in _of(records, key))}
        if key not in made:
            threads = f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
            title = f"{r['dtype']}; {threads}; weight in memory {r['layout']}; microseconds, and ratios"
            columns = ["weight", "bytes", "M", *here, *ratios.values(), "GB/s", "of read"]
            made[key] = Table(title, columns)
        cells = [f"{r['n']} x {r['k']}", size(r["weight_bytes"]), str(r["m"])]
        cells += [figure(r["peers"].get(name, {}).get("median_ns", math.nan) / 1e3, 1) for name in here]
        cells += [figure(r[name], 2) for name in ratios]
        one = r["m"] == 1
        cells += [figure(r["weight_gb_per_s"] if one else math.nan, 1), figure(r["share_of_read"], 2)]
        made[key].rows.append(cells)
    return list(made.values())


def _key(r: dict[str, Any]) -> tuple[str, int, str]:
    return r["dtype"], r["threads"], r["layout"]


def _of(records: list[dict[str, Any]], key: tuple[str, int, str]) -> list[dict[str, Any]]:
    return [r for r in records if _key(r) == key]


def _known(value: float) -> bool:
    return not math.isnan(value)


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    places = " and ".join(f"{n} x {k}" for n, k in GOAL_SHAPES)

    def values(key: str, dtype: str) -> dict[str, float]:
        chosen = [r for r in records if r["layout"] == LAYOUTS[0] and (r["n"], r["k"]) in GOAL_SHAPES]
        return {_title(r): r[key] for r in chosen if r["dtype"] == dtype}

    return [
        judge(f">= 0.5 times {TORCH} in fp32 at {places}", values("times_torch", "float32"), 0.5),
        judge(f">= 0.5 times {TORCH} in bf16 at {places}, with an fp32 result", values("times_torch", "bfloat16"), 0.5),
    ]


def _title(r: dict[str, Any]) -> str:
    return ProductCase(r["dtype"], r["m"], r["n"], r["k"], r["threads"], r["layout"]).text()
