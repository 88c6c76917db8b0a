"""Draws docs/fold.svg: how 20 squares become one total. `python docs/fold.py` writes it anew.

tests/test_reference.py adds numbers along its lines and compares with the reference.
"""

from __future__ import annotations

from pathlib import Path

Levels = list[list[tuple[int, int]]]  # level -> result -> the two terms of the level before that it adds

CELL, GAP, ROW, LEFT, TOP = 30, 8, 62, 118, 34
COLOURS = ("#d7e8f7", "#fbe3c8", "#d9efd3")
PADDING = "#f3f3f3"


def levels(columns: int) -> Levels:
    """From `columns` squares (padded with +0 to a multiple of 8) to group sums (to a power of two) to one total."""
    groups = -(-columns // 8)
    result: Levels = []
    for half in (4, 2, 1):
        result.append([(2 * half * g + i, 2 * half * g + i + half) for g in range(groups) for i in range(half)])
    half = 1 << (groups - 1).bit_length()
    while half > 1:
        half //= 2
        result.append([(i, i + half) for i in range(half)])
    return result


def drawing(columns: int) -> str:
    padded = columns + -columns % 8
    tree = levels(columns)
    centres = [[LEFT + i * CELL + i // 8 * GAP + CELL / 2 for i in range(padded)]]
    for depth, level in enumerate(tree):
        if depth == 3:
            centres[-1] += [centres[-1][-1] + 3 * CELL * (i + 1) for i in range(2 * len(level) - padded // 8)]
        centres.append([(centres[-1][a] + centres[-1][b]) / 2 for a, b in level])
    width, height = LEFT + padded * CELL + padded // 8 * GAP + 8, TOP + len(tree) * ROW + 30
    names = [
        "squares p[i]",
        "p[:4] + p[4:]",
        "a[:2] + a[2:]",
        "group sums g",
        *["by halves"] * (len(tree) - 4),
        "total",
    ]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f"<title>The fold of a row of {columns} squares</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<g font-size="12" text-anchor="middle">',
    ]
    for depth, level in enumerate(tree, 1):
        y = TOP + depth * ROW
        for x, terms in zip(centres[depth], level, strict=False):
            for start in (centres[depth - 1][term] for term in terms):
                lines.append(f'<line x1="{start:g}" y1="{y - ROW + 12}" x2="{x:g}" y2="{y - 12}" stroke="#888888"/>')
    for depth, row in enumerate(centres):
        y = TOP + depth * ROW
        lines.append(f'<text x="8" y="{y + 4}" text-anchor="start">{names[depth]}</text>')
        for i, x in enumerate(row):
            zero = i >= (columns if depth == 0 else padded // 8) and depth in (0, 3)
            label = "+0" if zero else f"{i}" if depth == 0 else f"g{i}" if depth == 3 else "+"
            colour = PADDING if zero else COLOURS[i // (8 >> depth) % 3] if depth <= 3 else "#ffffff"
            box = f'x="{x - 12:g}" y="{y - 12}" width="24" height="24" rx="4"'
            lines.append(f'<rect {box} fill="{colour}" stroke="#444444"/>')
            lines.append(f'<text x="{x:g}" y="{y + 4}">{label}</text>')
    return "\n".join([*lines, "</g>", "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("fold.svg").write_text(drawing(20))
