"""The audit of products: planted faults are found and reported, and what is sound is called so."""

from __future__ import annotations

import sys
import types
from typing import Any

import helpers
import numpy as np
import pytest

from fusednorm import _reference
from fusednorm.audit import product_peers, products, report, run
from fusednorm.audit.operands import Factors, random_factors
from fusednorm.audit.peers import Absent, Peer, registry

SHAPE = (40, 70)


class Planted(Peer):
    """An exact product rounded to fp32, whose faults are given."""

    package = "numpy"
    operations = (products.PRODUCT,)

    def __init__(self, name: str, **faults: Any) -> None:
        self.name = self.label = name
        self.faults = faults

    def mm_dtype(self, a: Any, b: Any) -> Any:
        read = self.faults.get("read", lambda x: x.astype(np.float32))
        with np.errstate(all="ignore"):
            out = (read(a).astype(np.float64) @ read(b).astype(np.float64)).astype(np.float32)
        row, size = self.faults.get("row", 0), self.faults.get("size", len(out) + 1)
        if len(out) >= size:
            out.view(np.int32)[row, 3] += 1
        return self.faults.get("result", lambda x: x)(out)


def to_bits(bits: int) -> Any:
    """To nearest, with so many bits behind the point."""

    def rounded(x: Any) -> Any:
        encodings = np.ascontiguousarray(x.astype(np.float32)).view(np.uint32).astype(np.uint64)
        dropped = np.uint64(23 - bits)
        half = (np.uint64(1) << (dropped - np.uint64(1))) - np.uint64(1) + ((encodings >> dropped) & np.uint64(1))
        return (((encodings + half) >> dropped) << dropped).astype(np.uint32).view(np.float32)

    return rounded


