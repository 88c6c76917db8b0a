"""Who multiplies on the CPU. A peer of --peer FILE takes part with a method mm_dtype(case, operands) -> Call."""

from __future__ import annotations

from functools import cache, cached_property
from types import ModuleType
from typing import Any

import numpy as np

import fusednorm

from .cases import aligned, numpy_dtype
from .native import build_c
from .peers import Ours, Peer, TorchPeer
from .product_cases import LAYOUTS, ProductCase
from .timing import Call

READ = "read of the weight"
OURS, OURS_ROUNDED = "fusednorm, fp32 out", "fusednorm"
TORCH, TORCH_FP32, TORCH_WIDE = "torch.mm", "torch.mm, fp32 weight", "torch.mm, fp32 out"


@cache
def read_module() -> ModuleType:
    """The module of read.c. -O3 -march=native: what the processor can read, not what it could ten years ago."""
    for flags in (["-O3", "-march=native", "-fopenmp"], ["-O3", "-fopenmp"], ["-O3"]):
        try:
            module: ModuleType = build_c.build_extension("benchmarks_read", ["benchmarks/read.c"], flags)
        except build_c.BuildError:
            continue
        return module
    raise SystemExit("benchmarks/read.c can't be compiled")


class ProductOperands:
    """a and the weight, the same memory for every contestant; b is the weight's transposed view."""

    def __init__(self, case: ProductCase) -> None:
        rng = np.random.default_rng(4)
        dtype = numpy_dtype(case.dtype)

        def filled(*shape: int) -> Any:
            made = aligned(shape[0] * shape[1], dtype).reshape(shape)
            made[...] = rng.standard_normal(shape, np.float32).astype(dtype)
            return made

        self.case, self.a = case, filled(case.m, case.k)
        self.weight = filled(case.n, case.k) if case.layout == LAYOUTS[0] else filled(case.k, case.n).T
        self.out = {name: aligned(case.m * case.n, numpy_dtype(name)).reshape(case.m, case.n) for name in case.outputs}

    @staticmethod
    def tensor(array: Any) -> Any:
        import torch

        if array.dtype.name != "bfloat16":
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    @cached_property
    def tensors(self) -> tuple[Any, Any, Any]:
        """a, the weight transposed, out in their dtype"""
        return self.tensor(self.a), self.tensor(self.weight).t(), self.tensor(self.out[self.case.dtype])

    @cached_property
    def wide(self) -> tuple[Any, Any, Any]:
        """The same in fp32."""
        a, b, _ = self.tensors
        return a.float(), b.t().float().t(), self.tensor(self.out["float32"])


class ReadWeight(Peer):
    """The roofline of few rows: every byte of the weight, read once, by as many threads."""

    name = READ

    def mm_dtype(self, case: ProductCase, operands: ProductOperands) -> Call:
        return Call(read_module().read, (operands.weight.ctypes.data, operands.weight.nbytes, case.threads))


class OurProduct(Ours):
    """On ndarrays, into memory that is there, in fp32."""

    name = OURS

    def mm_dtype(self, case: ProductCase, operands: ProductOperands) -> Call:
        arguments = (operands.a, operands.weight.T, operands.out["float32"])
        return Call(fusednorm.mm_dtype, arguments, ("out",))


class OurRoundedProduct(Ours):
    """The same, rounded to the operands' 16-bit dtype."""

    name = OURS_ROUNDED

    def mm_dtype(self, case: ProductCase, operands: ProductOperands) -> Call | None:
        if case.dtype == "float32":
            return None
        return Call(fusednorm.mm_dtype, (operands.a, operands.weight.T, operands.out[case.dtype]), ("out",))


class TorchProduct(TorchPeer):
    name = TORCH

    def mm_dtype(self, case: ProductCase, operands: ProductOperands) -> Call:
        import torch

        return Call(torch.mm, operands.tensors, ("out",))


class TorchFp32(TorchPeer):
    """On operands that were widened before the time: twice the weight's memory."""

    name = TORCH_FP32

    def mm_dtype(self, case: ProductCase, operands: ProductOperands) -> Call | None:
        import torch

        return None if case.dtype == "float32" else Call(torch.mm, operands.wide, ("out",))


class TorchOutDtype(TorchPeer):
    """aten::mm.dtype, where torch has it on the CPU; it allocates the result."""

    name = TORCH_WIDE

    def absent(self) -> str | None:
        reason = super().absent()
        if reason:
            return reason
        import torch

        one = torch.ones(1, 1, dtype=torch.bfloat16)
        try:
            torch.mm(one, one, out_dtype=torch.float32)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        return None

    def mm_dtype(self, case: ProductCase, operands: ProductOperands) -> Call | None:
        import torch

        if case.dtype == "float32":
            return None
        a, b, _ = operands.tensors
        return Call(torch.mm, (a, b, torch.float32), ("out_dtype",))


def product_registry(others: list[Peer]) -> list[Peer]:
    """Every peer, in the order of the tables; of the others those that multiply."""
    own = [ReadWeight(), OurProduct(), OurRoundedProduct(), TorchProduct(), TorchFp32(), TorchOutDtype()]
    return [*own, *(peer for peer in others if hasattr(peer, "mm_dtype"))]
