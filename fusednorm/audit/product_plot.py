"""Products as bars: the error of each against float64, and in words whether its rows keep their bits."""

from __future__ import annotations

from typing import Any

from .products import ProductTable
from .report import batch_text, on_cuda

SAME, CHANGES = "#3b9a58", "#b03a48"
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # the text may lie on lines of the grid
LEAST, MOST = 1e-9, 1e3  # the ends of the axis; beyond 1 is room for the text


def height(tables: list[ProductTable]) -> float:
    return 0.9 + 0.3 * len(lines(tables))


def lines(tables: list[ProductTable]) -> dict[str, str]:
    """The peers, with their labels, that panels beside each other share their lines for: those with any figures."""
    return {result.peer: result.label for table in tables for result in table.results if not result.skipped}


def panel(axis: Any, table: ProductTable, peers: dict[str, str], names: bool) -> None:
    results = {result.peer: result for result in table.results if not result.skipped}
    for i, peer in enumerate(peers):
        if peer not in results:
            continue
        result = results[peer]
        changes = result.batch is not None and result.batch.any_row_changes_at is not None
        error = result.relative_error
        shown = 1.0 if error is None else min(max(error, LEAST), 1.0)
        axis.barh([i], [shown - LEAST], 0.7, left=LEAST, color=CHANGES if changes else SAME)
        found = ["nan" if error is None else f"{error:.1e}", batch_text(result.batch)]
        found += [f"through {result.through}"] if result.through else []
        found += [f"read as {result.read_as}"] if result.read_as not in (None, "fp32") else []
        axis.text(shown * 1.5, i, ", ".join(found), va="center", fontsize=6.5, color="#333333", bbox=BEHIND)
    axis.set_xscale("log")
    axis.set_xlim(LEAST, MOST)
    axis.set_ylim(max(len(peers), 1) - 0.45, -0.55)
    axis.set_yticks(range(len(peers)), list(peers.values()) if names else [""] * len(peers))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    device = f"{table.device.upper()}: " if on_cuda(table) else ""
    axis.set_title(f"{device}product, {table.n} x {table.k}, {table.dtype}", fontsize=10, loc="left")
    axis.set_xlabel("error against float64; red: a row's bits change with the batch")
