"""The benchmark of products: what its contestants compute, and the arithmetic of its table. No test looks at a time."""

from __future__ import annotations

import math
import sys
from typing import Any

import build_c
import helpers
import numpy as np
import pytest

if not (build_c.ROOT / "benchmarks" / "products.py").is_file():
    pytest.skip("benchmarks/ is not part of this tree", allow_module_level=True)
if not (build_c.have_compiler() and build_c.have_python_headers()):
    pytest.skip("the benchmarks need a C compiler and Python's headers", allow_module_level=True)
sys.path.insert(0, str(build_c.ROOT))

from benchmarks import product_cases, product_peers, products, run
from benchmarks.report import Report
from benchmarks.timing import Contestant


def present() -> list[Any]:
    return run.present(product_peers.product_registry([]))[0]


@pytest.mark.parametrize("dtype", helpers.DTYPES)
@pytest.mark.parametrize("layout", product_cases.LAYOUTS)
def test_contestants_multiply(layout: str, dtype: str) -> None:
    """On whole numbers, whose products and sums every dtype of a result holds: no order of additions differs."""
    case = product_cases.ProductCase(dtype, 3, 20, 70, 1, layout)
    operands = product_peers.ProductOperands(case)
    assert operands.weight.shape == (20, 70)
    assert operands.weight.flags.c_contiguous == (layout == "N x K")
    rng = helpers.seeded("benchmark", dtype)
    operands.a[...] = rng.integers(-1, 2, operands.a.shape).astype(operands.a.dtype)
    operands.weight[...] = rng.integers(-1, 2, operands.weight.shape).astype(operands.weight.dtype)
    expected = operands.a.astype(np.float32) @ operands.weight.astype(np.float32).T
    multiplied = 0
    for peer in present():
        call = peer.prepare(case, operands)
        if call is None:
            assert dtype == "float32"
            continue
        if peer.name == product_peers.READ:
            continue
        for out in operands.out.values():
            out.fill(99)
        call()
        assert any((out.astype(np.float32) == expected).all() for out in operands.out.values()), peer.name
        multiplied += 1
    assert multiplied >= (1 if dtype == "float32" else 2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_read_reads_every_byte(threads: int) -> None:
    read = product_peers.read_module().read
    for size in (0, 1, 63, 64, 256, 257, 1000, 4096 * 3):
        memory = np.zeros(size + 1, np.uint8)
        assert read(memory.ctypes.data, size, threads) == 0
        for place in {0, size // 2, size - 1} & set(range(size)):
            memory[place] = 1
            assert read(memory.ctypes.data, size, threads) != 0
            memory[place] = 0
        memory[size] = 1
        assert read(memory.ctypes.data, size, threads) == 0


def contestant(name: str, *times: float) -> Contestant:
    made = Contestant(name, lambda calls: math.nan)
    made.times = list(times)
    return made


@pytest.mark.skipif(not helpers.HAVE_BFLOAT16, reason="bf16 needs ml_dtypes")
def test_table_and_goals() -> None:
    """Ratios are taken within a turn; a goal that is missed is named."""
    names = (product_peers.READ, product_peers.OURS, product_peers.OURS_ROUNDED, product_peers.TORCH)
    records = []
    for m, factor in ((1, 3.0), (16, 0.25)):
        case = product_cases.ProductCase("bfloat16", m, 256, 7168, 2)
        turns = {
            names[0]: (1000.0, 2000.0, 3000.0),
            names[1]: (2000.0, 4000.0, 6000.0),
            names[2]: (4000.0, 8000.0, 12000.0),
            names[3]: (2000.0 * factor, 4000.0 * factor, 6000.0 * factor),
        }
        shown = names if m == 1 else names[1:]
        records.append(products.record(case, {name: contestant(name, *turns[name]) for name in shown}))
    first, second = records
    assert (first["times_torch"], first["times_torch_rounded"], first["share_of_read"]) == (3.0, 1.5, 0.5)
    assert second["times_torch"] == 0.25
    assert math.isnan(second["share_of_read"])
    assert math.isnan(first["times_torch_fp32"])
    assert first["weight_gb_per_s"] == 256 * 7168 * 2 / 4000.0
    (table,) = products.tables(records, list(names))
    assert len(table.rows) == 2
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert dict(zip(table.columns, table.rows[0]))["of read"] == "0.50"
    assert dict(zip(table.columns, table.rows[1]))["x torch.mm"] == "0.25"
    assert "x torch.mm, fp32 weight" not in table.columns
    fp32, bf16 = products.goals(records)
    assert (fp32.met, bf16.met) == (None, False)
    assert any("0.25  bfloat16, 256 x 7168, M 16, 2 threads" in line for line in bf16.lines())
    assert "bfloat16; 2 threads; weight in memory N x K" in Report("products", {"command": "-"}, tables=[table]).text()


def test_cases() -> None:
    cases = product_cases.product_cases((1, 2), ("float32", "float16", "bfloat16"), quick=False)
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 3 * 3
    assert {(case.n, case.k) for case in cases} == {(256, 7168), (128, 4096), (4096, 4096)}
    assert {case.m for case in cases} == {1, 16, 256}
    assert {case.n for case in product_cases.product_cases((1,), ("float32",), quick=True)} == {256}
    case = product_cases.ProductCase("bfloat16", 3, 20, 70, 1)
    assert case.outputs == ("float32", "bfloat16")
    assert case.text() == "bfloat16, 20 x 70, M 3, 1 thread"
    assert (
        product_cases.ProductCase("float32", 3, 20, 70, 2, "K x N").text()
        == "float32, 20 x 70 as K x N, M 3, 2 threads"
    )
