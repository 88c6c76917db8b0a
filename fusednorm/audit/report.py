"""The report as text: aligned columns, or rich's tables where rich is installed and the output is a terminal."""

from __future__ import annotations

import json
import textwrap
from typing import TextIO

import numpy as np

from .measure import CPU_BITS, NEAREST, OPERATIONS, UNCLEAR, Batch, Mixed, Result, Table
from .peers import EAGER, Points
from .products import ProductTable
from .run import Found, Report

LEGEND = (
    "Counted: elements that differ, bit for bit; in brackets the largest difference in ulp.",
    "exact, fp32 sum / rounded sum: the real number, rounded where Hugging Face rounds and nowhere else: y = s / rms"
    " to the dtype, then y * weight. s = x + residual stays fp32, or is rounded to the dtype first, as in transformers,"
    " whose Llama adds in the model's dtype.",
    "rounds: where the norm rounds before its result, found by comparing it with the exact result at every choice:"
    " s, y as above, 's after var' if the variance is the fp32 sum's, - for nowhere. exact, nearest: what differs from"
    " that one. Where this is small the norm is accurate, and its large counts are a choice of rounding points.",
    "batch: whether every row has the same bits alone and in batches of up to 1024 rows, or the first size where not.",
    "time: relative to fusednorm hf_llama; the median of interleaved calls that allocate their results.",
)
CUDA_LEGEND = (
    "CPU's bits: what differs from the same norm on the CPU, on the same numbers. HF eager: on the table's device.",
    "fp32 weight: what a bfloat16 x with an fp32 weight gives: right, and in which dtype if not bfloat16; rounded: as"
    " if the weight had been rounded to bfloat16; the share of wrong elements; or refused.",
    "time on CUDA: the device's, with operands that fit into its L2 cache, calls queued ahead; in place where the"
    " package works in place.",
)


PRODUCT_LEGEND = (
    "Products, of which all are asked for an fp32 result. batch: whether every row has the same bits alone and in"
    " larger batches, or the first number of rows where not; 1 to 64 were tried one by one.",
    "error: against float64, as norm(difference) / norm(result).",
    "through: the 16-bit dtype that every fp32 result fits in, so that it was rounded to that on the way; - for none.",
    "read as: what is left of fp32 operands, by the bits that change a result: fp32, TF32 (10 bits), bfloat16 (7).",
)


def on_cuda(table: Table | ProductTable) -> bool:
    return table.device != "cpu"


def legend(report: Report) -> tuple[str, ...]:
    norms = LEGEND + (CUDA_LEGEND if any(map(on_cuda, report.tables)) else ()) if report.tables else ()
    return norms + (PRODUCT_LEGEND if report.products else ())


def _mixed(mixed: Mixed | None) -> str:
    if mixed is None:
        return "-"
    if mixed.outcome == "wrong" and mixed.differ is not None:
        return f"{100 * mixed.differ / max(1, mixed.elements or 0):.0f} % wrong"
    widened = f", {mixed.dtype}" if mixed.outcome != "refused" and mixed.dtype != "bfloat16" else ""
    return mixed.outcome + widened


def _differ(result: Result, key: str) -> str:
    if key not in result.differ:
        return "-"
    count = f"{result.differ[key]:,}"
    if key not in result.largest_ulp:
        return count
    ulp = result.largest_ulp[key]
    return f"{count} ({'nan' if ulp is None else ulp})"


def batch_text(batch: Batch | None) -> str:
    if batch is None:
        return "-"
    if batch.row_0_changes_at is not None and batch.row_0_changes_at == batch.any_row_changes_at:
        return f"from {batch.row_0_changes_at}"
    if batch.any_row_changes_at is not None:
        return f"from {batch.any_row_changes_at}, row 0 " + (
            "kept" if batch.row_0_changes_at is None else f"from {batch.row_0_changes_at}"
        )
    return "same bits"


def counted(table: Table) -> dict[str, str]:
    """The columns of counts: key in Result.differ, and heading."""
    references = {reference.key: reference.title for reference in OPERATIONS[table.operation].references}
    return {
        **references,
        NEAREST: "exact, nearest",
        "hf_eager": "HF eager",
        **({CPU_BITS: "CPU's, bits"} if on_cuda(table) else {}),
    }


def points_text(points: Points) -> str:
    return ", ".join(point.replace("variance", "var") for point in points) or "-"


def rounds(result: Result, table: Table) -> str:
    if result.nearest_points is None or result.differ[NEAREST] > UNCLEAR * table.elements:
        return "?"
    return points_text(result.nearest_points)


