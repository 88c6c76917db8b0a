"""Any offset, stride, direction, broadcast, alignment and number of dimensions gives the bits of the contiguous copy.

The bytes between and around the elements are poisoned: reading one gives wrong bits, writing one is found.
"""

from __future__ import annotations

import itertools
import os
import platform
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import DTYPES, GUARD_BYTES, POISON, assert_same_bits, poisoned, random_rows, random_weight, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from fusednorm import _reference


class Layout(NamedTuple):
    strides: tuple[int, ...]  # bytes
    offset: int  # of the element at index 0, ..., 0
    nbytes: int


def layout(shape: tuple[int, ...], itemsize: int, strides: tuple[int, ...], offset: int) -> Layout:
    """Room for the strides, guards on both sides, and `offset` bytes more before the first element."""
    reach = [(n - 1) * stride if n else 0 for n, stride in zip(shape, strides)]
    below = -sum(r for r in reach if r < 0)
    above = sum(r for r in reach if r > 0) + itemsize
    return Layout(strides, GUARD_BYTES + below + offset, GUARD_BYTES + below + offset + above + GUARD_BYTES)


class Placed:
    """An array in a layout, in a buffer of its own; `values` is the contiguous copy of what an input holds."""

    def __init__(self, path: Any, dtype: str, shape: tuple[int, ...], where: Layout, values: Any = None) -> None:
        self.path, self.dtype, self.shape, self.where = path, dtype, shape, where
        self.before = np.full(where.nbytes, POISON, np.uint8)
        if values is not None:
            self.of(self.before)[...] = values
        self.values = np.array(self.of(self.before), order="C")
        self.raw = path.array(self.before.copy())
        self.view = path.view(self.raw, dtype, shape, where.strides, where.offset)

    def of(self, raw: Any) -> Any:
        return np.ndarray(self.shape, self.dtype, raw, self.where.offset, self.where.strides)

    def assert_untouched(self, context: object) -> None:
        changed = np.flatnonzero(self.path.numpy(self.raw) != self.before)
        assert not changed.size, f"{context}: bytes {changed[:8]} were written; {self.where}"

    def assert_holds(self, expected: Any, context: object) -> None:
        actual = np.array(self.of(self.path.numpy(self.raw)), order="C")
        assert_same_bits(actual, expected, f"{context} in {self.where}")
        self.of(self.before)[...] = actual
        self.assert_untouched(f"{context}, beside its elements")


