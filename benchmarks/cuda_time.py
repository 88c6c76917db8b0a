"""Device time of the norms on a GPU beside a device copy of the same bytes and beside the peers, in CUDA graphs."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

from .cases import OPERATIONS
from .cuda_cases import FEW_ROWS, REGIMES, CudaCase, cases
from .cuda_entries import COPY, Budget, Entries, enter, race, share
from .cuda_graphs import Gpu, quiet
from .cuda_peers import CONSTANT, CudaPeer
from .peers import BASE
from .progress import Progress
from .report import Goal, Report, Table, figure, judge

ROUNDS, QUICK_ROUNDS = 11, 5
COLLECT_EVERY = 10  # cases: garbage
OURS = (BASE, CONSTANT)
LARGE_FROM = 64e6  # bytes of x, in the goals
MIDDLE_ROWS = range(512, 2049)


def measure(case: CudaCase, peers: Sequence[CudaPeer], gpu: Gpu, budget: Budget, rounds: int) -> dict[str, Any]:
    found = enter(case, peers, gpu, budget)
    times = race(found, [(entry, entry.chain(found.count)) for entry in found.entries], gpu, rounds)
    return record(found, times)


def record(found: Entries, times: dict[str, Any]) -> dict[str, Any]:
    case, contestants = found.case, {}
    for entry in found.entries:
        timed = times[entry.name]
        contestants[entry.name] = {
            "median_us": timed.median,
            "best_us": min(timed.times),
            "share_of_copy": share(times[COPY], timed),
            "error": entry.error,
            "wrong": found.wrong(entry),
            "first_ms": entry.first_s * 1e3,
        }
    return {
        "operation": case.operation.name,
        "regime": case.regime,
        "dtypes": case.dtypes,
        "rows": case.rows,
        "columns": case.columns,
        "x_bytes": case.x_bytes,
        "moved_bytes": case.moved_bytes,
        "sets": len(found.sets),
        "calls": found.count,
        "contestants": contestants,
        "absent": found.absent,
    }


def run(
    peers: Sequence[CudaPeer], quick: bool, seconds: float, gpu: Gpu, head: dict[str, str], progress: Progress
) -> Report:
    method = (
        "microseconds a call in a CUDA graph that holds a chain of calls; the contestants' graphs are replayed in "
        "turns in one process; medians over turns; where a call touches 4 MiB or more, the tensors rotate over three "
        "times the L2 cache"
    )
    report = Report("cuda_time", {**head, "method": method})
    wanted, budget = cases(quick), Budget(seconds)
    measure_all(
        report,
        wanted,
        lambda case: report.records.append(measure(case, peers, gpu, budget, QUICK_ROUNDS if quick else ROUNDS)),
        budget,
        progress,
    )
    names = names_in(report, peers)
    report.notes = [
        f"{COPY}: cudaMemcpyAsync of as many bytes as the operation must move, in one piece up to 256 MiB.",
        f"{BASE}: out= or in place, safe after a kernel that writes the weight. {CONSTANT}: weights_are_constant().",
        f"of copy: {COPY}'s time over {BASE}'s. x best: the best peer's time over {BASE}'s.",
        "-: not measured, the JSON file has the reason. A time with ! is of a kernel whose result is wrong.",
    ]
    report.tables = [*tables(report.records, names), *error_tables(report.records, names)]
    report.goals = goals(report.records)
    return report


def measure_all(
    report: Report, wanted: Sequence[Any], do: Callable[[Any], None], budget: Budget, progress: Progress
) -> None:
    """`do` for each case, and in the head how long it took and what ended it early."""
    with quiet():
        stopped = each(wanted, do, budget, progress)
    if stopped:
        report.head["stopped"] = stopped
    report.head["took"] = f"{budget.elapsed():.0f} s"


def names_in(report: Report, peers: Sequence[CudaPeer]) -> list[str]:
    """Those who were measured at all, in the order of the tables."""
    return [name for name in (COPY, *[p.name for p in peers]) if any(name in r["contestants"] for r in report.records)]


def each(wanted: Sequence[Any], do: Callable[[Any], None], budget: Budget, progress: Progress) -> str:
    """Goes through the cases; the reason if not through all. What was measured until then is not lost."""
    for done, case in enumerate(wanted):
        progress(done, len(wanted), f"{case.text()}, {budget.elapsed():.0f} s")
        try:
            if budget.over():
                return f"out of time: {done} of {len(wanted)} cases measured"
            do(case)
            if done % COLLECT_EVERY == 0:
                gc.collect()
        except KeyboardInterrupt:
            return f"interrupted: {done} of {len(wanted)} cases measured"
        except Exception as error:  # a device that a kernel has broken takes no more calls
            return f"at {case.text()}, after {done} of {len(wanted)} cases: {type(error).__name__}: {error}"[:300]
    progress(len(wanted), len(wanted), "")
    return ""


def best_peer(r: dict[str, Any]) -> tuple[str, float]:
    """Of those that compute the norm; ("", NaN) if there is none."""
    found = {
        name: c["median_us"] for name, c in r["contestants"].items() if name not in (COPY, *OURS) and not c["wrong"]
    }
    return min(found.items(), key=lambda item: item[1]) if found else ("", math.nan)


def times_of_best(r: dict[str, Any], name: str = BASE) -> float:
    ours = r["contestants"].get(name)
    return best_peer(r)[1] / ours["median_us"] if ours else math.nan


def microseconds(r: dict[str, Any], name: str) -> str:
    c = r["contestants"].get(name)
    if not c:
        return "-"
    value = c["median_us"]
    return figure(value, 2 if value < 99.95 else 1) + ("!" if c["wrong"] else "")


def tables(records: list[dict[str, Any]], names: list[str]) -> list[Table]:
    made: dict[tuple[str, str, str], Table] = {}
    for r in records:
        key = (r["operation"], r["dtypes"], r["regime"])
        same = [o for o in records if (o["operation"], o["dtypes"], o["regime"]) == key]
        shown = [n for n in names if any(n in o["contestants"] for o in same)]
        if key not in made:
            title = f"{OPERATIONS[r['operation']].title}; {r['dtypes']}; {r['regime']}"
            columns = ["rows", "H", *shown[:1], "of copy", "best peer", "x best", *shown[1:]]
            made[key] = Table(title, columns, text_columns=0)
        ours = r["contestants"].get(BASE, {})
        cells = [str(r["rows"]), str(r["columns"]), *[microseconds(r, n) for n in shown[:1]]]
        cells += [figure(ours.get("share_of_copy", math.nan), 3), best_peer(r)[0] or "-", figure(times_of_best(r), 3)]
        made[key].rows.append(cells + [microseconds(r, n) for n in shown[1:]])
    order = list(OPERATIONS)
    keys = sorted(made, key=lambda k: (k[1] != "bfloat16", k[1], order.index(k[0]), REGIMES.index(k[2])))
    return [made[key] for key in keys]


def error_tables(records: list[dict[str, Any]], names: list[str]) -> list[Table]:
    table = Table("Relative error against float64, the largest over the cases; how many are wrong", ["of", *names[1:]])
    for operation in OPERATIONS:
        for dtypes in dict.fromkeys(r["dtypes"] for r in records):
            found = [r["contestants"] for r in records if (r["operation"], r["dtypes"]) == (operation, dtypes)]
            cells = []
            for name in names[1:]:
                errors = [c[name] for c in found if name in c]
                wrong = sum(e["wrong"] for e in errors)
                worst = f"{max(e['error'] for e in errors):.1e}" if errors else "-"
                cells.append(f"{worst}, {wrong} WRONG" if wrong else worst)
            if found:
                table.rows.append([f"{operation}, {dtypes}", *cells])
    return [table] if table.rows else []


def title(r: dict[str, Any]) -> str:
    return f"{r['operation']}, {r['dtypes']}, {r['rows']} x {r['columns']}"


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    """Large ones near the copy; the others ahead of the best peer of each shape. bfloat16."""
    of_bf16 = [r for r in records if r["dtypes"] == "bfloat16"]
    large = [r for r in records if r["x_bytes"] >= LARGE_FROM]
    few = [r for r in of_bf16 if r["rows"] <= FEW_ROWS[-1]]
    middle = [r for r in of_bf16 if r["rows"] in MIDDLE_ROWS]
    found = []
    for operation in OPERATIONS:
        shares = {
            title(r): r["contestants"].get(BASE, {}).get("share_of_copy", math.nan)
            for r in large
            if r["operation"] == operation
        }
        found.append(judge(f"{operation}, 64 MB and more: >= 0.98 of the {COPY}", shares, 0.98, digits=3))
    for name in OURS:
        for operation, mean, each_more in (("rms_norm", 1.05, False), ("fused_add_rmsnorm", 1.15, True)):
            ratios = {against(r): times_of_best(r, name) for r in few if r["operation"] == operation}
            word = "faster than" if each_more else "not slower than"
            text = f"{name}: {operation}, rows 1 to 128: {word} the best peer at every shape"
            found.append(judge(text, ratios, math.nextafter(1.0, 2.0) if each_more else 1.0, digits=3))
            text = f"{name}: {operation}, rows 1 to 128: geometric mean >= {mean} over the best peer of each shape"
            found.append(judge(text, geometric_mean(ratios), mean, digits=3))
    for operation in OPERATIONS:
        ratios = {against(r): times_of_best(r) for r in middle if r["operation"] == operation}
        found.append(judge(f"{operation}, rows 512 to 2048: not slower than the best peer", ratios, 1.0, digits=3))
    ours = [(name, r, r["contestants"][name]) for r in records for name in OURS if name in r["contestants"]]
    failing = [f"{name}, {title(r)}: error {c['error']:.1e}" for name, r, c in ours if c["wrong"]]
    found.append(Goal("every result of ours is the norm", not failing if ours else None, failing[:4]))
    return found


def against(r: dict[str, Any]) -> str:
    return f"{title(r)}, {best_peer(r)[0]}"


def geometric_mean(ratios: dict[str, float]) -> dict[str, float]:
    known = [value for value in ratios.values() if not math.isnan(value)]
    if not known:
        return {}
    return {f"over {len(known)} shapes": math.exp(sum(map(math.log, known)) / len(known))}
