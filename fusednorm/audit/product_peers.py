"""Products of matrices: ours, NumPy's, torch's, and on CUDA those of packages that keep a row's bits."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

import fusednorm

from .cuda_peers import KernelPeer, OursOnCuda
from .operands import Operands
from .peers import Absent, Peer
from .products import PRODUCT
from .torch_peers import TorchPeer


class OurProduct(Peer):
    name, label, package = "fusednorm:mm_dtype", "fusednorm mm_dtype", "fusednorm"
    operations = (PRODUCT,)

    def available(self) -> str | None:
        return None

    def version(self) -> str:
        return fusednorm.__version__

    def mm_dtype(self, a: Any, b: Any) -> Any:
        return fusednorm.mm_dtype(a, b, "float32")

    def threads(self) -> int | None:
        return fusednorm.get_num_threads()

    def set_threads(self, threads: int) -> None:
        fusednorm.set_num_threads(threads)


class NumpyProduct(Peer):
    """Its BLAS in fp32: it has no 16-bit product."""

    name, label, package = "numpy:matmul", "NumPy, in fp32", "numpy"
    operations = (PRODUCT,)

    def mm_dtype(self, a: Any, b: Any) -> Any:
        return a.astype(np.float32) @ b.astype(np.float32)


class TorchProduct(TorchPeer):
    """torch.mm in the operands' dtype. On CUDA (cuBLAS) it can return fp32; on the CPU the result is widened."""

    operations = (PRODUCT,)
    name = "torch:mm"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.label = "torch.mm" if device == "cpu" else "torch.mm, out_dtype=float32"

    def mm_dtype(self, a: Any, b: Any) -> Any:
        torch = self.torch
        if self.device == "cpu" or a.dtype == torch.float32:
            return torch.mm(a, b).float()
        return torch.mm(a, b, out_dtype=torch.float32)


class WideTorchProduct(TorchPeer):
    """What code does that wants fp32 results and has no operation for them."""

    operations = (PRODUCT,)
    name, label = "torch:mm-float", "torch.mm, operands widened"

    def refuses(self, operands: Operands) -> str | None:
        return "the operands are fp32: as torch.mm" if operands.dtype == "float32" else None

    def mm_dtype(self, a: Any, b: Any) -> Any:
        return self.torch.mm(a.float(), b.float())


class TritonPersistent(KernelPeer):
    """The persistent kernel of batch_invariant_ops, or vLLM's or SGLang's version of it: its result has the operands'
    dtype. They override aten::mm with it."""

    operations = (PRODUCT,)

    def __init__(self, name: str, label: str, package: str, module: str) -> None:
        super().__init__()
        self.name, self.label, self.package, self.module = name, label, package, module
        self.imports = module.partition(".")[0]

    def prepare(self) -> None:
        self.function = import_module(self.module).matmul_persistent

    def mm_dtype(self, a: Any, b: Any) -> Any:
        return self.function(a, b).float()


class DeepGemm(KernelPeer):
    """2.5: D = A B^T, with D in fp32 if it is given so."""

    operations = (PRODUCT,)
    name, label, package, imports = "deepgemm", "DeepGEMM", "deep-gemm", "deep_gemm"

    def prepare(self) -> None:
        module = import_module("deep_gemm")
        if not hasattr(module, "bf16_gemm_nt"):
            raise Absent("this version has no bf16_gemm_nt")
        self.function = module.bf16_gemm_nt

    def refuses(self, operands: Operands) -> str | None:
        return None if operands.dtype == "bfloat16" else "bfloat16 only"

    def mm_dtype(self, a: Any, b: Any) -> Any:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=self.torch.float32)
        self.function(a, b.t(), out)
        return out


def peers() -> list[Peer]:
    triton = (
        ("triton:tml", "batch_invariant_ops", "batch_invariant_ops", "batch_invariant_ops.batch_invariant_ops"),
        ("triton:vllm", "vLLM, batch invariant", "vllm", "vllm.model_executor.layers.batch_invariant"),
        ("triton:sglang", "SGLang, batch invariant", "sglang", "sglang.srt.batch_invariant_ops.batch_invariant_ops"),
    )
    return [
        OurProduct(),
        NumpyProduct(),
        TorchProduct("cpu"),
        WideTorchProduct("cpu"),
        OursOnCuda(OurProduct()),
        TorchProduct("cuda"),
        WideTorchProduct("cuda"),
        *(TritonPersistent(*each) for each in triton),
        DeepGemm(),
    ]