def values(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    if name == "weight":
        return random_weight(rng, shape[-1], dtype)
    return random_rows(rng, shape, dtype, None if rng.random() < 0.3 else "normal")


INPUTS = ("x", "residual", "post_residual_addition", "weight")
OUTPUTS = ("out", "residual_out")


def run(path: Any, arrays: dict[str, Placed], context: object, **options: Any) -> None:
    """The operation on the views against the reference on the contiguous copies."""
    views = {name: array.view for name, array in arrays.items()}
    copies = {name: array.values for name, array in arrays.items() if name in INPUTS}
    options["out_dtype"] = arrays["out"].dtype
    if "residual" in arrays:
        dtypes = {"out_dtype": arrays["out"].dtype, "residual_out_dtype": arrays["residual_out"].dtype}
        expected = _reference.fused_add_rmsnorm(**copies, **{**options, **dtypes})
        actual = path.fused_add_rmsnorm(**views, **{**options, "out_dtype": None})
        assert actual[0] is views["out"]
        assert actual[1] is views["residual_out"]
    else:
        expected = (_reference.rms_norm(**copies, **options),)
        assert path.rms_norm(**views, **{**options, "out_dtype": None}) is views["out"]
    for name, result in zip(OUTPUTS, expected):
        arrays[name].assert_holds(result, f"{name}, {context}")
    for name in copies:
        arrays[name].assert_untouched(f"{name}, {context}")


# Every layout of a matrix, for each operand in turn, the others contiguous


def matrix_strides(kind: str, rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    row_kind, column_kind = kind.split("/")
    if row_kind == "transposed":
        row = {"unit": itemsize, "backwards": -itemsize, "odd": itemsize + 1}.get(column_kind, 2 * itemsize)
        return row, 0 if column_kind == "broadcast" else abs(row) * max(rows, 1)
    column = {"unit": itemsize, "step": 2 * itemsize, "backwards": -itemsize, "odd": 5, "broadcast": 0}[column_kind]
    extent = abs(column) * max(columns - 1, 0) + itemsize
    return {"dense": extent, "gap": extent + 3 * itemsize, "backwards": -extent, "odd": extent + 1, "broadcast": 0}[
        row_kind
    ], column


ROW_KINDS = ("dense", "gap", "backwards", "odd", "broadcast", "transposed")
COLUMN_KINDS = ("unit", "step", "backwards", "odd", "broadcast")
SHAPES = ((3, 16), (1, 16), (3, 1), (0, 16), (1, 1), (5, 65), (2, 300))


@pytest.mark.parametrize("operand", [*INPUTS, *OUTPUTS])
def test_each_operand_in_each_layout(path: Any, operand: str) -> None:
    rng = seeded("each operand", operand)
    kinds = [f"{r}/{c}" for r, c in itertools.product(ROW_KINDS, COLUMN_KINDS)]
    for i, (kind, offset, shape) in enumerate(itertools.product(kinds, (0, 1, 2, 4), SHAPES)):
        if operand in OUTPUTS and "broadcast" in kind:
            continue
        arrays = {}
        fused = operand not in ("x", "weight", "out") or i % 2 == 0
        dtypes = DTYPES if i % 3 else DTYPES[i // 3 % len(DTYPES) :][:1]
        for name in (*INPUTS, *OUTPUTS) if fused else ("x", "weight", "out"):
            dtype = dtypes[rng.integers(len(dtypes))]
            itemsize = np.dtype(dtype).itemsize
            own = shape[1:] if name == "weight" else shape
            if name != operand:
                strides = (itemsize * shape[1], itemsize)[-len(own) :]
                where = layout(own, itemsize, strides, 0)
            else:
                if "odd" in kind.split("/")[1] and itemsize == 4:
                    dtype = "float16"  # elements of 4 bytes at a stride of 5 leave one byte between them, of 2 bytes 3
                    itemsize = 2
                strides = matrix_strides(kind, *shape, itemsize)[-len(own) :]
                where = layout(own, itemsize, strides, offset)
            arrays[name] = Placed(path, dtype, own, where, values(rng, name, own, dtype) if name in INPUTS else None)
        run(path, arrays, f"{operand} {kind} at byte {offset}, {shape}")


# Any layouts together


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    leading = draw(st.lists(st.sampled_from((1, 2, 3, 1, 2, 3, 0)), max_size=5))
    return (*leading, draw(st.sampled_from((1, 2, 5, 8, 9, 16, 17, 64, 70, 131))))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], itemsize: int, is_output: bool) -> Layout:
    """Axes nested in any order with gaps of any number of bytes; inputs may be broadcast along any of them."""
    extent, strides = itemsize, [0] * len(shape)
    for axis in draw(st.permutations(range(len(shape)))):
        if shape[axis] <= 1:
            strides[axis] = draw(st.sampled_from((0, 1, itemsize, -8, 2**40, -(2**62))))  # never used
        elif is_output or draw(st.integers(0, 5)):
            stride = extent + draw(st.sampled_from((0, 0, 0, 1, 2, 3, itemsize, 8, 61)))
            extent += stride * (shape[axis] - 1)
            strides[axis] = draw(st.sampled_from((stride, -stride)))
    return layout(shape, itemsize, tuple(strides), draw(st.integers(0, 9)))


@settings(max_examples=250)
@given(data=st.data())
def test_any_layouts(path: Any, data: st.DataObject) -> None:
    shape, fused = data.draw(shapes(), "shape"), data.draw(st.booleans(), "fused")
    names = [name for name in (*INPUTS, *OUTPUTS) if fused or name in ("x", "weight", "out")]
    for optional in ("post_residual_addition", "weight"):
        if optional in names and data.draw(st.integers(0, 3)) == 0:
            names.remove(optional)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "values"))
    arrays = {}
    dtypes = data.draw(st.sampled_from((DTYPES, *((dtype,) for dtype in DTYPES))), "dtypes")
    for name in names:
        dtype = data.draw(st.sampled_from(dtypes), f"dtype of {name}")
        own = shape[-1:] if name == "weight" else shape
        where = data.draw(layouts(own, np.dtype(dtype).itemsize, name in OUTPUTS), name)
        arrays[name] = Placed(path, dtype, own, where, values(rng, name, own, dtype) if name in INPUTS else None)
    options: dict[str, Any] = {"cast_x_before_out_mul": data.draw(st.booleans(), "cast")}
    if fused:
        options["round_sum"] = data.draw(st.sampled_from((False, True, "after_variance")), "round_sum")
    run(path, arrays, shape, **options)


