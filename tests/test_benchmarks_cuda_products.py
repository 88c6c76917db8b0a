"""The benchmark of products on a GPU, without one: its cases, checks, tables and goals. No test looks at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import build_c
import pytest

if not (build_c.ROOT / "benchmarks" / "cuda_products.py").is_file():
    pytest.skip("benchmarks/ is not part of this tree", allow_module_level=True)
if not (build_c.have_compiler() and build_c.have_python_headers()):
    pytest.skip("the benchmarks need a C compiler and Python's headers", allow_module_level=True)
sys.path.insert(0, str(build_c.ROOT))

from benchmarks import cuda_product_cases, cuda_product_peers, cuda_product_tables, cuda_products, run
from benchmarks.cuda_entries import Budget
from benchmarks.cuda_graphs import Chain, Gpu, Timed
from benchmarks.cuda_peers import CONSTANT, CudaPeer
from benchmarks.cuda_product_cases import COLD, DECODE, FP32, PREFILL, WARM, ProductCase
from benchmarks.peers import BASE
from benchmarks.product_peers import TORCH
from benchmarks.report import Goal, Report

L2 = 60 << 20  # more than 50 MiB
QUACK, DEEPGEMM = cuda_product_peers.QUACK, cuda_product_peers.DEEPGEMM


class HostGpu(Gpu):
    """The CPU in its place: a graph is its chain, and the nth contestant takes n microseconds."""

    device = "cpu"
    cache_bytes = 1 << 10

    def l2_bytes(self) -> int:
        return self.cache_bytes

    def synchronize(self) -> None:
        pass

    def capture(self, chain: Chain) -> Any:
        with chain.mode():
            chain.queue()
        return chain

    def replay(self, graph: Any) -> None:
        graph.queue()

    def race(self, chains: Sequence[tuple[Chain, Any]], rounds: int) -> dict[str, Timed]:
        return {chain.name: Timed(chain.name, [number + 1.0] * rounds) for number, (chain, _) in enumerate(chains)}


class Plain(CudaPeer):
    """x times the weight in fp32, through `rounded` on its way."""

    name = "plain"

    def __init__(self, rounded: str = "float32") -> None:
        self.rounded = rounded

    def mm_fp32(self, case: ProductCase, t: Any) -> Any:
        import torch

        def call() -> Any:
            return t.out.copy_((t.x.float() @ t.b.float()).to(getattr(torch, self.rounded)))

        return call


class OtherAlone(cuda_product_peers.OurConstantProduct):
    """Ours, but row 0 alone is another product."""

    def mm_fp32(self, case: ProductCase, t: Any) -> Any:
        if case.m > 1:
            return super().mm_fp32(case, t)
        return lambda: t.out.copy_((t.x.float() @ t.b.float()) * (1 + 2**-20))


def test_cases() -> None:
    found = cuda_product_cases.cases(quick=False)
    assert len(found) == len(set(found)) == 5 * 12 + 5 * 3 + 4 * 5 + 4 * 5 + 2 * 5
    assert {case.dtype for case in found if case.regime == FP32} == {"float32"}
    assert {(case.n, case.cold) for case in found if case.regime == FP32} == {(256, False), (4096, True)}
    assert all(case.cold for case in found if case.regime in (COLD, DECODE, PREFILL))
    assert not any(case.cold for case in found if case.regime == WARM)
    assert {*cuda_product_cases.cases(quick=True)} < {*found}
    assert len(cuda_product_cases.cases(quick=True)) < 20


@pytest.mark.parametrize("regime", cuda_product_cases.REGIMES)
def test_calls_rotate_beyond_the_cache_and_end_in_time(regime: str) -> None:
    for case in cuda_product_cases.cases(quick=False):
        if case.regime == regime:
            check_rotation(case)


def check_rotation(case: ProductCase) -> None:
    weights, inputs = case.weights(L2), case.inputs(L2)
    if case.cold:
        assert weights * case.weight_bytes > 3 * L2
    else:
        assert weights == 1
    assert inputs == 1 or inputs * (case.x_bytes + case.out_bytes) > 3 * L2
    assert (inputs == 1) == (case.x_bytes < 4 << 20)
    sets = max(weights, inputs)
    count = case.count(sets)
    assert count % sets == 0
    memory = weights * case.weight_bytes + inputs * case.x_bytes + sets * case.out_bytes
    assert memory < 8 << 30
    rounds = cuda_products.rounds_of(case, count, quick=False)
    assert 3 * rounds * count * case.guess_us < 0.3e6  # microseconds of a contestant


def small(regime: str = WARM, m: int = 5, dtype: str = "bfloat16", cold: bool = False) -> ProductCase:
    return ProductCase(regime, m, 24, 64, dtype, cold)


def measured(case: ProductCase, peers: list[CudaPeer]) -> dict[str, Any]:
    return cuda_products.measure(case, peers, HostGpu(), Budget(60), quick=True, bandwidth=1000.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cold", [False, True])
def test_a_case_is_measured_and_checked(dtype: str, cold: bool) -> None:
    pytest.importorskip("torch")
    case = small(dtype=dtype, cold=cold)
    r = measured(case, [cuda_product_peers.OurProduct(), Plain(), Plain("bfloat16")][: 2 if dtype == "float32" else 3])
    ours = r["contestants"][BASE]
    assert ours["median_us"] == 1.0
    assert ours["tflop_per_s"] == 2 * 5 * 24 * 64 / 1e6
    assert ours["share_of_floor"] == r["weight_bytes"] / 1000.0
    assert ours["row_bits"] is True
    assert not ours["wrong"]
    assert ours["error"] < 1e-6
    assert (r["sets"] > 1) is cold


def test_a_rounded_result_and_other_row_bits_are_found() -> None:
    pytest.importorskip("torch")
    other = OtherAlone()
    other.load()
    r = measured(small(), [Plain("bfloat16"), other])
    assert r["contestants"]["plain"]["wrong"]
    assert r["contestants"]["plain"]["row_bits"] is None
    assert r["contestants"][CONSTANT]["row_bits"] is False
    assert not r["contestants"][CONSTANT]["wrong"]


def test_an_element_that_is_not_written_is_found() -> None:
    torch = pytest.importorskip("torch")
    case = small()
    (tensors,) = cuda_product_cases.make_sets(case, 0, "cpu")
    truth = cuda_product_cases.expected(case, tensors)
    exact = tensors.x.double() @ tensors.b.double()
    tensors.out.copy_(exact)
    assert truth.error(tensors.out) < 1e-6
    assert truth.error(tensors.out[:4]) == math.inf
    assert truth.error(tensors.out[:, :-1]) == math.inf
    tensors.out[2, 7] = math.nan
    assert truth.error(tensors.out) == math.inf
    truth.restore(tensors)
    assert torch.isnan(tensors.out).all()


def test_who_raises_is_absent_with_the_reason() -> None:
    pytest.importorskip("torch")

    class Broken(Plain):
        name = "broken"

        def mm_fp32(self, case: ProductCase, t: Any) -> Any:
            raise RuntimeError("no such kernel")

    class Narrow(Plain):
        name = "narrow"

        def supports(self, case: Any) -> str:
            return "at most 4 rows"

    class Compiler(Plain):
        name, compiles_each_shape = "compiler", True

    r = measured(small(), [Broken(), Narrow(), Compiler(), Plain()])
    assert list(r["contestants"]) == ["plain"]
    assert r["absent"]["broken"] == "RuntimeError: no such kernel"
    assert r["absent"]["narrow"] == "at most 4 rows"
    assert "few" in r["absent"]["compiler"]


def test_compilers_take_few_cases() -> None:
    taken = [case for case in cuda_product_cases.cases(quick=False) if case.for_compilers]
    assert {case.regime for case in taken} == {WARM, COLD, DECODE}
    assert len({(case.n, case.k) for case in taken}) == 5
    assert {case.m for case in taken} == {1, 8, 16, 64}


def test_host_times() -> None:
    pytest.importorskip("torch")
    absent: dict[str, str] = {}
    peers = [cuda_product_peers.OurProduct(), Plain()]
    found = cuda_products.host_times(peers, HostGpu(), 2, absent, small(m=1))
    assert not absent
    assert [r["contestant"] for r in found] == [BASE, "plain"]
    assert all(r["best_us"] > 0 for r in found)


def test_copy_bandwidth() -> None:
    pytest.importorskip("torch")
    assert cuda_products.copy_bandwidth(HostGpu(), 3, 1 << 12) == 2 * (1 << 12)


def fake(case: ProductCase, error: float = 1e-7, row_bits: bool = True, **times: float) -> dict[str, Any]:
    """What `record` makes, from microseconds by contestant; * in a name: its result is wrong."""
    names = {"ours": BASE, "constant": CONSTANT, "torch": TORCH, "quack": QUACK, "deepgemm": DEEPGEMM, "other": "other"}
    contestants = {
        names[name.rstrip("_")]: {
            "median_us": us,
            "tflop_per_s": case.flop / us / 1e6,
            "share_of_floor": 0.5,
            "error": error,
            "wrong": name.endswith("_"),
            "row_bits": row_bits if name in ("ours", "constant") else None,
        }
        for name, us in times.items()
    }
    keys = {"regime": case.regime, "dtype": case.dtype, "cold": case.cold, "m": case.m, "n": case.n, "k": case.k}
    return {**keys, "contestants": contestants}


def goal(found: list[Goal], *words: str) -> Goal:
    (one,) = [g for g in found if all(word in g.text for word in words)]
    return one


def test_tables() -> None:
    records = [
        fake(ProductCase(WARM, 16, 256, 7168, cold=False), ours=2.0, constant=1.5, torch=5.0, other=3.0),
        fake(ProductCase(WARM, 64, 256, 7168, cold=False), ours=4.0, constant=3.0, torch=5.0, quack_=1.0),
        fake(ProductCase(DECODE, 1, 4096, 4096), ours=10.0, torch=12.0, deepgemm=11.0),
        fake(ProductCase(PREFILL, 4096, 4096, 4096), ours=200.0, torch=250.0, quack=220.0),
    ]
    names = [BASE, CONSTANT, TORCH, QUACK, DEEPGEMM, "other"]
    warm, decode, prefill = cuda_product_tables.tables(records, names)
    for table in (warm, decode, prefill):
        assert all(len(row) == len(table.columns) for row in table.rows)
    first, second = (dict(zip(warm.columns, row)) for row in warm.rows)
    assert (first["best peer"], first["x best"], first[f"x {TORCH}"]) == ("other", "1.500", "2.500")
    assert (second["best peer"], second[QUACK], second["other"]) == (TORCH, "1.00!", "-")
    assert "of floor" not in warm.columns
    assert dict(zip(decode.columns, decode.rows[0]))["of floor"] == "0.500"
    cells = dict(zip(prefill.columns, prefill.rows[0]))
    assert (cells[BASE], cells["best peer"], cells["x best"]) == ("687", QUACK, "1.100")
    (errors,) = cuda_product_tables.error_tables(records, names)
    assert dict(zip(errors.columns, errors.rows[0]))[QUACK] == "1.0e-07, 1 WRONG"
    host = [{"host_call": "256 x 7168, M 1", "contestant": BASE, "median_us": 2.0, "best_us": 1.9, "ours": True}]
    text = Report("p", {"a": "b"}, tables=[warm, errors, *cuda_product_tables.host_table(host)]).text()
    assert "router gates, warm weight; bfloat16; microseconds" in text
    assert "Host time of a call, 256 x 7168, M 1" in text


def test_goals_that_are_met() -> None:
    records = [
        fake(ProductCase(WARM, 8, 256, 7168, cold=False), ours=3.0, constant=2.9, torch=5.0),
        fake(ProductCase(WARM, 16, 128, 4096, cold=False), ours=2.5, constant=2.4, torch=2.5),
        fake(ProductCase(WARM, 128, 256, 7168, cold=False), ours=5.0, constant=5.0, torch=5.0, other=1.0),
        fake(ProductCase(COLD, 64, 384, 7168), ours=3.6, constant=3.5, torch=3.0),
        fake(ProductCase(DECODE, 64, 4096, 4096), ours=11.0, constant=11.0, torch=12.0, deepgemm=11.0, other=9.0),
        fake(ProductCase(PREFILL, 1024, 4096, 4096), ours=100.0, torch=95.0, deepgemm=50.0),
        fake(ProductCase(PREFILL, 4096, 4096, 4096), ours=100.0, torch=120.0, quack=110.0),
        fake(ProductCase(PREFILL, 128, 4096, 4096), ours=100.0, torch=10.0),
    ]
    host = [{"contestant": BASE, "median_us": 2.0}, {"contestant": TORCH, "median_us": 14.0}]
    found = cuda_product_tables.goals(records, host)
    unmet = [g.text for g in found if g.met is not True]
    not_there = (f"{COLD}, M 1 to 16", f"{COLD}, 128 x 4096")
    assert [text for text in unmet if not any(word in text for word in not_there)] == []
    assert len(unmet) == 4


def test_goals_that_are_missed_name_the_worst() -> None:
    records = [
        fake(ProductCase(WARM, 16, 256, 7168, cold=False), error=6e-7, ours=5.0, constant=1.0, torch=5.5, other=4.0),
        fake(ProductCase(WARM, 1024, 128, 4096, cold=False), row_bits=False, ours=5.0, torch=4.0),
        fake(ProductCase(DECODE, 1, 8192, 8192), ours=12.0, torch=13.0, deepgemm=11.0),
        fake(ProductCase(PREFILL, 1024, 8192, 8192), ours=100.0, torch=92.0),
        fake(ProductCase(PREFILL, 4096, 8192, 8192), ours=100.0, torch=120.0, quack=119.0),
        fake(ProductCase(FP32, 1, 256, 7168, "float32", False), error=1e-3, ours_=1.0, torch=2.0),
    ]
    host = [{"contestant": BASE, "median_us": 15.0}, {"contestant": TORCH, "median_us": 14.0}]
    found = cuda_product_tables.goals(records, host)
    few = goal(found, f"{BASE}: {WARM}, M 1 to 16")
    assert few.met is False
    assert any("0.800  256 x 7168, M 16, other" in line for line in few.lines())
    assert goal(found, f"{CONSTANT}: {WARM}, M 1 to 16").met is True
    assert goal(found, f"{BASE}: {WARM}, K 7168").met is False
    assert goal(found, f"{WARM}, M 128").met is False
    decode = goal(found, f"{BASE}: {DECODE}")
    assert any(f"0.917  8192 x 8192, M 1, {DEEPGEMM}" in line for line in decode.lines())
    assert goal(found, "geometric mean").met is True
    assert goal(found, "0.93 everywhere").met is False
    assert goal(found, "relative error").met is False
    assert goal(found, "host time").met is False
    bits = goal(found, "row 0")
    assert (bits.met, bits.figures) == (False, [f"{BASE}, bfloat16, 128 x 4096, M 1024"])
    wrong = goal(found, "every result")
    assert wrong.met is False
    assert wrong.figures == [f"{BASE}, float32, 256 x 7168, M 1: error 1.0e-03"]


def test_nothing_measured_is_said() -> None:
    assert {g.met for g in cuda_product_tables.goals([], [])} == {None}


def test_run_writes_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(cuda_products, "cases", lambda quick: [small(), small(COLD, 1, cold=True)])
    monkeypatch.setattr(cuda_products, "HOST_CASE", small(m=1))
    monkeypatch.setattr(cuda_products, "copy_bandwidth", lambda gpu: 4e6)
    peers: list[CudaPeer] = [cuda_product_peers.OurProduct(), Plain()]
    report = cuda_products.run(peers, True, 60.0, HostGpu(), {"command": "-"}, lambda done, total, text: None)
    assert "stopped" not in report.head
    assert report.head["device copy"] == "4.00 TB/s, read and written together"
    text, json_file = report.write(tmp_path, True)
    assert "x best" in text.read_text()
    assert '"copy_bytes_per_us": 4000000.0' in json_file.read_text()
    assert len(report.records) == 1 + 2 + 2


def test_peers_of_a_file_take_part(tmp_path: Path) -> None:
    class Norm(CudaPeer):
        name = "norm alone"

    names = [peer.name for peer in cuda_product_peers.product_registry([Norm(), Plain()])]
    assert names == [BASE, CONSTANT, TORCH, "plain"]
    options = run.parse_arguments([str(tmp_path), "--device", "cuda", "--only", "cuda_products", "--seconds", "60"])
    assert options.only == ("cuda_products",)
