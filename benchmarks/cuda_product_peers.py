"""Who multiplies on a GPU.

A peer of --peer FILE (cuda_peers.py shows such a file) takes part with a method that gives what queues x times the
transpose of the weight once, and returns the fp32 result, or None where it does not take the case:

    class Mine(CudaPeer):
        name = "mine"

        def supports(self, case):                # case: cuda_product_cases.ProductCase
            return case.dtype == "bfloat16" and case.operation.name == "mm_fp32"

        def mm_fp32(self, case, tensors):        # tensors: x, weight (N x K), b (its transposed view), out
            return Call(mine.product, (tensors.x, tensors.weight, tensors.out))

`compiles_each_shape = True` keeps it to one gate and to the projections at few rows. Peers with the names DeepGEMM and
QuACK are those that the goals speak of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import fusednorm

from .cuda_peers import CudaPeer, Ours, OursConstant
from .cuda_product_cases import ProductCase, ProductTensors
from .product_peers import TORCH
from .timing import Call

DEEPGEMM, QUACK = "DeepGEMM", "QuACK"


def _ours(t: ProductTensors) -> Call:
    return Call(fusednorm.mm_dtype, (t.x, t.b, t.out), ("out",))


class OurProduct(Ours):
    def mm_fp32(self, case: ProductCase, t: ProductTensors) -> Call:
        return _ours(t)


class OurConstantProduct(OursConstant):
    def mm_fp32(self, case: ProductCase, t: ProductTensors) -> Call:
        return _ours(t)


class TorchProduct(CudaPeer):
    """cuBLAS. With out= where this torch takes it together with out_dtype=."""

    name, package = TORCH, "torch"

    def load(self) -> None:
        import torch

        one = torch.ones((16, 16), dtype=torch.bfloat16, device=self.device)
        torch.mm(one, one, out_dtype=torch.float32)  # raises on a torch without it
        try:
            torch.mm(one, one, out_dtype=torch.float32, out=torch.empty_like(one, dtype=torch.float32))
            self.takes_out = True
        except (TypeError, RuntimeError):
            self.takes_out = False

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """fp32 operands in fp32, never TF32."""
        import torch

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def mm_fp32(self, case: ProductCase, t: ProductTensors) -> Call:
        import torch

        if case.dtype == "float32":
            return Call(torch.mm, (t.x, t.b, t.out), ("out",))
        if self.takes_out:
            return Call(torch.mm, (t.x, t.b, torch.float32, t.out), ("out_dtype", "out"))
        return Call(torch.mm, (t.x, t.b, torch.float32), ("out_dtype",))


def product_registry(others: list[Any]) -> list[CudaPeer]:
    """Every peer, in the order of the tables; of the others those that multiply."""
    return [
        OurProduct(),
        OurConstantProduct(),
        TorchProduct(),
        *(peer for peer in others if getattr(peer, "mm_fp32", None)),
    ]
