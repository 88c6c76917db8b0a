"""RMSNorms that need PyTorch. torch and transformers are imported when such a peer is loaded, not before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from .operands import Operands
from .peers import Absent, Peer, absent_package

PROBE_SECONDS = 120


def hf_norm(s: Any, weight: Any, eps: float) -> Any:
    """LlamaRMSNorm.forward's arithmetic, operation by operation."""
    import torch

    dtype = s.dtype
    s = s.to(torch.float32)
    variance = s.pow(2).mean(-1, keepdim=True)
    return weight * (s * torch.rsqrt(variance + eps)).to(dtype)


def hf_fused(x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
    """As in LlamaDecoderLayer.forward: the addition gives a tensor of the model's dtype."""
    s = residual + x
    return hf_norm(s, weight, eps), s


class TorchPeer(Peer):
    package = "torch"

    def load(self) -> None:
        try:
            import torch
        except Exception as error:  # an installation that is broken in whatever way
            raise Absent(f"import torch failed: {error}") from error
        self.torch = torch

    def arrays(self, operands: Operands) -> dict[str, Any]:
        return {name: self.tensor(a) for name, a in operands.arrays.items()}

    def tensor(self, a: npt.NDArray[Any]) -> Any:
        if a.dtype.name == "bfloat16":
            return self.torch.from_numpy(a.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(a)

    def to_numpy(self, array: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        array = array.detach().cpu()
        if array.dtype == self.torch.bfloat16:
            result: npt.NDArray[Any] = array.view(self.torch.int16).numpy().view(dtype)
        else:
            result = array.numpy()
        return result

    def threads(self) -> int | None:
        return int(self.torch.get_num_threads())

    def set_threads(self, threads: int) -> None:
        self.torch.set_num_threads(threads)


class Eager(TorchPeer):
    name = "torch:hf"
    label = "HF eager, as in transformers"

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return hf_norm(x, weight, eps)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        return hf_fused(x, residual, weight, eps)


class EagerFp32Sum(Eager):
    name = "torch:hf-fp32-sum"
    label = "HF eager, sum kept in fp32"
    operations = ("fused_add_rmsnorm",)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        s = x.float() + residual.float()
        variance = s.pow(2).mean(-1, keepdim=True)
        return weight * (s * self.torch.rsqrt(variance + eps)).to(x.dtype), s.to(x.dtype)


class Transformers(TorchPeer):
    name = "transformers"
    label = "transformers LlamaRMSNorm"
    package = "transformers"

    def available(self) -> str | None:
        return absent_package("transformers") or absent_package("torch")

    def load(self) -> None:
        super().load()
        try:
            from transformers.models.llama.modeling_llama import LlamaRMSNorm
        except Exception as error:
            raise Absent(f"import of transformers' LlamaRMSNorm failed: {error}") from error
        self.module = LlamaRMSNorm

    def arrays(self, operands: Operands) -> dict[str, Any]:
        arrays = super().arrays(operands)
        module = self.module(operands.columns, eps=operands.eps).to(arrays["weight"].dtype)
        module.weight.data = arrays["weight"]
        return {**arrays, "weight": module}  # the module holds the weight; it takes the weight's place in a call

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        with self.torch.no_grad():
            return weight(x)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        with self.torch.no_grad():
            s = residual + x
            return weight(s), s


class FunctionalRmsNorm(TorchPeer):
    name = "torch:F.rms_norm"
    label = "torch F.rms_norm"

    def load(self) -> None:
        super().load()
        if not hasattr(self.torch.nn.functional, "rms_norm"):
            raise Absent(f"torch {self.torch.__version__} has no F.rms_norm (2.4 is the first with one)")

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self.torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        s = x + residual
        return self.torch.nn.functional.rms_norm(s, weight.shape, weight, eps), s


class Compiled(TorchPeer):
    name = "torch:compile"
    label = "torch.compile of HF eager"
    slow = True  # it compiles, for up to a minute in all

    def available(self) -> str | None:
        reason = super().available()
        if reason is None and compiler() is None:
            reason = "torch.compile needs a C++ compiler: no $CXX, c++, g++ or clang++ was found"
        return reason

    def load(self) -> None:
        super().load()
        reason = probe_compile()
        if reason:
            raise Absent(reason)

    def arrays(self, operands: Operands) -> dict[str, Any]:
        # Compiled code is kept per function and its number is limited (then torch runs eagerly): begin anew.
        self.torch.compiler.reset()
        self.compiled_norm = self.torch.compile(hf_norm, fullgraph=True)
        self.compiled_fused = self.torch.compile(hf_fused, fullgraph=True)
        return super().arrays(operands)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self.compiled_norm(x, weight, eps)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        return self.compiled_fused(x, residual, weight, eps)


def compiler() -> str | None:
    for name in (os.environ.get("CXX", "").split() or [""])[:1] + ["c++", "g++", "clang++"]:
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def probe_compile() -> str | None:
    """Why torch.compile does not work, or None. Compiles one small function in a child process, which can be given a
    time limit: a compiler alone is not enough (headers, OpenMP, a cache that can be written)."""
    code = "import torch; torch.compile(lambda a: a * 2 + 1, fullgraph=True)(torch.ones(64))"
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"torch.compile gave no result within {PROBE_SECONDS} s"
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in child.stderr.splitlines() if "Error" in line]
    return f"torch.compile fails: {(lines or ['no message'])[-1][:160]}"


PEERS: list[Peer] = [Eager(), EagerFp32Sum(), Transformers(), FunctionalRmsNorm(), Compiled()]
