"""RMSNorms on CUDA: ours, torch's and those of the packages that serve models. Arrays are torch tensors.

What each declares is what its code says, read in the version named in its comment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, metadata
from typing import Any

import fusednorm

from . import torch_peers
from .operands import Operands
from .peers import Absent, Peer, declared, first_line, ours
from .torch_peers import TorchPeer


class OursOnCuda(TorchPeer):
    """A preset or product of ours on CUDA tensors: the operands and keywords of its twin on the CPU."""

    package = "fusednorm"

    def __init__(self, twin: Peer) -> None:
        super().__init__("cuda")
        self.twin = twin
        self.name, self.label, self.operations, self.declares = twin.name, twin.label, twin.operations, twin.declares

    def available(self) -> str | None:
        told = fusednorm.info()["cuda"]
        return super().available() or (None if told["available"] else f"fusednorm: {told['reason']}")

    def version(self) -> str:
        return fusednorm.__version__

    def refuses(self, operands: Operands) -> str | None:
        return self.twin.refuses(operands)

    def arrays(self, operands: Operands) -> dict[str, Any]:
        return {name: self.tensor(a) for name, a in self.twin.arrays(operands).items()}

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self.twin.rms_norm(x, weight, eps)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        return self.twin.fused_add_rmsnorm(x, residual, weight, eps)

    def mm_dtype(self, a: Any, b: Any) -> Any:
        return self.twin.mm_dtype(a, b)

    def on_cpu(self) -> Peer | None:
        return self.twin


class KernelPeer(TorchPeer):
    """A package's kernels. A subclass sets what Peer names, `prepare`, `norm` and `add_norm`.

    `prepare` imports the package and keeps its functions. `norm` returns the norm. `add_norm` may write the norm to x
    and the sum to residual, as these packages do, or return new tensors; it returns both.
    """

    risky = True

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(device)

    def load(self) -> None:
        super().load()
        try:
            self.prepare()
        except Absent:
            raise
        except Exception as error:
            raise Absent(f"{type(error).__name__}: {first_line(error)}") from error

    def prepare(self) -> None:
        raise NotImplementedError

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        raise NotImplementedError

    def add_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        raise NotImplementedError

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        with self.torch.no_grad():
            return self.norm(x, weight, eps)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        with self.torch.no_grad():
            return self.add_norm(x.clone(), residual.clone(), weight, eps)

    def call_to_time(self, operation: str, arrays: Mapping[str, Any], eps: float) -> Callable[[], Any]:
        """The fused operation on copies that it may overwrite, made once and not in the time."""
        if operation != "fused_add_rmsnorm":
            return super().call_to_time(operation, arrays, eps)
        x, residual, weight = arrays["x"].clone(), arrays["residual"].clone(), arrays["weight"]

        def one_call() -> Any:
            with self.torch.no_grad():
                return self.add_norm(x, residual, weight, eps)

        return one_call

    def on_cpu(self) -> Peer | None:
        return None


class FlashInfer(KernelPeer):
    """0.7.2: y = h * rstd * w, h the fp32 sum, in both backends."""

    package, imports = "flashinfer-python", "flashinfer"
    declares = declared(cast=False)

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda
        self.name, self.label = (
            ("flashinfer:cuda", "FlashInfer, CUDA") if cuda else ("flashinfer:cute", "FlashInfer, CuTe DSL")
        )

    def prepare(self) -> None:
        self.module: Any = import_module("flashinfer.norm")
        # Without the CuTe DSL, or on a device that it does not know, the package takes its CUDA kernels in silence.
        if not self.cuda and not hasattr(self.module, "rmsnorm_cute"):
            raise Absent("its CuTe DSL backend can't be imported (nvidia-cutlass-dsl), or is switched off")
        supported = getattr(self.module, "_cute_dsl_supports_arch", None)
        if not self.cuda and supported is not None and not supported(*self.torch.cuda.get_device_capability()):
            raise Absent("its CuTe DSL does not know this device")
        if self.cuda and not hasattr(self.module, "get_norm_module"):
            raise Absent("this version can switch its CUDA backend on by FLASHINFER_USE_CUDA_NORM=1 only")

    @contextlib.contextmanager
    def backend(self) -> Iterator[Any]:
        """The package's own switch, which it reads from the environment once, at import."""
        before = self.module._USE_CUDA_NORM
        self.module._USE_CUDA_NORM = self.cuda
        try:
            yield self.module
        finally:
            self.module._USE_CUDA_NORM = before

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        with self.backend() as module:
            return module.rmsnorm(x, weight, eps)

    def add_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        with self.backend() as module:
            module.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual


