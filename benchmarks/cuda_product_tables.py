"""The tables and the goals of cuda_products, from its records."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from .cuda_peers import CONSTANT
from .cuda_product_cases import COLD, DECODE, FP32, PREFILL, REGIMES, WARM
from .cuda_product_peers import DEEPGEMM, QUACK
from .cuda_time import OURS, geometric_mean, microseconds
from .peers import BASE
from .product_peers import TORCH
from .report import Goal, Table, figure, judge

FLAT_ROWS = (8, 16, 32, 64)
FLAT_US = (("K 7168", lambda r: r["k"] == 7168, 3.6), ("128 x 4096", lambda r: (r["n"], r["k"]) == (128, 4096), 2.5))
MOST_ERROR, ERROR_UNIT = 5e-7, 1e-7  # at gates with K = 7168
LEAST_PREFILL = 0.93
Record = dict[str, Any]


def title(r: Record) -> str:
    return f"{r['n']} x {r['k']}, M {r['m']}"


def best_peer(r: Record, among: Collection[str] | None = None) -> tuple[str, float]:
    """Of those whose result is right; ("", NaN) if there is none."""
    found = {
        name: c["median_us"]
        for name, c in r["contestants"].items()
        if name not in OURS and not c["wrong"] and (among is None or name in among)
    }
    return min(found.items(), key=lambda item: item[1]) if found else ("", math.nan)


def ratio(r: Record, name: str = BASE, among: Collection[str] | None = None) -> float:
    """The time of the best peer over that of `name`."""
    ours = r["contestants"].get(name)
    return best_peer(r, among)[1] / ours["median_us"] if ours else math.nan


def against(r: Record, among: Collection[str] | None = None) -> str:
    return f"{title(r)}, {best_peer(r, among)[0]}"


def rate(r: Record, name: str) -> str:
    c = r["contestants"].get(name)
    return figure(c["tflop_per_s"], 0) + ("!" if c["wrong"] else "") if c else "-"


def tables(records: list[Record], names: list[str]) -> list[Table]:
    by_regime = {regime: [r for r in records if r["regime"] == regime] for regime in REGIMES}
    return [_table(regime, found, names) for regime, found in by_regime.items() if found]


def _table(regime: str, records: list[Record], names: list[str]) -> Table:
    shown = [name for name in names if any(name in r["contestants"] for r in records)]
    floor = regime in (COLD, DECODE)
    show, unit = (rate, "TFLOP/s") if regime == PREFILL else (microseconds, "microseconds")
    columns = ["weight", "M", *shown[:1], *(["of floor"] if floor else [])]
    columns += ["best peer", "x best", f"x {TORCH}", *shown[1:]]
    table = Table(f"{regime}; {records[0]['dtype']}; {unit}", columns)
    for r in records:
        ours = r["contestants"].get(BASE, {})
        cold = ", cold" if regime == FP32 and r["cold"] else ""
        cells = [f"{r['n']} x {r['k']}{cold}", str(r["m"]), *[show(r, name) for name in shown[:1]]]
        cells += [figure(ours.get("share_of_floor", math.nan), 3)] if floor else []
        cells += [best_peer(r)[0] or "-", figure(ratio(r), 3), figure(ratio(r, among=(TORCH,)), 3)]
        table.rows.append(cells + [show(r, name) for name in shown[1:]])
    return table


def error_tables(records: list[Record], names: list[str]) -> list[Table]:
    table = Table("Relative error against float64, the largest over M; how many are wrong", ["weight", *names])
    for key in dict.fromkeys((r["dtype"], r["n"], r["k"]) for r in records):
        found = [r["contestants"] for r in records if (r["dtype"], r["n"], r["k"]) == key]
        cells = []
        for name in names:
            errors = [c[name] for c in found if name in c]
            wrong = sum(e["wrong"] for e in errors)
            worst = f"{max(e['error'] for e in errors):.1e}" if errors else "-"
            cells.append(f"{worst}, {wrong} WRONG" if wrong else worst)
        table.rows.append([f"{key[0]}, {key[1]} x {key[2]}", *cells])
    return [table] if table.rows else []


def host_table(host: list[Record]) -> list[Table]:
    if not host:
        return []
    table = Table(f"Host time of a call, {host[0]['host_call']}, bfloat16", ["call", "median us", "least us"])
    table.rows = [[r["contestant"], figure(r["median_us"], 2), figure(r["best_us"], 2)] for r in host]
    return [table]


def goals(records: list[Record], host: list[Record]) -> list[Goal]:
    def of(*regimes: str) -> list[Record]:
        return [r for r in records if r["regime"] in regimes]

    def ratios(chosen: list[Record], name: str = BASE, among: Collection[str] | None = None) -> dict[str, float]:
        return {against(r, among): ratio(r, name, among) for r in chosen}

    def microseconds_of(chosen: list[Record], name: str) -> dict[str, float]:
        return {title(r): r["contestants"].get(name, {}).get("median_us", math.nan) for r in chosen}

    found = []
    for name in OURS:
        for regime in (WARM, COLD):
            few = [r for r in of(regime) if r["m"] <= 16]
            text = f"{name}: {regime}, M 1 to 16: not slower than the best peer"
            found.append(judge(text, ratios(few, name), 1.0, digits=3))
            for what, fits, limit in FLAT_US:
                flat = [r for r in of(regime) if r["m"] in FLAT_ROWS and fits(r)]
                text = f"{name}: {regime}, {what}, M 8 to 64: <= {limit} us"
                found.append(judge(text, microseconds_of(flat, name), limit, at_least=False))
    many = [r for r in of(WARM) if r["m"] >= 128]
    text = f"{WARM}, M 128 to 8192: not slower than {TORCH}"
    found.append(judge(text, ratios(many, among=(TORCH,)), 1.0, digits=3))
    for name in OURS:
        text = f"{name}: {DECODE}: not slower than the better of {TORCH} and {DEEPGEMM}"
        found.append(judge(text, ratios(of(DECODE), name, (TORCH, DEEPGEMM)), 1.0, digits=3))
    large = ratios([r for r in of(PREFILL) if r["m"] >= 1024], among=(TORCH, QUACK))
    text = f"projections, M from 1024, the better of {TORCH} and {QUACK}: "
    found.append(judge(f"{text}geometric mean >= 1", geometric_mean(large), 1.0, digits=3))
    found.append(judge(f"{text}>= {LEAST_PREFILL} everywhere", large, LEAST_PREFILL, digits=3))
    errors = {
        title(r): r["contestants"][BASE]["error"] / ERROR_UNIT
        for r in of(WARM, COLD)
        if r["k"] == 7168 and BASE in r["contestants"]
    }
    text = f"gates with K 7168: relative error <= {MOST_ERROR / ERROR_UNIT:.0f} in {ERROR_UNIT:.0e}"
    found.append(judge(text, errors, MOST_ERROR / ERROR_UNIT, at_least=False))
    return [*found, *_truths(records), _host_goal(host)]


def _truths(records: list[Record]) -> list[Goal]:
    ours = [(name, r, r["contestants"][name]) for r in records for name in OURS if name in r["contestants"]]
    wrong = [f"{name}, {r['dtype']}, {title(r)}: error {c['error']:.1e}" for name, r, c in ours if c["wrong"]]
    other = [f"{name}, {r['dtype']}, {title(r)}" for name, r, c in ours if c["row_bits"] is False]
    checked = any(c["row_bits"] is not None for _, _, c in ours)
    return [
        Goal("every result of ours is the product", not wrong if ours else None, wrong[:4]),
        Goal("row 0 of our products has the bits of that row alone", not other if checked else None, other[:4]),
    ]


def _host_goal(host: list[Record]) -> Goal:
    medians = {r["contestant"]: r["median_us"] for r in host}
    ratios = {name: medians[name] / medians.get(TORCH, math.nan) for name in (BASE, CONSTANT) if name in medians}
    return judge(f"host time of a call: at most {TORCH}'s", ratios, 1.0, at_least=False)
