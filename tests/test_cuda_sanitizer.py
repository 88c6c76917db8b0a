"""A short tour of the CUDA kernels for compute-sanitizer; without it, a test like the others.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -m sanitizer tests/test_cuda_sanitizer.py

and with racecheck, initcheck and synccheck. Nothing here goes through torch or its allocator: each array has an
allocation of its own that ends with its last element, and every byte that a kernel may read has been written.
"""

from __future__ import annotations

import ctypes
from typing import Any

import cuda_arrays
import helpers
import numpy as np
import pytest
from cuda_cases import FEW_TOKENS, SCHEDULES, expected_of, forced_products
from helpers import DTYPES, POISON, assert_same_bits, random_rows, random_weight, seeded
from test_bits import Case

import fusednorm
from fusednorm import _core

helpers.require_cuda()
pytestmark = [pytest.mark.sanitizer, pytest.mark.usefixtures("cuda")]

HALF = DTYPES[-1]
SHAPES = ((70, 8), (37, 64), (3, 100), (5, 1024), (2, 2880), (2, 4096), (2, 7168), (2, 16384), (1, 65536))
Array = np.ndarray[Any, Any]


def laid_out(values: Array, kind: str) -> Array:
    """The values in a buffer that ends where their last element does."""
    itemsize = values.itemsize
    step = {"every other": 2 * itemsize, "backwards": -itemsize}.get(kind, itemsize)
    length = abs(step) * (values.shape[-1] - 1) + itemsize
    row = length + (3 * itemsize if kind == "gap" else 0)
    strides = (row, step)[-values.ndim :]
    offset = {"an element on": itemsize, "a byte on": 1, "backwards": length - itemsize}.get(kind, 0)
    above = (len(values) - 1) * row if values.ndim == 2 else 0
    end = offset + above + (itemsize if kind == "backwards" else length)
    view = np.ndarray(values.shape, values.dtype, np.full(end, POISON, np.uint8), offset, strides)
    view[...] = values
    return view


def run(case: Case, kind: str = "dense", in_place: bool = False, stream: int | None = None) -> None:
    rng = seeded("sanitizer", case, kind)
    shape = (case.rows, case.columns)
    names = {"x": case.x, "residual": case.residual, "post_residual_addition": case.post, "weight": case.weight}
    host: dict[str, Array] = {}
    for name, dtype in names.items():
        if dtype is not None:
            make = random_weight(rng, shape[1], dtype) if name == "weight" else random_rows(rng, shape, dtype, "normal")
            host[name] = laid_out(make, kind)
    expected = expected_of(case, *(host.get(name) for name in names))
    arrays = {name: cuda_arrays.to_device({"": array})[""] for name, array in host.items()}
    outputs = dict(zip(("out", "residual_out"), expected))
    if in_place:
        results = dict(zip(outputs, (arrays[name] for name in ("x", "residual") if name in arrays)))
    else:
        results = {
            name: cuda_arrays.to_device({"": laid_out(np.zeros_like(e), kind)})[""] for name, e in outputs.items()
        }
    options: dict[str, Any] = {"weight_offset": case.weight_offset, "cast_x_before_out_mul": case.cast}
    if case.residual is None:
        fusednorm.rms_norm(**arrays, **options, out=results["out"], eps=case.eps, stream=stream)
    else:
        options |= {"round_sum": case.round_sum, "eps": case.eps, "stream": stream}
        fusednorm.fused_add_rmsnorm(**arrays, **options, **({} if in_place else results))
    for name, e in outputs.items():
        assert_same_bits(np.array(results[name].download(), order="C"), e, f"{name} of {case}, {kind}")


def cases(rows: int, columns: int) -> list[Case]:
    return [
        Case(rows, columns, HALF, HALF, HALF),
        Case(rows, columns, HALF, HALF, HALF, HALF, HALF),
        Case(rows, columns, "float16", "float16", "float32", "float32", "float32", "float16", round_sum=True),
        Case(rows, columns, "float32", HALF, None, "float16", "float32", cast=True, round_sum="after_variance"),
    ]


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_schedules(schedule: str | None) -> None:
    _core._force_cuda_schedule(schedule)
    for shape in SHAPES:
        for case in cases(*shape):
            run(case)
            if (case.x, case.residual) == (case.out, case.residual_out):
                run(case, in_place=True)


@pytest.mark.parametrize("kind", ["an element on", "a byte on", "gap", "every other", "backwards"])
def test_layouts(kind: str) -> None:
    for schedule in (None, "packed", "block256", "strided"):
        _core._force_cuda_schedule(schedule)
        for shape in ((3, 64), (2, 100), (2, 4096), (1, 7168)):
            for case in cases(*shape)[1:]:
                run(case, kind)
            run(cases(*shape)[1], kind, in_place=True)


