"""A row's bits on CUDA depend on the row alone: not on batch, layout, other calls, graphs and streams."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import cuda_device
import helpers
import numpy as np
import pytest
from cuda_cases import SCHEDULES, expected_of, make_rows, schedules, torch_with_cuda
from helpers import DTYPES, from_float32, random_rows, random_weight, seeded
from test_bits import Case

import fusednorm
from fusednorm import _core

helpers.require_cuda()
pytestmark = pytest.mark.usefixtures("cuda")


# Where a row lies


def layouts(torch: Any, rng: np.random.Generator, x: Any) -> Iterator[tuple[str, Any, Any]]:
    """What, the same rows in another place, and which rows they are."""
    rows, columns = x.shape
    yield "the batch", x, slice(None)
    for i in sorted({0, rows // 2, rows - 1}):
        yield f"row {i} alone", x[i : i + 1], slice(i, i + 1)
    for size in sorted({2, 5, rows - 1} & set(range(1, rows))):
        yield f"the last {size} rows", x[rows - size :], slice(rows - size, None)
    order = rng.permutation(rows)
    yield "permuted", x[torch.from_numpy(order).cuda()], order
    yield "every other row", x[::2], slice(None, None, 2)
    for gap in (1, 8):
        wide = x.new_zeros(rows, columns + gap)
        wide[:, :columns] = x
        yield f"{gap} elements between rows", wide[:, :columns], slice(None)
    twice = x.new_zeros(rows, 2 * columns)
    twice[:, 1::2] = x
    yield "every other column", twice[:, 1::2], slice(None)
    yield "transposed", x.T.contiguous().T, slice(None)
    for leading in ((2, rows // 2), (2, 2, rows // 4), (1, 2, 1, rows // 2)):  # that do not merge into one
        count = int(np.prod(leading))
        if count:
            apart = x.new_zeros((*leading[:-1], leading[-1] + 1, columns))[..., :-1, :]
            apart.copy_(x[:count].view(*leading, columns))
            yield f"slabs of {leading}", apart, slice(0, count)
    if rows >= 4:
        half = rows // 2
        order = np.arange(2 * half).reshape(half, 2).T.reshape(-1)
        yield "slabs across", x[: 2 * half].view(half, 2, columns).transpose(0, 1), order
    for shift in (1, 2, 4):
        moved = x.new_zeros(x.numel() + shift)
        moved[shift:] = x.reshape(-1)
        yield f"{shift} elements on", moved[shift:].view(rows, columns), slice(None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, columns", [(37, 64), (19, 111), (300, 128), (40, 4096), (20, 7168), (7, 40000), (3, 2**19)]
)
def test_a_row_keeps_its_bits(rows: int, columns: int, dtype: str) -> None:
    torch = torch_with_cuda()
    rng = seeded("keeps", rows, columns, dtype)
    other = dtype if dtype == "bfloat16" else "float32"
    case = Case(rows, columns, dtype, dtype, dtype, other, other)
    x, residual = make_rows(rng, rows, columns, dtype), make_rows(rng, rows, columns, other)
    weight = random_weight(rng, columns, dtype)
    expected = expected_of(case, x, residual, None, weight)
    placed = [cuda_device.Torch.put(array) for array in (x, residual, weight)]
    # One generator for both, so that they are permuted alike.
    pairs = zip(layouts(torch, seeded(columns), placed[0]), layouts(torch, seeded(columns), placed[1]))
    for (what, on_x, select), (_, on_residual, _) in pairs:
        results = [cuda_device.Torch.result(e[select]) for e in expected]
        out, residual_out = (result.array.view(on_x.shape) for result in results)
        for schedule in schedules():
            for result in results:
                result.clear()
            fusednorm.fused_add_rmsnorm(on_x, on_residual, placed[2], out=out, residual_out=residual_out)
            for result in results:
                result.check(f"{what}, {case}, {schedule}")


@pytest.mark.parametrize("slabs, rows", [(70001, 2), (2, 70001), (66000, 1)])
def test_many_slabs(slabs: int, rows: int) -> None:
    """A grid has at most 65535 blocks in its second dimension."""
    torch_with_cuda()
    dtype, columns = DTYPES[-1], 64
    rng = seeded("slabs", slabs, rows)
    x, weight = make_rows(rng, slabs * (rows + 1), columns, dtype), random_weight(rng, columns, dtype)
    case = Case(slabs * (rows + 1), columns, dtype, dtype, dtype)
    expected = expected_of(case, x, None, None, weight)[0].reshape(slabs, rows + 1, columns)[:, :rows]
    on_x = cuda_device.Torch.put(x).view(slabs, rows + 1, columns)[:, :rows]
    on_weight, result = cuda_device.Torch.put(weight), cuda_device.Torch.result(expected)
    for schedule in schedules():
        result.clear()
        fusednorm.rms_norm(on_x, on_weight, out=result.array)
        result.check(f"{slabs} slabs of {rows} rows, {schedule}")


# When it runs


def chain(x: Any, residual: Any, y: Any, weight: Any, before_each: Any = lambda: None) -> None:
    """Each call reads what the one ahead of it wrote, as its rows or as its weight, and writes what that one read."""
    for _ in range(100):
        before_each()
        fusednorm.fused_add_rmsnorm(x, residual, weight)
        before_each()
        fusednorm.rms_norm(x, residual[0], out=y)
        before_each()
        fusednorm.rms_norm(y, out=x)


@pytest.mark.parametrize(
    "rows, columns", [(1, 4096), (8, 7168), (128, 4096), (1000, 128), (33, 64), (2, 2**16), (5, 1003)]
)
def test_calls_in_a_row(rows: int, columns: int) -> None:
    """A kernel may start before the one ahead of it has ended, and may read nothing of it until then; graphs too."""
    dtype = DTYPES[-1]
    rng = seeded("chain", rows, columns)
    initial = [random_rows(rng, (rows, columns), dtype, "normal") for _ in range(3)]
    weight = from_float32(rng.uniform(0.5, 2, columns), dtype)
    expected = [array.copy() for array in initial]
    with helpers.counting(fusednorm.info()["cpu"]["path"]):
        chain(*expected, weight)
    for array in expected:  # neither drowned in NaN nor worn down to 0
        assert np.isfinite(array.astype(np.float32)).all()
        assert np.mean(array.astype(np.float32) != 0) > 0.9
    device = cuda_device.device()
    placed, on_weight = [device.put(array) for array in initial], device.put(weight)
    results = [device.result(e) for e in expected]
    arrays = [result.array for result in results]

    def begin() -> None:
        for result, source in zip(results, initial if device is cuda_device.Plain else placed):
            result.hold(source)

    def check(how: str) -> None:
        for name, result in zip(("x", "residual", "y"), results):
            result.check(f"{name} after 300 calls, {rows}x{columns}, {how}")

    fusednorm.warmup()
    for schedule in schedules():
        begin()
        chain(*arrays, on_weight)
        check(schedule)
        if device is cuda_device.Torch:
            captured = capture(torch_with_cuda(), lambda: chain(*arrays, on_weight))
            begin()
            captured.replay()
            check(f"{schedule}, in a graph")
    others = itertools.cycle((None, *SCHEDULES))
    begin()
    chain(*arrays, on_weight, lambda: _core._force_cuda_schedule(next(others)))
    check("another schedule for each call")


def capture(torch: Any, calls: Any) -> Any:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph


SOME_SHAPES = ((1, 4096), (3, 64), (33, 7168), (300, 1000), (2, 2**17))


@pytest.mark.parametrize("rows, columns", SOME_SHAPES)
def test_graph_replays(rows: int, columns: int) -> None:
    """A captured call runs again on whatever its inputs hold then."""
    torch = torch_with_cuda()
    fusednorm.warmup()
    dtype = DTYPES[-1]
    case = Case(rows, columns, dtype, dtype, dtype, dtype, dtype)
    rng = seeded("graphs", rows, columns)
    batches = [[make_rows(rng, rows, columns, dtype) for _ in range(2)] for _ in range(3)]
    weight = random_weight(rng, columns, dtype)
    on_weight = cuda_device.Torch.put(weight)
    placed = [[cuda_device.Torch.put(array) for array in pair] for pair in batches]
    results = [[cuda_device.Torch.result(e) for e in expected_of(case, *pair, None, weight)] for pair in batches]
    x, residual = (torch.empty_like(array) for array in placed[0])
    for schedule in schedules():
        out, residual_out = torch.empty_like(x), torch.empty_like(x)
        arguments = {"x": x, "residual": residual, "weight": on_weight, "out": out, "residual_out": residual_out}
        graph = capture(torch, partial(fusednorm.fused_add_rmsnorm, **arguments))
        for i in (0, 1, 2, 0, 2, 1):
            x.copy_(placed[i][0])
            residual.copy_(placed[i][1])
            out.view(torch.int16).fill_(-1)
            graph.replay()
            for result, array in zip(results[i], (out, residual_out)):
                result.hold(array)
                result.check(f"replay with batch {i}, {case}, {schedule}")


@pytest.mark.parametrize("rows, columns", SOME_SHAPES)
def test_two_streams_at_once(rows: int, columns: int) -> None:
    torch = torch_with_cuda()
    dtype = DTYPES[-1]
    case = Case(rows, columns, dtype, dtype, dtype)
    rng = seeded("streams", rows, columns)
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs, weights, results = [], [], []
    for _ in streams:
        x, weight = make_rows(rng, rows, columns, dtype), random_weight(rng, columns, dtype)
        inputs.append(cuda_device.Torch.put(x))
        weights.append(cuda_device.Torch.put(weight))
        expected = expected_of(case, x, None, None, weight)[0]
        results.append([cuda_device.Torch.result(expected) for _ in range(10)])
    for schedule in schedules():
        for result in itertools.chain(*results):
            result.clear()
        torch.cuda.synchronize()
        for i, (stream, x, weight) in itertools.product(range(10), list(zip(streams, inputs, weights))):
            with torch.cuda.stream(stream):
                fusednorm.rms_norm(x, weight, out=results[streams.index(stream)][i].array)
        torch.cuda.synchronize()
        for number, of_stream in enumerate(results):
            for i, result in enumerate(of_stream):
                result.check(f"stream {number}, call {i}, {case}, {schedule}")