def truncated(x: Any) -> Any:
    return (np.ascontiguousarray(x.astype(np.float32)).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def audited(peers: list[Peer], dtype: str, rows: int = 20, quick: bool = True) -> dict[str, products.ProductResult]:
    factors = random_factors(dtype, rows, SHAPE, seed=3)
    (table,) = products.audit_product(peers, factors, quick, lambda text: None)
    assert (table.device, table.dtype, table.n, table.k) == ("cpu", dtype, *SHAPE)
    return {result.peer: result for result in table.results}


@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_planted_change_of_bits_with_the_batch(dtype: str) -> None:
    peers: list[Peer] = [
        Planted("steady"),
        Planted("row 0 at 8", size=8),
        Planted("row 5 at 9", size=9, row=5),
        Planted("row 0 at 63", size=63),
        Planted("row 0 at 256", size=256),
    ]
    results = audited(peers, dtype)
    changes = {
        name: (result.batch.row_0_changes_at, result.batch.any_row_changes_at)
        for name, result in results.items()
        if result.batch is not None
    }
    assert changes == {
        "steady": (None, None),
        "row 0 at 8": (8, 8),
        "row 5 at 9": (None, 9),
        "row 0 at 63": (63, 63),
        "row 0 at 256": (256, 256),
    }
    texts = {name: report.batch_text(result.batch) for name, result in results.items()}
    assert texts["row 0 at 8"] == "from 8"
    assert texts["row 5 at 9"] == "from 9, row 0 kept"
    assert texts["steady"] == "same bits"


def test_sizes() -> None:
    for quick in (True, False):
        sizes = products.product_sizes(quick)
        assert sizes == sorted(set(sizes))
        assert {*range(1, 65), 128, 256} <= set(sizes)
    assert {512, 1024, 2048, 4096} <= set(products.product_sizes(False))
    assert products.product_dtypes(["bfloat16"]) == ["bfloat16", "float32"]
    assert products.product_dtypes(["float32", "float16"]) == ["float32", "float16"]


@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_planted_results_through_16_bits(dtype: str) -> None:
    def half(x: Any) -> Any:
        return x.astype(np.float16).astype(np.float32)

    results = audited([Planted("sound"), Planted("bf16", result=to_bits(7)), Planted("fp16", result=half)], dtype)
    assert {name: result.through for name, result in results.items()} == {
        "sound": None,
        "bf16": "bfloat16",
        "fp16": "float16",
    }
    errors = {name: result.relative_error or 0 for name, result in results.items()}
    assert 0 < errors["sound"] < 2**-24
    assert 2**-13 < errors["fp16"] < 2**-11
    assert 2**-10 < errors["bf16"] < 2**-8
    one_that_does_not_fit = to_bits(7)(np.ones((4, 4)))
    one_that_does_not_fit[2, 1] += 2.0**-20
    assert products.passed_through(one_that_does_not_fit) is None


READERS = {
    "fp32": lambda x: x.astype(np.float32),
    "TF32": to_bits(10),
    "bfloat16": to_bits(7),
    "float16": lambda x: x.astype(np.float16),
    "15 bits": to_bits(15),
}


@pytest.mark.parametrize("name", READERS)
def test_planted_reading_of_fp32_operands(name: str) -> None:
    result = audited([Planted("peer", read=READERS[name])], "float32")["peer"]
    assert result.read_as == name
    assert result.through is None
    assert result.relative_error is not None
    assert (result.relative_error < 1e-7) == (name == "fp32")
    assert audited([Planted("peer", read=READERS[name])], "float16")["peer"].read_as is None


def test_tf32_by_truncation_and_of_one_operand() -> None:
    class Half(Planted):
        """Only one of the operands is cut."""

        def mm_dtype(self, a: Any, b: Any) -> Any:
            return super().mm_dtype(truncated(a), b) if self.name == "a" else super().mm_dtype(a, truncated(b))

    results = audited([Planted("both", read=truncated), Half("a"), Half("b")], "float32")
    assert {name: result.read_as for name, result in results.items()} == dict.fromkeys(("both", "a", "b"), "TF32")


@pytest.mark.parametrize("shape", [(1, 2), (5, 2), (24, 3), (70, 33)])
def test_probes_are_exact_in_any_order(shape: tuple[int, int]) -> None:
    for factors in products.probes(*shape):
        a, b = factors.arrays["a"], factors.arrays["b"]
        for order in (slice(None), slice(None, None, -1)):
            out = _reference.mm_dtype(a[:, order], b[order])
            results = (out if factors.data == "probe of a" else out.T)[:24]
            assert (results == products.probed()[:, None]).all()


def test_a_peer_that_fails_is_one_line() -> None:
    class Raises(Planted):
        def mm_dtype(self, a: Any, b: Any) -> Any:
            raise RuntimeError("no kernel for this shape\nand more lines")

    class Ends(Raises):
        def healthy(self) -> bool:
            return False

    class Refuses(Raises):
        def refuses(self, operands: Any) -> str | None:
            return "multiples of 64 only"

    narrow = Planted("narrow", result=lambda x: x.astype(np.float16))
    peers = [Raises("raises"), narrow, Refuses("refuses"), Planted("clean"), Ends("ends"), Planted("after")]
    results = audited(peers, "float16")
    assert {name: result.skipped for name, result in results.items()} == {
        "raises": "RuntimeError: no kernel for this shape",
        "narrow": "TypeError: the result is float16 of shape (20, 40)",
        "refuses": "multiples of 64 only",
        "clean": None,
        "ends": "RuntimeError: no kernel for this shape",
        "after": "ends has ended the cpu context: RuntimeError: no kernel for this shape",
    }
    assert results["raises"].batch is None


def test_a_result_that_is_not_finite() -> None:
    results = audited([Planted("nan", result=lambda x: x * np.float32("nan"))], "float32")
    assert results["nan"].relative_error is None
    assert results["nan"].read_as == "0 bits"


@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_ours_is_sound(dtype: str) -> None:
    result = audited([product_peers.OurProduct()], dtype)["fusednorm:mm_dtype"]
    assert result.skipped is None
    assert result.batch is not None
    assert result.batch.any_row_changes_at is None
    assert result.through is None
    assert result.read_as == ("fp32" if dtype == "float32" else None)
    assert result.relative_error is not None
    assert 0 < result.relative_error < 3e-7


def test_torch_and_numpy() -> None:
    pytest.importorskip("torch")
    found = run.find(("numpy:matmul", "torch:mm"))
    assert [each.peer.name for each in found] == ["numpy:matmul", "torch:mm", "torch:mm-float"]
    options = run.Options(dtypes=("float16",), operations=(products.PRODUCT,), products=(SHAPE,), seed=9, quick=True)
    told = run.audit(options, found, lambda done, total, text: None)
    assert told.tables == []
    assert [(table.dtype, table.n, table.k) for table in told.products] == [("float16", *SHAPE), ("float32", *SHAPE)]
    half, full = ({result.peer: result for result in table.results} for table in told.products)
    assert half["torch:mm"].through == "float16"
    assert half["torch:mm-float"].through is half["numpy:matmul"].through is None
    assert full["torch:mm-float"].skipped == "the operands are fp32: as torch.mm"
    assert full["numpy:matmul"].read_as == full["torch:mm"].read_as == "fp32"
    for result in (half["torch:mm-float"], half["numpy:matmul"], full["torch:mm"], full["numpy:matmul"]):
        assert result.relative_error is not None
        assert result.relative_error < 1e-6


# Packages


@pytest.mark.skipif(not helpers.HAVE_BFLOAT16, reason="bf16 needs ml_dtypes")
def test_adapters_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each calls its package in the package's way, with stand-ins on CPU tensors."""
    torch = pytest.importorskip("torch")
    calls: list[str] = []

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules:
            module(parent)

    def persistent(a: Any, b: Any, bias: Any = None) -> Any:
        assert a.dtype == b.dtype
        calls.append("persistent")
        return (a.double() @ b.double()).to(a.dtype)

    def gemm_nt(a: Any, b: Any, d: Any) -> None:
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert d.dtype == torch.float32
        calls.append("gemm_nt")
        d.copy_(a.double() @ b.t().double())

    names = {
        "triton:tml": "batch_invariant_ops.batch_invariant_ops",
        "triton:vllm": "vllm.model_executor.layers.batch_invariant",
        "triton:sglang": "sglang.srt.batch_invariant_ops.batch_invariant_ops",
    }
    for name in names.values():
        module(name, matmul_persistent=persistent)
    module("deep_gemm", bf16_gemm_nt=gemm_nt)
    risky = {peer.name: peer for peer in product_peers.peers() if peer.risky}
    assert set(risky) == {*names, "deepgemm"}
    for name, peer in risky.items():
        peer.device = "cpu"  # the stand-ins' tensors
        peer.load()
        calls.clear()
        products.call_product(peer, random_factors("bfloat16", 4, SHAPE, 1), quick=True)
        assert set(calls) == {"persistent" if name in names else "gemm_nt"}
        result = audited([peer], "bfloat16")[name]
        assert result.skipped is None
        assert result.through == ("bfloat16" if name in names else None)
        full = audited([peer], "float32")[name]
        assert (full.skipped, full.read_as) == ((None, "fp32") if name in names else ("bfloat16 only", None))
    monkeypatch.delattr(sys.modules["deep_gemm"], "bf16_gemm_nt")
    with pytest.raises(Absent, match="has no bf16_gemm_nt"):
        risky["deepgemm"].load()


def test_operands_of_a_cuda_product_are_not_copied_to_another_layout() -> None:
    torch = pytest.importorskip("torch")
    (ours,) = (peer for peer in registry(("cuda",)) if peer.name == "fusednorm:mm_dtype")
    (twin,) = (peer for peer in registry(("cpu",)) if peer.name == "fusednorm:mm_dtype")
    ours.torch, ours.device = torch, "cpu"  # type: ignore[attr-defined]
    for dtype in helpers.DTYPES:
        factors = random_factors(dtype, 3, SHAPE, seed=1)
        arrays = ours.arrays(factors)
        assert arrays["b"].stride() == (1, SHAPE[1])
        out = products.product_of(ours, arrays, (3, SHAPE[0]))
        assert (out == products.product_of(twin, factors.arrays, (3, SHAPE[0]))).all()


def test_factors_are_repeated() -> None:
    factors = random_factors("float32", 3, SHAPE, seed=2)
    more = factors.repeated(7)
    assert isinstance(more, Factors)
    assert (more.rows, more.columns) == (7, SHAPE[0])
    assert (more.arrays["a"][6] == factors.arrays["a"][0]).all()
    assert more.arrays["b"] is factors.arrays["b"]
