"""Does a contestant compute the norm at all? Its relative error against float64, once for each case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .cases import EPS
from .cuda_cases import CudaCase, Tensors

# Rounding points differ between peers, and so does the last digit; a kernel above this computes something else.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
CHECKED_ELEMENTS = 1 << 23


@dataclass
class Expected:
    """Rows spread over the case, the first and the last among them, and what they should become."""

    rows: Any
    out: Any
    total: Any  # x + residual; None without residual
    pristine: Any  # of `source`, which operations in place overwrite

    def restore(self, tensors: Tensors) -> None:
        tensors.source.copy_(self.pristine)
        tensors.target.fill_(math.nan)

    def error(self, result: Any) -> float:
        """The larger one of out and sum; infinite where an element is NaN or of another shape."""
        out, total = result if isinstance(result, tuple | list) else (result, None)
        found = _relative(out, self.out, self.rows)
        if self.total is not None:
            found = max(found, _relative(total, self.total, self.rows) if total is not None else math.inf)
        return found


def expected(case: CudaCase, tensors: Tensors) -> Expected:
    import torch

    count = min(case.rows, max(2, CHECKED_ELEMENTS // case.columns))
    rows = torch.linspace(0, case.rows - 1, count, dtype=torch.float64, device=tensors.x.device).long()
    s = tensors.x[rows].double()
    total = None
    if tensors.residual is not None:
        s = total = s + tensors.residual[rows].double()
    out = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS) * tensors.weight.double()
    pristine = tensors.source.clone() if tensors.residual is not None else tensors.source
    return Expected(rows, out, total, pristine)


def _relative(actual: Any, exact: Any, rows: Any) -> float:
    if actual.shape[-1] != exact.shape[-1] or actual.shape[0] <= int(rows[-1]) or bool(actual.isnan().any()):
        return math.inf
    return float((actual[rows].double() - exact).norm() / exact.norm())