def test_64_bit_offsets(path: Any) -> None:
    """Rows, columns and a leading dimension further apart than 2^32 bytes, forwards and backwards."""
    far = 2**32 + 6
    raw = path.room(3 * far)
    rng = seeded("64 bits")
    for shape, strides in (((3, 5), (far, 4)), ((3, 5), (-far, 4)), ((5, 3), (4, far)), ((2, 3, 5), (20, far, -4))):
        x = random_rows(rng, shape, "float32", "normal")
        start = sum(-stride * (n - 1) for n, stride in zip(shape, strides) if stride < 0)
        view = path.view(raw, "float32", shape, strides, start)
        path.write(view, x)
        expected = _reference.rms_norm(x)
        assert_same_bits(path.numpy(path.rms_norm(view)), expected, f"x {strides}")
        out = path.view(raw, "float32", shape, strides, start + 1024)
        assert path.rms_norm(path.array(x), out=out) is out
        assert_same_bits(path.read(out), expected, f"out {strides}")


@pytest.mark.parametrize(
    "columns, shifts, source, target",
    [
        (64, (0, 0), "float32", "float16"),
        (64, (2, 2), DTYPES[-1], DTYPES[-1]),
        (1000, (0, 6), DTYPES[-1], DTYPES[-1]),
        (1000, (6, 1), "float32", DTYPES[-1]),
        (1000, (4, 0), "float16", "float32"),
        (4099, (0, 0), DTYPES[-1], DTYPES[-1]),
        (4099, (2, 4), "float32", "float16"),
    ],
)
def test_results_larger_than_the_cache(
    cpu_path: Any, columns: int, shifts: tuple[int, int], source: str, target: str
) -> None:
    """Where stores may go past the cache: 16 rows, repeated by a stride of 0 until the call moves more.

    The two outputs begin at their own distances from a line of the cache.
    """
    level3 = 194  # glibc's _SC_LEVEL3_CACHE_SIZE, which Python has no name for
    cache = os.sysconf(level3) if platform.libc_ver()[0] == "glibc" else 0
    itemsizes = [np.dtype(dtype).itemsize for dtype in (source, target)]
    repeats = max(cache, 2**25) // (columns * 16 * (3 * itemsizes[0] + 2 * itemsizes[1])) + 2
    if 2 * repeats * columns * 16 * itemsizes[1] > 2**30:
        pytest.skip(f"a cache of {cache} bytes is too large to outgrow")
    rng = seeded("larger than the cache", columns, source, target)
    rows = [random_rows(rng, (16, columns), source) for _ in range(3)]
    x, residual, post = (np.broadcast_to(a, (repeats, *a.shape)) for a in rows)
    weight = random_weight(rng, columns, source)
    outputs = []
    for shift in shifts:
        raw = np.full(repeats * 16 * columns * itemsizes[1] + 256, POISON, np.uint8)
        start = 64 + shift + -raw.ctypes.data % 64
        outputs.append((raw, start, np.ndarray((repeats, 16, columns), target, raw, start)))
    options = {"post_residual_addition": post, "out": outputs[0][2], "residual_out": outputs[1][2]}
    cpu_path.fused_add_rmsnorm(x, residual, weight, **options)
    dtypes = {"out_dtype": target, "residual_out_dtype": target}
    expected = _reference.fused_add_rmsnorm(rows[0], rows[1], weight, post_residual_addition=rows[2], **dtypes)
    for (raw, start, actual), result in zip(outputs, expected):
        assert_same_bits(actual, np.broadcast_to(result, actual.shape), f"{repeats} x 16 x {columns}")
        assert all((edge == POISON).all() for edge in (raw[:start], raw[start + actual.nbytes :]))


