"""Every schedule of the CUDA kernels gives the CPU's bits: all dtypes, row lengths, batch sizes and options.

Inputs are made, and what the CPU expects is computed and copied to the device, once for all schedules.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import cuda_device
import helpers
import numpy as np
import pytest
from cuda_cases import SCHEDULES, expected_of, make_rows, schedules
from helpers import DTYPES, random_weight, seeded
from test_bits import EPSILONS, NONE_OR_DTYPE, OFFSETS, ROUND_SUMS, SHORT, Case, combination

import fusednorm
from fusednorm import _core

helpers.require_cuda()
pytestmark = pytest.mark.usefixtures("cuda")

IN_USE = (64, 128, 256, 768, 1024, 1536, 2048, 2880, 3072, 3584, 4096, 5120)
IN_USE += (6144, 7168, 8192, 12288, 16384, 28672)
NEAR_POWERS = {2**k + d for k in range(3, 21) for d in (-8, -1, 0, 1, 8) if 0 < 2**k + d <= 2**20}
LENGTHS = sorted({*IN_USE, *NEAR_POWERS} - set(range(71)))  # the short ones have a test of their own
Array = np.ndarray[Any, Any]


def test_names_of_schedules() -> None:
    with pytest.raises(RuntimeError, match="block96") as caught:
        _core._force_cuda_schedule("block96")
    assert all(name in str(caught.value) for name in SCHEDULES)
    assert list(schedules())[1:] == list(SCHEDULES)


@lru_cache(maxsize=48)
def operand(role: str, rows: int, columns: int, dtype: str) -> tuple[Array, Any]:
    """On the host and on the device."""
    rng = seeded("schedules", role, rows, columns, dtype)
    array = random_weight(rng, columns, dtype) if role == "weight" else make_rows(rng, rows, columns, dtype)
    return array, cuda_device.device().put(array)


def forget() -> None:
    operand.cache_clear()


def compare(case: Case, operands: list[tuple[Any, Any]] | None = None) -> None:
    """One case on every schedule. `operands`: x, residual, post and weight on the host and on the device."""
    if operands is None:
        dtypes = {"x": case.x, "residual": case.residual, "post": case.post, "weight": case.weight}
        operands = [
            (None, None) if dtype is None else operand(role, case.rows, case.columns, dtype)
            for role, dtype in dtypes.items()
        ]
    (x, on_x), (residual, on_residual), (post, on_post), (weight, on_weight) = operands
    results = [cuda_device.device().result(e) for e in expected_of(case, x, residual, post, weight)]
    options: dict[str, Any] = {"weight_offset": case.weight_offset, "cast_x_before_out_mul": case.cast}
    in_place = residual is not None and (case.x, case.residual) == (case.out, case.residual_out) and case.hash & 64
    for schedule in schedules():
        if in_place:
            host = cuda_device.device() is cuda_device.Plain
            for result, pair in zip(results, operands):
                result.hold(pair[0 if host else 1])
        else:
            for result in results:
                result.clear()
        out = results[0].array
        if residual is None:
            fusednorm.rms_norm(on_x, on_weight, case.eps, out=out, **options)
        else:
            inputs = (out, results[1].array) if in_place else (on_x, on_residual)
            given = {} if in_place else {"out": out, "residual_out": results[1].array}
            keywords = options | given | {"post_residual_addition": on_post, "round_sum": case.round_sum}
            fusednorm.fused_add_rmsnorm(*inputs, on_weight, case.eps, **keywords)
        for name, result in zip(("out", "residual_out"), results):
            result.check(f"{name} of {case!r}{' in place' if in_place else ''}, {schedule}")


# All dtypes and options


@pytest.mark.parametrize("columns", [1, 13, 72, 256, 1000, 2880, 4096, 7168, 16384])
@pytest.mark.parametrize("x", DTYPES, ids=lambda d: f"x_{SHORT[d]}")
def test_all_dtypes(x: str, columns: int) -> None:
    """Each combination of dtypes once, with eps, offset and roundings in turn."""
    forget()
    rows = min(max(2**16 // columns, 3), 19)
    product = [(w, out, None, None, None) for w, out in itertools.product(NONE_OR_DTYPE, DTYPES)]
    product += itertools.product(NONE_OR_DTYPE, DTYPES, DTYPES, NONE_OR_DTYPE, DTYPES)
    for i, (weight, out, residual, post, residual_out) in enumerate(product):
        eps, offset = EPSILONS[i % 4] if i % 3 else 1e-6, OFFSETS[i % len(OFFSETS)] if weight else 0.0
        round_sum = ROUND_SUMS[(i + i // 9) % 3] if residual else False
        cast = bool((i + i // 2) & 1)
        compare(Case(rows, columns, x, out, weight, residual, residual_out, post, eps, offset, cast, round_sum))


def uniform_cases(rows: int, columns: int) -> list[Case]:
    """The two operations as they are used: one dtype, and 16 bits with an fp32 weight or residual."""
    cases = []
    for x in DTYPES:
        cases.append(Case(rows, columns, x, x, x))
        cases.append(Case(rows, columns, x, x, x, x, x))
        if x != "float32":
            cases.append(Case(rows, columns, x, x, "float32", cast=True))
            cases.append(Case(rows, columns, x, x, x, "float32", "float32", round_sum=True))
    return cases


def mixed_cases(rows: int, columns: int, count: int) -> list[Case]:
    return [combination(rows, columns, seeded("mixed", rows, columns, i)) for i in range(count)]


# Row lengths


@pytest.mark.parametrize("first", range(1, 71, 10))
def test_short_rows(first: int) -> None:
    for columns in range(first, min(first + 10, 71)):
        forget()
        many, few = (int(n) for n in seeded("short", columns).integers((4, 1), (301, 4)))
        for rows in (many, few):
            for case in (*uniform_cases(rows, columns), *mixed_cases(rows, columns, 6)):
                compare(case)


@pytest.mark.parametrize("columns", LENGTHS)
def test_row_lengths(columns: int) -> None:
    forget()
    rows = min(max(2**18 // columns, 2), 259)
    for case in (*uniform_cases(rows, columns), *mixed_cases(rows, columns, 4)):
        compare(case)
    forget()
    for case in uniform_cases(1, columns)[-4:]:
        compare(case)


# Batch sizes


BATCHES = (512, 1024, 4096, 16384)


@pytest.mark.parametrize("fused", [False, True], ids=["norm", "fused"])
@pytest.mark.parametrize(
    "columns, x", [(64, 0), (128, 2), (256, 1), (2048, 2), (2880, 1), (4096, 2), (7168, 2), (16384, 2)]
)
def test_batch_sizes(columns: int, x: int, fused: bool) -> None:
    """Parts of one large batch: a row's bits are the same in each of them."""
    dtype = DTYPES[min(x, len(DTYPES) - 1)]
    most = 2**16 if columns <= 256 else min(16384, 2**26 // columns)
    rng = seeded("batches", columns, fused)
    case = Case(most, columns, dtype, dtype, dtype, dtype if fused else None, dtype if fused else None)
    weight = random_weight(rng, columns, dtype)
    host = [make_rows(rng, most, columns, dtype) for _ in range(1 + fused)]
    put = cuda_device.device().put
    placed, on_weight = [put(array) for array in host], put(weight)
    expected = expected_of(case, host[0], host[1] if fused else None, None, weight)
    sizes = {1, 2, 3, 300, *(int(n) for n in rng.integers(4, 300, 20)), *BATCHES, most}
    for rows in sorted(size for size in sizes if size <= most):
        start = int(rng.integers(most - rows + 1))
        part = slice(start, start + rows)
        results = [cuda_device.device().result(e[part]) for e in expected]
        inputs = [array[part] for array in placed]
        for schedule in schedules():
            for result in results:
                result.clear()
            outputs = dict(zip(("out", "residual_out"), (result.array for result in results)))
            (fusednorm.fused_add_rmsnorm if fused else fusednorm.rms_norm)(*inputs, on_weight, **outputs)
            for name, result in zip(outputs, results):
                result.check(f"{name} of rows {start} to {start + rows} of {case}, {schedule}")