class Quack(KernelPeer):
    """0.6.5: y = x_hat * w, all of it in fp32, the residual added in fp32."""

    name, label = "quack", "QuACK"
    package, imports = "quack-kernels", "quack"
    declares = declared(cast=False)

    def prepare(self) -> None:
        self.function = import_module("quack.rmsnorm").rmsnorm

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self.function(x, weight, eps=eps)

    def add_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        out, total = self.function(x, weight, residual=residual, eps=eps, prenorm=True)
        return out, total


class Liger(KernelPeer):
    """0.8.5, casting mode "llama": the sum in the tensors' dtype, and S_row cast to it before the weight."""

    name, label = "liger", "Liger, llama"
    package, imports = "liger-kernel", "liger_kernel"
    declares = declared(cast=True, round_sum=True)

    def prepare(self) -> None:
        self.function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply
        self.fused = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction.apply

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self.function(x, weight, eps, 0.0, "llama", False)

    def add_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        out, total = self.fused(x, residual, weight, eps, 0.0, "llama", False)
        return out, total


class Vllm(KernelPeer):
    """0.24 to 0.26: the operators read the stored sum, x * s_variance * w; SEMANTICS["vllm"] says what others do."""

    name, label = "vllm", "vLLM"
    package = "vllm"
    declares = declared(cast=False, round_sum=True)

    def prepare(self) -> None:
        self.ops = import_module("vllm._custom_ops")

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        out = self.torch.empty_like(x)
        self.ops.rms_norm(out, x, weight, eps)
        return out

    def add_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        self.ops.fused_add_rms_norm(x, residual, weight, eps)
        return x, residual


class SglangJit(KernelPeer):
    """0.5.23: the norm rounds once; the fused one has the variance of the fp32 sum and multiplies the stored one."""

    name, label = "sglang:jit", "SGLang, JIT"
    package = "sglang"
    declares = declared(cast=False, round_sum="after_variance")

    def prepare(self) -> None:
        try:
            self.module = import_module("sglang.kernels.ops.layernorm.norm")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("sglang.kernels"):
                raise
            self.module = import_module("sglang.jit_kernel.norm")  # where it was before

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        out = self.torch.empty_like(x)
        self.module.rmsnorm(x, weight, out, eps)
        return out

    def add_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        self.module.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual


class SglangKernel(KernelPeer):
    """0.4.4: FlashInfer's CUDA kernels. As operators: its Python functions call FlashInfer where that is found."""

    name, label = "sglang:kernel", "SGLang, sgl_kernel"
    package, imports = "sglang-kernel", "sgl_kernel"
    declares = declared(cast=False)

    def version(self) -> str:
        try:
            return metadata.version("sglang-kernel")
        except metadata.PackageNotFoundError:
            self.package = "sgl-kernel"  # its former name
            return super().version()

    def prepare(self) -> None:
        import_module("sgl_kernel")
        operators = self.torch.ops.sgl_kernel
        self.function, self.fused = operators.rmsnorm.default, operators.fused_add_rmsnorm.default
        self.dependent = self.torch.cuda.get_device_capability() >= (9, 0)  # programmatic dependent launch

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        out = self.torch.empty_like(x)
        self.function(out, x, weight, eps, self.dependent)
        return out

    def add_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        self.fused(x, residual, weight, eps, self.dependent)
        return x, residual


def peers() -> list[Peer]:
    packages = [FlashInfer(cuda=False), FlashInfer(cuda=True), Quack(), Liger(), Vllm(), SglangJit(), SglangKernel()]
    return [*(OursOnCuda(twin) for twin in ours()), *torch_peers.peers("cuda"), *packages]
