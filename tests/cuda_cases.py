"""What the tests of the CUDA kernels share: schedules, numbers, and what the CPU makes of them.

The CPU computes what is expected, since every CPU path equals the reference (test_bits.py); a sample of it is compared
with the reference here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cuda_device
import helpers
import numpy as np
import pytest
from helpers import assert_same_bits, from_float32, random_rows, seeded
from test_bits import Case

import fusednorm
from fusednorm import _core, _reference

Array = np.ndarray[Any, Any]

SCHEDULES = ("packed", "block64", "block128", "block256", "block512", "cluster2", "cluster4", "cluster8", "strided")


def schedules() -> Iterator[str]:
    """Forces each in turn; first the policy's own choice."""
    for name in (None, *SCHEDULES):
        _core._force_cuda_schedule(name)
        yield name or "the policy's choice"
    _core._force_cuda_schedule(None)


# M, N, K of products of one chain with few tokens, for each kernel that an H200 takes for them; tests/c/mm_policy.c
# says which. No size is whole, the ring goes round, and for the widest so do the units.
FEW_TOKENS = (
    (70, 1001, 2104),
    (190, 2050, 2104),
    (161, 4001, 1104),
    (127, 4095, 1104),
    (99, 6001, 840),
    (101, 8003, 840),
    (99, 10003, 600),
    (350, 4099, 600),
    (99, 14503, 600),
    (231, 10003, 600),
    (201, 8003, 400),
)


def split_kernels() -> list[str]:
    """The names of the kernels of csrc/cuda/mm_split.cuh, if the device has them."""
    if fusednorm.info()["cuda"]["devices"][0]["compute_capability"] != "9.0":
        return []
    source = (Path(__file__).parent.parent / "csrc" / "cuda" / "mm_split.cuh").read_text()
    names = re.findall(r"using fn_split_(\w+) =", source)
    assert len(names) > 10
    return names


def forced_products() -> Iterator[str]:
    """Forces each in turn."""
    for name in split_kernels():
        _core._force_cuda_product(name)
        yield name
    _core._force_cuda_product(None)


def torch_with_cuda() -> Any:
    if not cuda_device.have_torch():
        pytest.skip("needs torch with CUDA")
    import torch

    return torch


# Numbers: short rows of every kind; long ones out of one pool, whose period is no multiple of a row


@cache
def pool(dtype: str) -> Array:
    rng = seeded("pool", dtype)
    f = rng.standard_normal((1024, 4096), np.float32)
    f *= np.ldexp(np.float32(1), rng.integers(-9, 8, (1024, 1))).astype(np.float32)
    tiny = helpers.PRECISION[dtype][1]
    f[::37] *= np.ldexp(np.float32(1), tiny + 4)  # near the smallest normal numbers and below
    f[rng.random(f.shape, np.float32) < 0.002] = -0.0
    return from_float32(f.reshape(-1)[:-5], dtype)


def make_rows(rng: np.random.Generator, rows: int, columns: int, dtype: str) -> Array:
    n = rows * columns
    if n <= 2**14:
        return random_rows(rng, (rows, columns), dtype)
    numbers = pool(dtype)
    flat, filled = np.empty(n, dtype), 0
    start = int(rng.integers(numbers.size))
    while filled < n:
        part = numbers[start : start + n - filled]
        flat[filled : filled + part.size] = part
        filled, start = filled + part.size, 0
    return flat.reshape(rows, columns)


def expected_of(case: Case, *operands: Array | None) -> list[Array]:
    """Both results for x, residual, post and weight, by the CPU."""
    with helpers.counting(fusednorm.info()["cpu"]["path"]):
        return by_the_cpu(case, *operands)


def by_the_cpu(case: Case, x: Any, residual: Any, post: Any, weight: Any) -> list[Array]:
    options: dict[str, Any] = {"weight_offset": case.weight_offset, "cast_x_before_out_mul": case.cast}
    if residual is None:
        expected = [fusednorm.rms_norm(x, weight, case.eps, out_dtype=case.out, **options)]
    else:
        options |= {"post_residual_addition": post, "round_sum": case.round_sum}
        given = {"residual_out": np.empty(x.shape, case.residual_out), "out_dtype": case.out, "inplace": False}
        expected = list(fusednorm.fused_add_rmsnorm(x, residual, weight, case.eps, **given, **options))
    if case.hash % 16 == 0:
        rows = max(1, 2**12 // case.columns)
        x, residual, post = (None if a is None else a[:rows] for a in (x, residual, post))
        if residual is None:
            wanted = [_reference.rms_norm(x, weight, case.eps, out_dtype=case.out, **options)]
        else:
            options |= {"post_residual_addition": post, "residual_out_dtype": case.residual_out, "out_dtype": case.out}
            wanted = list(_reference.fused_add_rmsnorm(x, residual, weight, case.eps, **options))
        for a, e in zip(expected, wanted):
            assert_same_bits(a[:rows], e, case)
    return expected
