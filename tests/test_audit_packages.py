"""The audit's adapters of kernel packages, called with stand-ins that have the packages' signatures."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import helpers
import pytest

from fusednorm.audit import cuda_peers, measure, torch_peers
from fusednorm.audit.operands import random_operands

FUSED, NORM = measure.OPERATIONS["fused_add_rmsnorm"], measure.OPERATIONS["rms_norm"]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Modules with these packages' functions on CPU tensors. What was called is the fixture's value."""
    torch = pytest.importorskip("torch")
    calls: list[str] = []

    def norm(x: Any, weight: Any, eps: float) -> Any:
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)

    def write(out: Any, value: Any) -> None:
        out.copy_(value)

    def in_place(x: Any, residual: Any, weight: Any, eps: float) -> None:
        s = x.float() + residual.float()
        residual.copy_(s)
        x.copy_(norm(s, weight, eps))

    def log(name: str, function: Any) -> Any:
        def logged(*args: Any, **keywords: Any) -> Any:
            calls.append(name)
            return function(*args, **keywords)

        return logged

    class Flashinfer(types.ModuleType):
        _USE_CUDA_NORM = False
        rmsnorm_cute = get_norm_module = staticmethod(lambda: None)

        def rmsnorm(self, input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: Any = None) -> Any:
            calls.append(f"flashinfer {self._USE_CUDA_NORM}")
            return norm(input, weight, eps)

        def fused_add_rmsnorm(self, input: Any, residual: Any, weight: Any, eps: float = 1e-6) -> None:
            calls.append(f"flashinfer {self._USE_CUDA_NORM}")
            in_place(input, residual, weight, eps)

    def quack(x: Any, weight: Any = None, bias: Any = None, residual: Any = None, out_dtype: Any = None,
              residual_dtype: Any = None, eps: float = 1e-6, prenorm: bool = False) -> Any:  # fmt: skip
        s = x.float() if residual is None else x.float() + residual.float()
        out = norm(s, weight, eps).to(x.dtype)
        return (out, s.to(residual.dtype)) if residual is not None and prenorm else out

    def liger(x: Any, weight: Any, eps: float, offset: float, mode: str, in_place: bool) -> Any:
        assert (offset, mode, in_place) == (0.0, "llama", False)
        return torch_peers.hf_norm(x, weight, eps)

    def liger_fused(x: Any, residual: Any, weight: Any, eps: float, offset: float, mode: str, in_place: bool) -> Any:
        assert (offset, mode, in_place) == (0.0, "llama", False)
        return torch_peers.hf_fused(x, residual, weight, eps)

    def sglang(input: Any, weight: Any, out: Any = None, eps: float = 1e-6) -> None:
        write(out, norm(input, weight, eps))

    def vllm(out: Any, input: Any, weight: Any, epsilon: float) -> None:
        write(out, norm(input, weight, epsilon))

    def vllm_fused(input: Any, residual: Any, weight: Any, epsilon: float) -> None:
        residual.add_(input)
        input.copy_(norm(residual, weight, epsilon))

    def after_variance(x: Any, residual: Any, weight: Any, eps: float) -> None:
        s = x.float() + residual.float()
        residual.copy_(s)
        r = torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)
        x.copy_(residual.float() * weight.float() * r)

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules:
            module(parent)

    module("flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer.norm", Flashinfer("flashinfer.norm"))
    module("quack.rmsnorm", rmsnorm=log("quack", quack))
    module("liger_kernel.ops.rms_norm", LigerRMSNormFunction=types.SimpleNamespace(apply=log("liger", liger)))
    fused = types.SimpleNamespace(apply=log("liger", liger_fused))
    module("liger_kernel.ops.fused_add_rms_norm", LigerFusedAddRMSNormFunction=fused)
    module("vllm._custom_ops", rms_norm=log("vllm", vllm), fused_add_rms_norm=log("vllm", vllm_fused))
    jit = {"rmsnorm": log("sglang", sglang), "fused_add_rmsnorm": log("sglang", after_variance)}
    module("sglang.kernels.ops.layernorm.norm", **jit)
    module("sgl_kernel")
    library = torch.library.Library("sgl_kernel", "DEF")
    library.define("rmsnorm(Tensor(a!) out, Tensor x, Tensor w, float eps, bool pdl) -> ()")
    library.define("fused_add_rmsnorm(Tensor(a!) x, Tensor(b!) residual, Tensor w, float eps, bool pdl) -> ()")
    library.impl("rmsnorm", log("sgl_kernel", lambda out, x, w, eps, pdl: write(out, norm(x, w, eps))), "CPU")
    operator = log("sgl_kernel", lambda x, residual, w, eps, pdl: in_place(x, residual, w, eps))
    library.impl("fused_add_rmsnorm", operator, "CPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    yield calls
    library._destroy()


@pytest.mark.skipif(not helpers.HAVE_BFLOAT16, reason="bf16 needs ml_dtypes")
def test_adapters_of_packages(packages: list[str]) -> None:
    """Each calls its package in the package's way, leaves the operands alone and rounds as it declares."""
    operands = random_operands("bfloat16", 16, 512, seed=13)
    logged = {
        "flashinfer:cute": "flashinfer False",
        "flashinfer:cuda": "flashinfer True",
        "quack": "quack",
        "liger": "liger",
        "vllm": "vllm",
        "sglang:jit": "sglang",
        "sglang:kernel": "sgl_kernel",
    }
    for peer in cuda_peers.peers():
        if not peer.risky:
            continue
        peer.device = "cpu"  # the stand-ins' tensors
        peer.load()
        for operation in (FUSED, NORM):
            packages.clear()
            arrays = peer.arrays(operands)
            kept = {name: a.clone() for name, a in arrays.items()}
            (table,) = measure.audit_operation([peer], operation, operands, 14, True, lambda text: None)
            (result,) = table.results
            assert result.skipped is None, peer.name
            assert result.untimed is None, peer.name
            assert result.rounds_as_declared is True, (peer.name, result.nearest_points)
            assert result.seconds is not None
            assert set(packages) == {logged[peer.name]}
            for name, a in kept.items():
                assert bool((a == arrays[name]).all()), (peer.name, name)
            assert peer.fused_add_rmsnorm(**arrays, eps=1e-6)[1].shape == arrays["x"].shape


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("flashinfer:cute", "rmsnorm_cute"), "its CuTe DSL backend can't be imported"),
        (("flashinfer:cuda", "get_norm_module"), "by FLASHINFER_USE_CUDA_NORM=1 only"),
    ],
)
def test_a_backend_that_is_not_there_is_absent(
    packages: list[str], monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], reason: str
) -> None:
    monkeypatch.delattr(type(sys.modules["flashinfer.norm"]), change[1])
    (peer,) = [peer for peer in cuda_peers.peers() if peer.name == change[0]]
    peer.device = "cpu"
    with pytest.raises(cuda_peers.Absent, match=reason):
        peer.load()
