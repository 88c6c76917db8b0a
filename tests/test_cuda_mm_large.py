"""Products on CUDA with more than 2^31 elements in an operand or in the result.

Rows repeat a tile, whose product is known; every repetition is compared on the device.
"""

from __future__ import annotations

import helpers
import pytest
from test_cuda_mm_rows import dtype_of, encoded, make, product, torch

import fusednorm

pytestmark = [pytest.mark.large, pytest.mark.usefixtures("cuda")]

TILE = 1009
MANY = 2**31 // 64 + 5
CASES = [  # M, N, K; the long side repeats the tile
    pytest.param(MANY, 64, 16, id="out"),
    pytest.param(MANY, 3, 64, id="a"),
    pytest.param(3, MANY, 64, id="b"),
    pytest.param(70, MANY, 16, id="out_by_columns"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("m", "n", "k"), CASES)
def test_more_elements_than_32_bits_count(m: int, n: int, k: int, dtype: str) -> None:
    itemsize = 2 if dtype == "bfloat16" else 4
    needed = 4 * m * n + 2 * itemsize * (m + n) * k + 2**31
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB are free")
    tile, few = make(TILE, k, dtype=dtype, key="tile"), make(min(m, n), k, dtype=dtype, key="few")
    many = tile.repeat(MANY // TILE + 1, 1)[:MANY]
    # b of few columns and of many may be cut into chunks of K otherwise, but K is shorter than any chunk here.
    wanted = product(tile, few.T) if m > n else product(few, tile.T)
    out = torch.empty(m, n, dtype=dtype_of("float32"), device="cuda")
    encoded(out).fill_(-1)
    fusednorm.mm_dtype(*((many, few.T) if m > n else (few, many.T)), out=out)
    step = TILE * (2**26 // (TILE * min(m, n)))
    for start in range(0, MANY, step):
        part = out[start : start + step] if m > n else out[:, start : start + step]
        length = part.shape[0 if m > n else 1]
        repeats = length // TILE + 1
        same = wanted.repeat(repeats, 1)[:length] if m > n else wanted.repeat(1, repeats)[:, :length]
        different = int((encoded(part) != encoded(same)).sum())
        assert different == 0, f"{different} elements differ from {start} on; seed {helpers.SEED}"
        helpers.count_elements(part.numel())
    if m > n:
        for row in (0, MANY // 2, MANY - 1):
            assert torch.equal(encoded(product(many[row : row + 1], few.T)), encoded(out[row : row + 1])), row
    del out, many
    torch.cuda.empty_cache()
