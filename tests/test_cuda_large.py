"""More than 2^31 and 2^32 elements in one array: every offset that is not 64 bits wide is wrong somewhere here.

The rows repeat a tile, so that the CPU computes the tile alone, and each repetition is compared on the device.
"""

from __future__ import annotations

import itertools
from typing import Any

import cuda_device
import helpers
import numpy as np
import pytest
from cuda_cases import expected_of, make_rows, schedules, torch_with_cuda
from helpers import DTYPES, assert_same_bits, random_weight, seeded
from test_bits import Case

import fusednorm
from fusednorm import _reference

helpers.require_cuda()
pytestmark = [pytest.mark.large, pytest.mark.usefixtures("cuda")]

HALF = DTYPES[-1]
SHAPES = [  # slabs, rows in a slab, columns, x, residual
    pytest.param(1, 2**31 // 64 + 37, 64, HALF, None, id="many_short_rows"),
    pytest.param(3, 2**31 // 3 // 2880 + 37, 2880, HALF, None, id="slabs_apart"),
    pytest.param(1, 2**31 // 4096 + 37, 4096, HALF, "float32", id="mixed"),
    pytest.param(1, 2**32 // 4096 + 37, 4096, HALF, HALF, id="more_than_2_32"),
    pytest.param(1, 2**31 // 28672 + 37, 28672, "float32", None, id="long_rows"),
    pytest.param(1, 2**31 + 37, 1, HALF, None, id="rows_of_one"),
]


def repeated(torch: Any, tile: Any, slabs: int, rows: int) -> Any:
    """Slabs that begin with the tile's first row each, and one row apart where there are several."""
    shape = (slabs, rows + (slabs > 1), tile.shape[1])
    whole = torch.empty(shape, dtype=tile.dtype, device=tile.device)[:, :rows]
    for slab in whole:
        for start in range(0, rows, len(tile)):
            part = slab[start : start + len(tile)]
            part.copy_(tile[: len(part)])
    return whole


def integers(torch: Any, array: Any) -> Any:
    return array.view(torch.int32 if array.element_size() == 4 else torch.int16)


def compare(torch: Any, actual: Any, expected: Any, on_device: Any, context: str) -> None:
    """Every row with the tile's; `expected` on the host is for the message."""
    tile = len(expected)
    for slab, start in itertools.product(actual, range(0, actual.shape[1], tile)):
        part = slab[start : start + tile]
        if not torch.equal(integers(torch, part), integers(torch, on_device[: len(part)])):
            found = part.cpu().view(torch.uint8).numpy().reshape(-1).view(expected.dtype).reshape(part.shape)
            assert_same_bits(found, expected[: len(part)], f"{context}, in the rows from {start}")
        else:
            helpers.count_elements(part.numel())


@pytest.mark.parametrize("slabs, rows, columns, dtype, residual_dtype", SHAPES)
def test_more_elements_than_32_bits_count(
    slabs: int, rows: int, columns: int, dtype: str, residual_dtype: str | None
) -> None:
    torch = torch_with_cuda()
    case = Case(slabs * rows, columns, dtype, dtype, dtype, residual_dtype, residual_dtype)
    dtypes = [name for name in (dtype, residual_dtype) if name]
    needed = sum(2 * slabs * (rows + 1) * columns * np.dtype(name).itemsize for name in dtypes) + 2**31
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB are free")
    rng = seeded("large", rows, columns)
    tile_rows = 2**24 // columns + 3
    tiles = [make_rows(rng, tile_rows, columns, name) for name in dtypes]
    weight = random_weight(rng, columns, dtype)
    expected = expected_of(case, tiles[0], tiles[1] if residual_dtype else None, None, weight)
    put = cuda_device.Torch.put
    inputs = [repeated(torch, put(tile), slabs, rows) for tile in tiles]
    results = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in inputs]
    on_device, on_weight = [put(e) for e in expected], put(weight)
    names = ("out", "residual_out")[: len(results)]
    norm = fusednorm.fused_add_rmsnorm if residual_dtype else fusednorm.rms_norm
    # A grid has at most 2^31 - 1 blocks; forced schedules have nothing to add to that.
    for schedule in itertools.islice(schedules(), 1 if columns == 1 else None):
        for result in results:
            integers(torch, result).fill_(-1)
        norm(*inputs, on_weight, **dict(zip(names, results)))
        for name, result, e, on in zip(names, results, expected, on_device):
            compare(torch, result, e, on, f"{name}, {case}, {schedule}")
    last = (rows - 1) % tile_rows
    row = [tile[last : last + 1] for tile in tiles]
    wanted: Any = _reference.fused_add_rmsnorm(*row, weight) if residual_dtype else [_reference.rms_norm(*row, weight)]
    for result, e in zip(results, wanted):
        found = result[-1, -1:].cpu().view(torch.uint8).numpy().reshape(-1).view(e.dtype).reshape(e.shape)
        assert_same_bits(found, e, f"the last row, {case}")
    del inputs, results, on_device
    torch.cuda.empty_cache()