def test_graph() -> None:
    """A chain in which each call reads what the one ahead of it writes, on a stream of its own, captured."""
    driver = cuda_arrays.memory()
    if not isinstance(driver, cuda_arrays.Driver):
        pytest.skip("needs the CUDA driver")
    fusednorm.warmup()
    driver.enter()
    stream, graph, runnable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    driver.call("cuStreamCreate", ctypes.byref(stream), 1)  # one that does not wait for the default stream
    for columns in (64, 4096, 16384):
        rng = seeded("graph", columns)
        x, residual = (random_rows(rng, (3, columns), HALF, "normal") for _ in range(2))
        weight = random_weight(rng, columns, HALF)
        on_x, on_residual, on_weight = (cuda_arrays.to_device({"": a.copy()})[""] for a in (x, residual, weight))
        calls = 4
        driver.enter()
        driver.call("cuStreamBeginCapture_v2", stream, 1)  # 1: calls that may not be captured fail in this thread alone
        for _ in range(calls):
            fusednorm.fused_add_rmsnorm(on_x, on_residual, on_weight, stream=stream.value)
        driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        driver.call("cuGraphInstantiateWithFlags", ctypes.byref(runnable), graph, ctypes.c_ulonglong(0))
        for _ in range(2):
            driver.call("cuGraphLaunch", runnable, stream)
        with helpers.counting(fusednorm.info()["cpu"]["path"]):
            for _ in range(2 * calls):
                fusednorm.fused_add_rmsnorm(x, residual, weight)
        assert_same_bits(on_x.download(), x, f"x after {2 * calls} calls at {columns}")
        assert_same_bits(on_residual.download(), residual, f"residual after {2 * calls} calls at {columns}")
        driver.call("cuGraphExecDestroy", runnable)
        driver.call("cuGraphDestroy", graph)
    driver.call("cuStreamDestroy_v2", stream)


# M, N, K: a few rows and many; few columns and many; one chunk of K and several parts, which clusters share in every
# way of theirs; whole vectors and none.
PRODUCTS = [(m, n, k) for m in (1, 9, 40, 140) for n, k in ((48, 1100), (24, 40), (520, 200))]
PRODUCTS += [(8, 256, 2048), (1, 30, 2880), (130, 200, 1032), (300, 600, 264), (3, 1, 1001), (2, 5, 0)]
PRODUCTS += [(40, 64, 2112), (70, 128, 320), (70, 256, 320), (70, 512, 320), (260, 512, 320), (2100, 40, 320)]
# Of csrc/cuda/mm_few.cuh: one, two and four tokens by two and four weights; chunks that are short, or absent.
PRODUCTS += [(2, 9, 2056), (4, 256, 2880), (3, 31, 520), (1, 300, 4096), (2, 301, 1096)]
PRODUCTS += [(4100, 16, 320), (3000, 130, 320), (9000, 40, 320)]
# Of each kernel of csrc/cuda/mm_split.cuh: the ring goes round, or does not; tiles are whole, or are not.
FORCED = [(140, 200, 2112), (70, 40, 5000), (300, 256, 320)]


def multiply(a_dtype: str, b_dtype: str, kind: str, m: int, n: int, k: int, *what: Any) -> None:
    rng = seeded("products", m, n, k)
    a, b, bias = (
        (rng.integers(1, 9, shape) * rng.choice([-1, 1], shape)).astype(np.float32).astype(dtype)
        for shape, dtype in (((m, k), a_dtype), ((n, k), b_dtype), ((n,), "float32"))
    )
    wanted = (a.astype(np.float64) @ b.T.astype(np.float64) + bias).astype(np.float32)
    placed = {"a": a, "b": b, "bias": bias, "out": np.zeros_like(wanted)}
    on = {name: cuda_arrays.to_device({"": laid_out(v, kind) if v.size else v})[""] for name, v in placed.items()}
    fusednorm.mm_dtype(on["a"], on["b"].T, bias=on["bias"], out=on["out"])
    assert_same_bits(np.array(on["out"].download(), order="C"), wanted, (m, n, k, kind, *what))


@pytest.mark.parametrize("kind", ["dense", "an element on", "gap", "every other"])
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(HALF, HALF), ("float16", "float16"), ("float32", HALF)])
def test_products(a_dtype: str, b_dtype: str, kind: str) -> None:
    for m, n, k in PRODUCTS if kind == "dense" else PRODUCTS[::3]:
        multiply(a_dtype, b_dtype, kind, m, n, k)


# Of csrc/cuda/mm_fma_few.cu: one chunk and several, by blocks, by clusters and in turns; tiles of weights and of tokens
# that are whole and that are not.
FEW = [
    (1, 9, 8),
    (2, 16, 1000),
    (3, 40, 1032),
    (4, 33, 2880),
    (7, 20, 4096),
    (8, 300, 2056),
    (9, 17, 9216),
    (16, 256, 7168),
]
FEW += [(1, 1700, 2056), (5, 3200, 1032), (16, 3200, 1032), (1, 20, 66560), (40, 8, 1032)]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("a_dtype", DTYPES)
def test_few_tokens(a_dtype: str, constant: bool) -> None:
    with fusednorm.weights_are_constant(constant):
        for m, n, k in FEW:
            multiply(a_dtype, "float32", "dense", m, n, k, "constant" if constant else "")


# Of csrc/cuda/mm_fma_many_sm90a.cu: tiles by clusters and by blocks alone, whole and not; more than fit at once.
# racecheck follows every read of shared memory: of the products that take several rounds of a cluster there is one.
MANY = [(17, 256, 2056), (20, 40, 72), (70, 130, 1032), (100, 90, 2064), (600, 520, 40), (33, 700, 264)]
ROUNDS = (250, 250, 2064)


@pytest.mark.parametrize("a_dtype", DTYPES)
def test_many_rows(a_dtype: str) -> None:
    for m, n, k in [*MANY, ROUNDS] if a_dtype == "float32" else MANY:
        multiply(a_dtype, "float32", "dense", m, n, k)


@pytest.mark.parametrize("dtype", [HALF, "float16"])
def test_forced_products(dtype: str) -> None:
    for kernel in forced_products():
        for m, n, k in FORCED:
            multiply(dtype, dtype, "dense", m, n, k, kernel)


@pytest.mark.parametrize("dtype", [HALF, "float16"])
def test_products_of_few_tokens(dtype: str) -> None:
    for m, n, k in FEW_TOKENS:
        multiply(dtype, dtype, "dense", m, n, k)