# What NumPy's users have


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_fields(path: Any, dtype: str) -> None:
    rng = seeded("bytes", dtype)
    x, weight = random_rows(rng, (4, 40), dtype), random_weight(rng, 40, dtype)
    expected = _reference.rms_norm(x, weight)
    for shift in range(1, 8):  # bytes objects are read-only; np.frombuffer takes any offset into them
        held = np.frombuffer(b"\xa5" * shift + x.tobytes(), np.uint8)
        misaligned = path.view(path.array(held), dtype, x.shape, x.strides, shift)
        assert_same_bits(path.numpy(path.rms_norm(misaligned, path.array(weight))), expected, f"byte {shift}")
    itemsize = x.dtype.itemsize
    record = np.dtype({"names": ["value"], "formats": [dtype], "offsets": [1], "itemsize": 5})
    records = np.zeros(x.shape, record)
    field = np.ndarray(x.shape, dtype, records, 1, records.strides)  # records["value"]; bfloat16 has no such field
    assert field.strides[1] == 5
    assert itemsize <= 4
    field[...] = x
    assert_same_bits(path.numpy(path.rms_norm(path.array(field), path.array(weight))), expected, "a field")


def test_broadcast_and_transposed(path: Any) -> None:
    rng = seeded("broadcast")
    row, square = random_rows(rng, (1, 48), "float16", "normal"), random_rows(rng, (48, 48), "float32", "normal")
    many = np.broadcast_to(row, (2, 3, 48))
    assert_same_bits(path.numpy(path.rms_norm(path.array(many))), _reference.rms_norm(many.copy()))
    one = np.broadcast_to(np.float32(0.5), (48,))
    result = path.numpy(path.rms_norm(path.array(square.T), path.array(one)))
    assert_same_bits(result, _reference.rms_norm(square.T.copy(), one.copy()))
    ndim6 = square.reshape(2, 3, 2, 4, 6, 8).transpose(3, 0, 5, 2, 1, 4)[:, ::-1]
    assert_same_bits(path.numpy(path.rms_norm(path.array(ndim6))), _reference.rms_norm(ndim6.copy()))
    result = path.numpy(path.rms_norm(path.array(square.T)))
    assert result.flags.c_contiguous
    assert result.flags.owndata


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 0, 1), (3, 1, 0, 7)])
def test_no_rows(path: Any, shape: tuple[int, ...]) -> None:
    ones = np.ones(shape, np.float32)
    held, raw = poisoned(shape, "float16")
    x, residual, weight, out = map(path.array, (ones, ones.copy(), np.ones(shape[-1], np.float32), held))
    assert path.rms_norm(x, out=out) is out
    assert path.rms_norm(x).shape == shape
    results = path.fused_add_rmsnorm(x, residual, weight, inplace=False, out_dtype="float16")
    assert [(r.shape, r.dtype) for r in results] == [(shape, np.float16), (shape, np.float32)]
    path.numpy(out)
    assert (raw == POISON).all()
    wide = np.lib.stride_tricks.as_strided(ones, shape, (2**62,) * len(shape))  # no element is ever addressed
    assert path.rms_norm(path.array(wide)).shape == shape


# Overlap is decided by elements, not by the range of addresses


def interleaved() -> dict[str, tuple[Any, Any]]:
    def buffer(*shape: int) -> Any:
        return random_rows(seeded("interleaved", shape), shape, "float16", "normal")

    half, columns, pairs, every = buffer(6, 32), buffer(6, 32), buffer(4, 5, 6), buffer(2, 3, 30)
    return {
        "left and right half": (half[:, :16], half[:, 16:]),
        "right and left half": (half[:, 16:], half[:, :16]),
        "even and odd columns": (columns[..., 0::2], columns[..., 1::2]),
        "odd columns backwards": (columns[..., 0::2], columns[..., ::-2]),
        "even and odd rows": (half[0::2], half[1::2]),
        "rows backwards": (half[0::2], half[::-2]),
        "slabs of 3-D": (pairs[:, :2], pairs[:, 2:4]),
        "rows within slabs": (pairs[:, 0::2][:, :2], pairs[:, 1::2]),
        "thirds of columns": (every[..., 0::3], every[..., 1::3]),
        "transposed halves": (half.T[:16], half.T[16:]),
        "a row and its neighbour": (half[2], half[3]),
        "halves of each dimension": (pairs[:2, :2, :3], pairs[2:, 3:, 3:]),
    }


