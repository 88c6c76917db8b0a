"""mm_dtype: where operands and results lie decides no bit, and nothing but the result is written."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, GUARD_BYTES, POISON, assert_same_bits, counting
from mm_cases import COLUMNS, ROWS, case, choice, expected

import fusednorm
from fusednorm import _reference

Array = np.ndarray[Any, Any]

# (dimension that varies fastest, gap between neighbours in elements, bytes more a line, reversed, offset)

LAYOUTS: dict[str, tuple[int, int, int, tuple[int, ...], int]] = {
    "row-major": (1, 0, 0, (), 0),
    "column-major": (0, 0, 0, (), 0),
    "padded rows": (1, 0, 24, (), 0),
    "padded columns": (0, 0, 24, (), 0),
    "gaps": (1, 2, 0, (), 0),
    "column-major gaps": (0, 1, 8, (), 0),
    "rows reversed": (1, 0, 0, (0,), 0),
    "columns reversed": (1, 0, 0, (1,), 0),
    "all reversed": (0, 0, 0, (0, 1), 0),
    "unaligned": (1, 0, 0, (), 1),
    "column-major unaligned": (0, 0, 3, (), 3),
    "odd lines": (1, 1, 5, (0, 1), 2),
}


def place(values: Array, layout: str) -> tuple[Array, Array]:
    """A view that holds the values, and the bytes that it lies in, all others of which are poison."""
    fastest, gap, padding, reverse, offset = LAYOUTS[layout]
    strides = [0, 0]
    strides[fastest] = values.itemsize * (1 + gap)
    strides[1 - fastest] = strides[fastest] * max(1, values.shape[fastest]) + padding
    raw = np.full(strides[1 - fastest] * max(1, values.shape[1 - fastest]) + 2 * GUARD_BYTES, POISON, np.uint8)
    start = GUARD_BYTES + offset
    for axis in reverse:
        start += strides[axis] * (values.shape[axis] - 1)
        strides[axis] = -strides[axis]
    view: Array = np.ndarray(values.shape, values.dtype, raw, start, tuple(strides))
    view[...] = values
    return view, raw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(mm_path: Any, layout: str, dtype: str) -> None:
    for other in LAYOUTS:
        m, n, k = (
            choice(ROWS, layout, other),
            choice(COLUMNS, layout, other),
            choice((1, 16, 39, 64, 1100), layout, other),
        )
        out_layout = choice(tuple(LAYOUTS), "out", layout, other, dtype)
        out_dtype = choice(DTYPES, "out_dtype", layout, other, dtype)
        a, b, bias, wanted = expected(m, n, k, (dtype, DTYPES[-1], out_dtype), "float32", "normal")
        placed, _ = place(a, layout)
        other_placed, _ = place(b, other)
        out, raw = place(np.full(wanted.shape, np.nan, wanted.dtype), out_layout)  # never read
        context = (m, n, k, layout, other, out_layout)
        reversed_bias = np.repeat(bias[::-1], 2)[::2][::-1]
        assert mm_path.mm_dtype(placed, other_placed, bias=reversed_bias, out=out) is out
        assert_same_bits(np.ascontiguousarray(out), wanted, context)
        assert raw.tobytes() == place(wanted, out_layout)[1].tobytes(), f"{context}: bytes around out were written"
        assert_same_bits(np.ascontiguousarray(placed), a, context)
        assert_same_bits(np.ascontiguousarray(other_placed), b, context)


def test_broadcast_operands(mm_path: Any) -> None:
    a, b = case(5, 17, 100, "float32", "float32", "normal")
    for x, y in [
        (np.broadcast_to(a[:1], a.shape), b),
        (np.broadcast_to(a[:, :1], a.shape), b),
        (a, np.broadcast_to(b[:, :1], b.shape)),
        (a, np.broadcast_to(b[:1], b.shape)),
        (np.broadcast_to(a[0, 0], a.shape), np.broadcast_to(b[0, 0], b.shape)),
    ]:
        assert_same_bits(mm_path.mm_dtype(x, y), _reference.mm_dtype(x.copy(), y.copy()))
    bias = np.broadcast_to(np.float32(1.5), 17)
    assert_same_bits(mm_path.mm_dtype(a, b, bias=bias), _reference.mm_dtype(a, b, bias=bias.copy()))
    assert_same_bits(mm_path.mm_dtype(a, a.T), _reference.mm_dtype(a, a.T.copy()), "one array twice")


def test_64_bit_offsets(mm_path: Any) -> None:
    """Rows and columns further apart than 2^32 bytes, or 2^31 elements, forwards and backwards."""
    far = 2**33 + 6
    raw = mm_path.room(4 * far + 4096)
    a, b = case(3, 4, 3, "float32", "float32", "normal")
    wide_a, wide_b = case(3, 4, 40, "float32", "float32", "normal")
    layouts = [(far, 4), (-far, 4), (4, far), (40, -far)]
    for x, y, where in [(a, b, layouts), (wide_a, wide_b, layouts[:2])]:
        wanted = _reference.mm_dtype(x, y)
        for role, shape in (("a", x.shape), ("b", y.T.shape), ("out", wanted.shape)):
            for strides in where:
                start = 1024 + sum(-stride * (n - 1) for n, stride in zip(shape, strides, strict=True) if stride < 0)
                view = mm_path.view(raw, "float32", shape, strides, start)
                if role == "a":
                    mm_path.write(view, x)
                    out = mm_path.mm_dtype(view, y)
                elif role == "b":
                    mm_path.write(view, y.T)
                    out = mm_path.mm_dtype(x, view.T)
                else:
                    mm_path.write(view, np.full_like(wanted, np.nan))
                    out = mm_path.mm_dtype(x, y, out=view)
                    assert out is view
                assert_same_bits(mm_path.read(out), wanted, (role, strides))


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [(2**31 // 70 + 3, 70, 2), (3, 2**31 // 3 + 5, 2), (1, 1, 2**31 + 19)], ids=str)
def test_more_than_2_31_elements(shape: tuple[int, int, int]) -> None:
    """In out, by rows and by columns, and in b; on the path that is taken by itself. The results fill 4 GiB."""
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14 * 2**30:
        pytest.skip("wants a machine of 16 GiB")
    m, n, k = shape
    a, b = case(97, 1, 2, "float32", "float32", "normal")
    with counting(fusednorm.info()["cpu"]["path"]):
        if k > 2:  # an exact sum: a 1 from each chunk of 1024 but the last, of 19 terms, and a 3 at the end
            b = np.zeros((k, 1), np.float16)
            b[:-19:1024], b[-1] = 1, 3
            out = fusednorm.mm_dtype(np.broadcast_to(np.float16(1), (1, k)), b, "float32")
            assert_same_bits(out, np.full((1, 1), 2**21 + 3, np.float32), shape)
            return
        wanted = _reference.mm_dtype(a, b, "float16")
        rows = np.arange(m) % 97
        out = fusednorm.mm_dtype(a[rows], np.broadcast_to(b, (2, n)), "float16")
        step = 97 * 10**5
        for start in range(0, max(m, n), step):
            part = out[start : start + step] if m > n else out[:, start : start + step]
            same = wanted[rows[start : start + step] if m > n else rows]
            assert_same_bits(part, np.broadcast_to(same, part.shape), (shape, start))
