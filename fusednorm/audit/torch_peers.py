"""RMSNorms that need PyTorch. torch and transformers are imported when such a peer is loaded, not before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .operands import Operands
from .peers import Absent, Peer, absent_package, cuda_reason, declared, first_line

PROBE_SECONDS = 120
QUEUED_CALLS = 20  # a device time is that of so many calls in a row
LONGEST_SLEEP = 1 << 25  # cycles: about 20 ms, far more than the host needs to queue them


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
    """A norm of torch tensors, on "cpu" or on "cuda", where it is torch's current device and stream."""

    package = "torch"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.sleep_cycles = 1 << 21  # about a millisecond

    def available(self) -> str | None:
        reason = absent_package(self.imports or self.package) or absent_package("torch")
        return cuda_reason() if reason is None and self.device == "cuda" else reason

    def load(self) -> None:
        try:
            import torch
        except Exception as error:  # an installation that is broken in whatever way
            raise Absent(f"import torch failed: {error}") from error
        self.torch = torch
        if self.device == "cuda":
            self._load_cuda()

    def _load_cuda(self) -> None:
        torch = self.torch
        if torch.version.cuda is None:
            raise Absent(f"torch {torch.__version__} was built without CUDA")
        if not torch.cuda.is_available():
            raise Absent(f"torch {torch.__version__} sees no CUDA device that it can use")
        try:
            (torch.ones(8, device="cuda") + 1).sum().item()
        except Exception as error:  # a device that this torch has no kernels for, a driver that is too old, no memory
            raise Absent(f"torch {torch.__version__} can't use the CUDA device: {first_line(error)}") from error

    def arrays(self, operands: Operands) -> dict[str, Any]:
        return {name: self.tensor(a) for name, a in operands.arrays.items()}

    def tensor(self, a: npt.NDArray[Any]) -> Any:
        if a.dtype.name == "bfloat16":
            tensor = self.torch.from_numpy(a.view(np.int16)).view(self.torch.bfloat16)
        else:
            tensor = self.torch.from_numpy(a)
        return tensor.to(self.device)

    def to_numpy(self, array: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        array = array.detach().cpu()
        if array.dtype == self.torch.bfloat16:
            result: npt.NDArray[Any] = array.view(self.torch.int16).numpy().view(dtype)
        else:
            result = array.numpy()
        return result

    def synchronise(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def healthy(self) -> bool:
        try:
            self.synchronise()
        except Exception:
            return False
        return True

    def describe_device(self) -> str | None:
        if self.device != "cuda":
            return None
        torch = self.torch
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        return f"{torch.cuda.get_device_name()} (compute capability {capability}), torch's CUDA {torch.version.cuda}"

    def on_cpu(self) -> Peer | None:
        return type(self)("cpu") if self.device == "cuda" else None

    def seconds(self, one_call: Callable[[], Any]) -> float:
        """On CUDA the device's time, without the host's: a kernel that sleeps holds the calls back until all are
        queued. A peer that the host keeps waiting even then is given the time that it takes."""
        if self.device != "cuda":
            return super().seconds(one_call)
        torch = self.torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        one_call()
        while True:
            torch.cuda.synchronize()
            torch.cuda._sleep(self.sleep_cycles)
            begin.record()
            for _ in range(QUEUED_CALLS):
                one_call()
            end.record()
            held_back = not begin.query()
            end.synchronize()
            if held_back or self.sleep_cycles >= LONGEST_SLEEP:
                return float(begin.elapsed_time(end)) / 1e3 / QUEUED_CALLS
            self.sleep_cycles *= 4

    def threads(self) -> int | None:
        return int(self.torch.get_num_threads()) if self.device == "cpu" else None

    def set_threads(self, threads: int) -> None:
        if self.device == "cpu":
            self.torch.set_num_threads(threads)


class Eager(TorchPeer):
    name = "torch:hf"
    label = "HF eager, as in transformers"
    declares = declared(cast=True, round_sum=True)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return hf_norm(x, weight, eps)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        return hf_fused(x, residual, weight, eps)


class EagerFp32Sum(Eager):
    name = "torch:hf-fp32-sum"
    label = "HF eager, sum kept in fp32"
    operations = ("fused_add_rmsnorm",)
    declares = declared(cast=True)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        s = x.float() + residual.float()
        variance = s.pow(2).mean(-1, keepdim=True)
        return weight * (s * self.torch.rsqrt(variance + eps)).to(x.dtype), s.to(x.dtype)


class Transformers(TorchPeer):
    name = "transformers"
    label = "transformers LlamaRMSNorm"
    package = "transformers"
    declares = declared(cast=True, round_sum=True)

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
    declares = declared(cast=False, round_sum=True)

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
    declares = declared(cast=True, round_sum=True)  # the code that it is given does

    def available(self) -> str | None:
        reason = super().available()
        if reason is None and self.device == "cpu" and compiler() is None:
            reason = "torch.compile needs a C++ compiler: no $CXX, c++, g++ or clang++ was found"
        return reason

    def load(self) -> None:
        super().load()
        reason = probe_compile(self.device)
        if reason:
            raise Absent(reason)

    def on_cpu(self) -> Peer | None:
        return None  # compiled for the CPU only where that is audited too

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


def probe_compile(device: str = "cpu") -> str | None:
    """Why torch.compile does not work, or None. Compiles one small function in a child process, which can be given a
    time limit: a compiler alone is not enough (headers, OpenMP, Triton, a cache that can be written)."""
    code = f"import torch; torch.compile(lambda a: a * 2 + 1, fullgraph=True)(torch.ones(64, device={device!r}))"
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"torch.compile gave no result within {PROBE_SECONDS} s"
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in child.stderr.splitlines() if "Error" in line]
    return f"torch.compile fails: {(lines or ['no message'])[-1][:160]}"


def peers(device: str) -> list[Peer]:
    return [kind(device) for kind in (Eager, EagerFp32Sum, Transformers, FunctionalRmsNorm, Compiled)]