@pytest.mark.parametrize("name", interleaved())
def test_interleaved_views_are_accepted(core_path: Any, name: str) -> None:
    for source, target in ((0, 1), (1, 0)):
        views = interleaved()[name]
        kept = views[source].copy()
        arrays = core_path.together({"x": views[source], "out": views[target]})
        assert core_path.rms_norm(**arrays) is arrays["out"]
        assert_same_bits(core_path.numpy(arrays["out"]).copy(), _reference.rms_norm(kept), name)
        assert_same_bits(core_path.numpy(arrays["x"]).copy(), kept, f"x, {name}")
        views = interleaved()[name]
        expected = _reference.fused_add_rmsnorm(*(view.copy() for view in views))
        arrays = core_path.together(dict(zip(("x", "residual"), views)))
        core_path.fused_add_rmsnorm(**arrays)
        for actual, result in zip(arrays.values(), expected):
            assert_same_bits(core_path.numpy(actual).copy(), result, f"in place, {name}")


def element_bytes(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, itemsize: int) -> Any:
    """The number of every byte of every element; one occurs twice where elements overlap."""
    starts = np.full((), offset)
    for n, stride in zip(shape, strides):
        starts = starts[..., None] + np.arange(n) * stride
    return (starts[..., None] + np.arange(itemsize)).ravel()


def nested(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Each stride steps over all that the smaller ones span: what an output of the package has to look like."""
    spanned = itemsize
    for stride, n in sorted((abs(stride), n) for n, stride in zip(shape, strides) if n > 1):
        if stride < spanned:
            return False
        spanned += stride * (n - 1)
    return True


@settings(max_examples=400)
@given(data=st.data())
def test_every_overlap_is_refused(core_path: Any, data: st.DataObject) -> None:
    """Two views of one small buffer at any byte strides, judged against the sets of their bytes."""
    shape = data.draw(st.sampled_from([(4,), (2, 3), (3, 2), (3, 4), (2, 2, 2), (1, 5)]), "shape")
    pairs = [("float32", "float32"), ("float32", "float16"), ("float16", "float16")]
    dtypes = data.draw(st.sampled_from(pairs), "dtypes")
    room, places = 160, []
    regular = data.draw(st.booleans(), "regular")
    for dtype in dtypes:
        itemsize = np.dtype(dtype).itemsize
        strides = tuple((itemsize if regular else 1) * data.draw(st.integers(-9, 9)) for _ in shape)
        reach = [(n - 1) * stride for n, stride in zip(shape, strides)]
        below, above = -sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + itemsize
        places.append((strides, data.draw(st.integers(below, max(below, room - above)))))
    before = np.resize(np.arange(1, 100, dtype=np.float16), 512).view(np.uint8).copy()
    expected = _reference.rms_norm(
        np.ndarray(shape, dtypes[0], before, places[0][1], places[0][0]).copy(), out_dtype=dtypes[1]
    )
    raw = core_path.array(before.copy())
    x, out = (core_path.view(raw, dtype, shape, *place) for dtype, place in zip(dtypes, places))
    x_bytes, out_bytes = (element_bytes(shape, *place, np.dtype(d).itemsize) for d, place in zip(dtypes, places))
    steps = [[stride for n, stride in zip(shape, strides) if n > 1] + [offset] for strides, offset in places]
    exactly_x = dtypes[0] == dtypes[1] and steps[0] == steps[1]
    shared = not exactly_x and np.intersect1d(x_bytes, out_bytes).size > 0
    in_order = nested(shape, places[1][0], np.dtype(dtypes[1]).itemsize)
    assert np.unique(out_bytes).size == out_bytes.size or not in_order
    refused = ""
    try:
        core_path.rms_norm(x, out=out)
    except ValueError as error:
        refused = str(error)
    assert bool(refused) == (shared or not in_order), refused
    after = core_path.numpy(raw)
    if refused:
        assert "out" in refused
        assert after.tobytes() == before.tobytes(), "an error, and yet something was written"
        return
    assert_same_bits(core_path.numpy(out).copy(), expected, f"{places}")
    after[out_bytes] = before[out_bytes]
    assert after.tobytes() == before.tobytes()
