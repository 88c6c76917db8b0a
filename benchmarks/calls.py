"""Host time of a call on a small array, less that of an empty function."""

from __future__ import annotations

import timeit
from typing import Any

from .progress import Progress
from .report import Goal, Report, Table, figure, judge
from .small_calls import EMPTY, NUMPY_ADD, SmallCall, small_calls
from .timing import Contestant, race

COLUMNS = (8, 4096)
SAMPLE_NS = 2e5
STUB_NS, TENSOR_NS = 50.0, 250.0


def run(quick: bool, head: dict[str, str], progress: Progress) -> Report:
    import fusednorm

    fusednorm.set_num_threads(1)
    head = {
        **head,
        "method": "one row of float32, one thread; the least of many samples of 0.2 ms, calls in turns",
    }
    report = Report("call", head)
    report.notes = [
        "ns a call, and ns beyond the empty function in the same loop. C: a loop of PyObject_Vectorcall, without the",
        "interpreter; Python: the loop of timeit. 'The loan of three arrays, alone' is what the stubs' or tensors' own",
        "library takes to lend them by the DLPack C exchange API, which a call cannot go below.",
    ]
    rounds = 20 if quick else 400
    for number, columns in enumerate(COLUMNS):
        progress(2 * number, 2 * len(COLUMNS), f"1 x {columns}, C loop")
        calls = small_calls(columns)
        in_c = measure(calls, rounds, python=False)
        progress(2 * number + 1, 2 * len(COLUMNS), f"1 x {columns}, Python loop")
        in_python = measure(calls, rounds, python=True)
        for call, c, python in zip(calls, in_c, in_python):
            report.records.append(
                {
                    "columns": columns,
                    "arrays": call.group,
                    "call": call.name,
                    "ours": call.ours,
                    "c_ns": c.best,
                    "c_median_ns": c.median,
                    "c_over_empty_ns": c.best - in_c[0].best,
                    "python_ns": python.best,
                    "python_median_ns": python.median,
                    "python_over_empty_ns": python.best - in_python[0].best,
                }
            )
    progress(1, 1, "")
    report.tables = tables(report.records)
    report.goals = goals(report.records)
    return report


def measure(calls: list[SmallCall], rounds: int, python: bool) -> list[Contestant]:
    contestants = [Contestant(f"{call.group} {call.name}", _sampler(call, python)) for call in calls]
    assert calls[0].name == EMPTY
    race(contestants, rounds, SAMPLE_NS)
    return contestants


def _sampler(call: SmallCall, python: bool) -> Any:
    timer = timeit.Timer(call.source, globals=call.names)

    def sample(number: int) -> float:
        with call.mode():
            return timer.timeit(number) * 1e9 if python else call.call.nanoseconds(number)

    return sample


def tables(records: list[dict[str, Any]]) -> list[Table]:
    made = []
    for columns in COLUMNS:
        table = Table(
            f"1 x {columns}", ["arrays", "call", "C ns", "over empty", "Python ns", "over empty"], text_columns=2
        )
        for r in records:
            if r["columns"] == columns:
                keys = ("c_ns", "c_over_empty_ns", "python_ns", "python_over_empty_ns")
                table.rows.append([r["arrays"] or "none", r["call"], *[figure(r[key], 0) for key in keys]])
        made.append(table)
    return made


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    """On 1 x 8, by the C loop."""
    smallest = [r for r in records if r["columns"] == COLUMNS[0]]

    def over_empty(group: str, ending: str) -> dict[str, float]:
        return {
            f"{r['arrays']}, {r['call']}": r["c_over_empty_ns"]
            for r in smallest
            if r["ours"] and r["arrays"].startswith(group) and r["call"].endswith(ending)
        }

    with_out, in_place = "out=out)", "residual, w, eps)"
    add = next(r["c_over_empty_ns"] for r in smallest if r["call"] == NUMPY_ADD)
    limits = (
        ("stubs", STUB_NS, f"<= {STUB_NS:.0f} ns over an empty function with stub producers"),
        ("tensors", TENSOR_NS, f"<= {TENSOR_NS:.0f} ns over it with three torch tensors"),
        ("ndarrays", add, f"not dearer than {NUMPY_ADD}, {add:.0f} ns over it, with ndarrays"),
    )
    return [
        judge(f"{text}, {what}", over_empty(group, ending), limit, at_least=False, digits=0)
        for what, ending in (("out=", with_out), ("fused add in place", in_place))
        for group, limit, text in limits
    ]