def _has_mixed(table: Table) -> bool:
    return on_cuda(table) and table.dtype == "bfloat16"


def headings(table: Table) -> list[str]:
    counts = [heading.replace(", ", "\n" if key == CPU_BITS else ",\n") for key, heading in counted(table).items()]
    mixed = ["fp32\nweight"] if _has_mixed(table) else []
    return [OPERATIONS[table.operation].title, "rounds", *counts, *mixed, "batch", "time"]


def cells(table: Table) -> list[list[str]]:
    """One list of texts a peer, in the order of `headings`."""
    lines = []
    for result in table.results:
        if result.skipped:
            lines.append([result.label, f"not run: {result.skipped}"])
            continue
        time = "-" if result.relative_time is None else f"{result.relative_time:.2f}"
        counts = [_differ(result, key) for key in counted(table)]
        mixed = [_mixed(result.fp32_weight)] if _has_mixed(table) else []
        lines.append([result.label, rounds(result, table), *counts, *mixed, batch_text(result.batch), time])
    return lines


def title(table: Table) -> str:
    device = f"{table.device.upper()}, " if on_cuda(table) else ""
    size = f"{table.rows} x {table.columns}: of {table.elements:,} elements, differ from"
    return f"{device}{table.dtype}, {table.data}, {size}"


def product_headings(table: ProductTable) -> list[str]:
    return ["product", "batch", "error", "through", *(["read as"] if table.dtype == "float32" else [])]


def product_cells(table: ProductTable) -> list[list[str]]:
    lines = []
    for result in table.results:
        if result.skipped:
            lines.append([result.label, f"not run: {result.skipped}"])
            continue
        error = "nan" if result.relative_error is None else f"{result.relative_error:.1e}"
        read = [result.read_as or "-"] if table.dtype == "float32" else []
        lines.append([result.label, batch_text(result.batch), error, result.through or "-", *read])
    return lines


def product_title(table: ProductTable) -> str:
    device = f"{table.device.upper()}, " if on_cuda(table) else ""
    return f"{device}{table.dtype} product, N x K = {table.n} x {table.k}, fp32 result"


def aligned(head: list[str], lines: list[list[str]], left: int = 2) -> str:
    """Plain text; the first `left` columns to the left, the others to the right. A shorter line ends where it ends."""
    head_lines = [text.split("\n") for text in head]
    depth = max(map(len, head_lines))
    tops = [[""] * (depth - len(parts)) + parts for parts in head_lines]
    rows = [[top[level] for top in tops] for level in range(depth)]
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[i]) for line in rows + full) for i in range(len(head))]
    widths[0] = max([widths[0], *(len(line[0]) for line in lines)])

    def text(line: list[str]) -> str:
        if len(line) != len(head):
            return "  ".join([line[0].ljust(widths[0]), *line[1:]]).rstrip()
        pairs = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in pairs).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*map(text, rows), rule, *map(text, lines)])


def describe(found: list[Found], without_cuda: str | None = None) -> list[str]:
    """One line for each peer: what was found, where it says that it rounds, and what is absent and why."""
    width = max((len(each.peer.name) for each in found), default=0)
    several = len({each.peer.device for each in found}) > 1
    lines = []
    for each in found:
        peer = each.peer
        state = f"absent: {each.absent}" if each.absent else f"{peer.package} {peer.version()}".strip()
        said = {
            OPERATIONS[name].title: points_text(peer.declares[name])
            for name in peer.operations
            if name in peer.declares
        }
        claims = "; ".join(f"{operation} {points}" for operation, points in said.items())
        place = f"{peer.device.ljust(4)}  " if several else ""
        lines.append(f"{peer.name.ljust(width)}  {place}{state}{f' (rounds: {claims})' if claims else ''}")
    if without_cuda is not None:
        lines.append(f"CUDA is left out: {without_cuda}")
    return lines


def notes(report: Report) -> list[str]:
    """What the reader must know besides the tables."""
    lines = list(report.missing)
    lines += [f"absent: {each.peer.label} ({each.absent})" for each in report.found if each.absent and not _cuda(each)]
    reasons: dict[str, list[str]] = {}
    for each in report.found:
        if each.absent and _cuda(each):
            reasons.setdefault(each.absent, []).append(each.peer.label)
    lines += [f"absent on CUDA: {'; '.join(labels)} ({reason})" for reason, labels in reasons.items()]
    for device in dict.fromkeys(table.device for table in report.tables):
        if not any((each.peer.name, each.peer.device, each.absent) == (EAGER, device, None) for each in report.found):
            place = "" if device == "cpu" else f" on {device.upper()}"
            lines.append(f'"from HF eager" is empty{place}: HF eager (torch:hf) was not run')
    return [*lines, *dict.fromkeys(_findings(report))]


