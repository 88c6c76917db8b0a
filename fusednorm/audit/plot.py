"""The report as bars: how many elements of each norm differ from the exact results, on a logarithmic scale."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

from . import product_plot
from .measure import CPU_BITS, NEAREST, OPERATIONS, Table
from .products import ProductTable
from .report import on_cuda, rounds
from .run import Report

BARS = {  # key in Result.differ: colour, legend
    "exact_fp32_sum": ("#2a6fbb", "the exact result at Hugging Face's rounding points, sum kept in fp32"),
    "exact_rounded_sum": ("#e08e2b", "the same, sum rounded to the dtype (transformers)"),
    "exact": ("#7d5fb2", "the exact result at Hugging Face's rounding points (no sum)"),
    NEAREST: ("#3b9a58", "the exact result at the rounding points nearest to the norm's own"),
    CPU_BITS: ("#b03a48", "the same norm on the CPU, for norms on CUDA"),
}
COUNT: dict[str, Any] = {  # the style of the numbers at the bars
    "va": "center",
    "fontsize": 6.5,
    "color": "#333333",
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.4},
}
ZERO_AT = 0.7  # where a bar of 0 ends on the logarithmic axis: left of 1


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    try:
        found = util.find_spec("matplotlib") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else "needs matplotlib: python -m pip install matplotlib"


def draw(report: Report, path: Path) -> None:
    """One panel a table, its dtypes beside each other; PNG or SVG by the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    norms: dict[tuple[str, str, str], list[Table]] = {}
    for table in report.tables:
        norms.setdefault((table.device, table.data, table.operation), []).append(table)
    products: dict[tuple[str, int, int], list[ProductTable]] = {}
    for product in report.products:
        products.setdefault((product.device, product.n, product.k), []).append(product)
    if not norms and not products:
        raise SystemExit("--plot: there is no table to draw")
    widths = [*map(len, norms.values()), *map(len, products.values())]
    heights = [max(map(_height, tables)) for tables in norms.values()]
    heights += [product_plot.height(tables) for tables in products.values()]
    with pyplot.rc_context({"svg.fonttype": "path", "svg.hashsalt": "fusednorm", "font.size": 9}):
        figure, axes = pyplot.subplots(
            len(heights),
            max(widths),
            figsize=(2.6 + 3.7 * max(widths), sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        legend = {}
        for line, tables in zip(axes[: len(norms)], norms.values(), strict=True):
            for i, table in enumerate(tables):
                legend.update(_panel(line[i], table, _lines(tables), names=i == 0))
        for line, factors in zip(axes[len(norms) :], products.values(), strict=True):
            for i, product in enumerate(factors):
                product_plot.panel(line[i], product, product_plot.lines(factors), names=i == 0)
        for line, width in zip(axes, widths, strict=True):
            for axis in line[width:]:
                axis.set_visible(False)
        heading = "Elements that differ from"
        place = {"loc": "outside upper left", "alignment": "left", "frameon": False}
        titles = [title for _, title in BARS.values() if title in legend]
        if titles:
            figure.legend([legend[title] for title in titles], titles, title=heading, **place)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        pyplot.close(figure)


def _bars(table: Table) -> list[str]:
    keys = [*(reference.key for reference in OPERATIONS[table.operation].references), NEAREST]
    return [*keys, CPU_BITS] if on_cuda(table) else keys


def _height(table: Table) -> float:
    return 0.9 + 0.14 * len(_bars(table)) * len(table.results)


def _lines(tables: list[Table]) -> dict[str, str]:
    """The peers, with their labels, that panels beside each other share their lines for: those with any figures."""
    drawn = {result.peer for table in tables for result in table.results if not result.skipped}
    return {result.peer: result.label for table in tables for result in table.results if result.peer in drawn}


def _panel(axis: Any, table: Table, lines: dict[str, str], names: bool) -> dict[str, Any]:
    """Draws one table; returns what the legend needs."""
    keys, legend = _bars(table), {}
    results = {result.peer: result for result in table.results if not result.skipped}
    bar = 0.84 / len(keys)
    for k, key in enumerate(keys):
        colour, title = BARS[key]
        counted = {
            i: results[peer].differ[key]
            for i, peer in enumerate(lines)
            if peer in results and key in results[peer].differ
        }
        if not counted:
            continue
        counts = list(counted.values())
        places = [i - 0.42 + (k + 0.5) * bar for i in counted]
        lengths = [max(count, ZERO_AT) for count in counts]
        legend[title] = axis.barh(places, lengths, bar * 0.9, color=colour)
        for place, length, count in zip(places, lengths, counts, strict=True):
            axis.text(length * 1.15, place, f"{count:,}", **COUNT)
    axis.set_xscale("log")
    axis.set_xlim(0.5, table.elements * 12)
    axis.axvline(table.elements, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_ylim(max(len(lines), 1) - 0.45, -0.55)
    axis.set_yticks(range(len(lines)), list(lines.values()) if names else [""] * len(lines))
    axis.tick_params(axis="y", length=0)
    if names:
        for i, peer in enumerate(lines):
            if peer not in results:
                continue
            small = {"fontsize": 6.5, "color": "#777777", "ha": "right", "va": "center"}
            axis.text(
                -0.012,
                i + 0.34,
                f"rounds {rounds(results[peer], table).replace('-', 'nothing')}",
                transform=axis.get_yaxis_transform(),
                **small,
            )
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    device = f"{table.device.upper()}: " if on_cuda(table) else ""
    axis.set_title(f"{device}{OPERATIONS[table.operation].title}, {table.dtype}, {table.data}", fontsize=10, loc="left")
    axis.set_xlabel(f"elements, of {table.elements:,} (dotted)")
    return legend
