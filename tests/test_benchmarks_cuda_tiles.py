"""The benchmark of the kernels for gates, without a GPU: what is forced when, tables, goals. No test sees a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import test_benchmarks_cuda_products as of_products  # skips where there are no benchmarks

from benchmarks import cuda_tiles, run
from benchmarks.cuda_product_cases import ProductCase
from benchmarks.peers import BASE
from benchmarks.product_peers import TORCH

torch = pytest.importorskip("torch")


class Named(of_products.Plain):
    def __init__(self, name: str, rounded: str = "float32") -> None:
        super().__init__(rounded)
        self.name = name


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What was forced, in order."""
    found: list[str | None] = []
    monkeypatch.setattr(cuda_tiles, "force", found.append)
    return found


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kernel: str | None) -> None:
        raise RuntimeError(f'the forced product kernel is "{kernel}": must be one of 64x16_by8, 128x72_by4')

    monkeypatch.setattr(cuda_tiles, "force", refuse)
    assert cuda_tiles.kernels() == ["64x16_by8", "128x72_by4"]


def test_a_kernel_is_forced_while_it_is_captured(forced: list[str | None]) -> None:
    peer = cuda_tiles.ForcedProduct("64x16_by8")
    with peer.mode():
        assert forced == ["64x16_by8"]
    assert forced == ["64x16_by8", None]


def test_cases() -> None:
    found = cuda_tiles.cases(quick=False)
    assert len(found) == len(set(found)) == 5 * len(cuda_tiles.ROWS)
    assert {*cuda_tiles.cases(quick=True)} < {*found}
    assert "cuda_tiles" in run.BENCHMARKS["cuda"]


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "GATES", ((3, 64),))
    monkeypatch.setattr(cuda_tiles, "QUICK_ROWS", (2, 5))
    # The nth contestant takes n microseconds: the chosen kernel 2, the fastest 1.
    peers = [Named("64x16_by8"), Named(BASE), Named("128x72_by4", "bfloat16"), Named(TORCH)]
    report = cuda_tiles.run(True, of_products.HostGpu(), {"gpu": "none"}, lambda *_: None, peers)
    assert [(r["m"], r["median_us"]["64x16_by8"], r["median_us"][BASE]) for r in report.records] == [
        (2, 1, 2),
        (5, 1, 2),
    ]
    assert [r["wrong"] for r in report.records] == [["128x72_by4"]] * 2
    (table,) = report.tables
    assert [row[:2] for row in table.rows] == [["2", "64x16_by8"], ["5", "64x16_by8"]]
    assert table.rows[0][2:] == ["1.00", "2.00", "2.000", "4.00", "2.00"]
    speed, right = report.goals
    assert speed.met is False
    assert right.met is False
    assert "took" in report.head
    assert "64x16_by8" in report.text()


def test_no_kernel_to_force() -> None:
    """As on a GPU that is not of compute capability 9.0."""
    record: dict[str, Any] = {"m": 2, "n": 256, "k": 7168, "median_us": {BASE: 3.0, TORCH: 6.0}, "wrong": []}
    assert cuda_tiles.fastest(record) == BASE
    assert cuda_tiles.of_fastest(record) == 1
    assert math.isnan(cuda_tiles.of_fastest({**record, "median_us": {"64x16_by8": 1.0}}))
    assert ProductCase(cuda_tiles.WARM, 2, 256, 7168, cold=False).n == 256
    assert [goal.met for goal in cuda_tiles.goals([])] == [None, None]