def _cuda(each: Found) -> bool:
    return each.peer.device != "cpu"


def _findings(report: Report) -> list[str]:
    """What the tables have no room for."""
    declares = {(each.peer.device, each.peer.name): each.peer.declares for each in report.found}
    lines = []
    for table in report.tables:
        operation, place = OPERATIONS[table.operation].title, f" on {table.device.upper()}" if on_cuda(table) else ""
        for result in table.results:
            if result.rounds_as_declared is False:
                points = points_text(declares[table.device, result.peer][table.operation])
                lines.append(
                    f"{result.label}{place} declares {points} for {operation}, and rounds {rounds(result, table)}"
                )
            if result.fp32_weight is not None and result.fp32_weight.text:
                lines.append(f"{result.label}, {operation}, refuses an fp32 weight: {result.fp32_weight.text}")
            if result.untimed:
                lines.append(f"{result.label}{place}, {operation}, {table.dtype}: no time: {result.untimed}")
    return lines


def header(report: Report) -> str:
    import fusednorm

    path = fusednorm.info()["cpu"]["path"]
    versions = dict.fromkeys(
        f"{each.peer.package} {each.peer.version()}" + _threads(report, each.peer.package)
        for each in report.found
        if each.absent is None and each.peer.package not in ("fusednorm", "numpy")
    )
    ours = f"fusednorm {fusednorm.__version__} ({path}{_threads(report, 'fusednorm', ', ')})"
    devices = report.devices.values()
    return ", ".join([ours, f"numpy {np.__version__}", *versions, *devices, f"--seed {report.options.seed}"])


def _threads(report: Report, package: str, before: str = "") -> str:
    count = report.threads.get(package)
    if count is None:
        return ""
    text = f"{count} thread{'s' if count > 1 else ''}"
    return before + text if before else f" ({text})"


def write_plain(report: Report, stream: TextIO) -> None:
    parts = [header(report)]
    for table in report.tables:
        parts.append(f"{title(table)}\n{aligned(headings(table), cells(table))}")
    for product in report.products:
        parts.append(f"{product_title(product)}\n{aligned(product_headings(product), product_cells(product), 1)}")
    for lines in (legend(report), notes(report)):
        parts.append("\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines))
    stream.write("\n\n".join(part for part in parts if part) + "\n")


def write_rich(report: Report, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    console.print(header(report), style="dim")
    for table in report.tables:
        shown = RichTable(box=box.SIMPLE_HEAD, title=title(table), title_justify="left", pad_edge=False)
        for i, heading in enumerate(headings(table)):
            shown.add_column(heading, justify="left" if i < 2 else "right", vertical="bottom", no_wrap=i == 0)
        for result, line in zip(table.results, cells(table), strict=True):
            styled = [Text(cell) for cell in line]
            for i, key in enumerate(counted(table)):
                if key in result.differ:
                    share = result.differ[key] / max(1, table.elements)
                    styled[2 + i].stylize("green" if share < 1e-3 else "yellow" if share < 1e-2 else "red")
            if result.batch is not None and result.batch.any_row_changes_at is not None:
                styled[-2].stylize("red")
            shown.add_row(*styled)
        console.print(shown)
    for product in report.products:
        shown = RichTable(box=box.SIMPLE_HEAD, title=product_title(product), title_justify="left", pad_edge=False)
        for i, heading in enumerate(product_headings(product)):
            shown.add_column(heading, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for found, line in zip(product.results, product_cells(product), strict=True):
            styled = [Text(cell) for cell in line]
            if found.batch is not None and found.batch.any_row_changes_at is not None:
                styled[1].stylize("red")
            for cell, good in zip(styled[3:], ("-", "fp32")):
                if cell.plain != good:
                    cell.stylize("red")
            shown.add_row(*styled)
        console.print(shown)
    for text in legend(report):
        console.print(text, style="dim")
    for text in notes(report):
        console.print(text, style="yellow")


def write(report: Report, stream: TextIO) -> None:
    if stream.isatty():
        try:
            import rich  # noqa: F401
        except ImportError:
            pass
        else:
            write_rich(report, stream)
            return
    write_plain(report, stream)


def write_json(report: Report, stream: TextIO) -> None:
    json.dump(report.as_json(), stream, indent=1)
    stream.write("\n")
