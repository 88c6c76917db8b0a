"""torch tensors on a GPU and what the CPU makes of them, for test_cuda_binding.py and test_cuda_frameworks.py."""

from __future__ import annotations

from typing import Any

import helpers
import numpy as np
import pytest

import fusednorm

SLEEP = 200_000_000  # cycles for torch.cuda._sleep: about 0.1 s


def require() -> Any:
    """torch; skips the module that calls it where torch or this package has no GPU."""
    helpers.require_cuda()
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA", allow_module_level=True)
    fusednorm.warmup()  # loading a kernel may wait for the device, which some tests keep busy
    return torch


def tensors(rows: int = 64, columns: int = 1024, dtype: Any = None, device: str = "cuda") -> tuple[Any, Any]:
    """An x and a weight with fresh values, ready."""
    import torch

    seed = int(np.random.default_rng(helpers.SEED).integers(2**31)) + rows + columns
    generator = torch.Generator(device=device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype or torch.bfloat16}
    made = torch.randn(rows, columns, **options), torch.randn(columns, **options)
    torch.cuda.synchronize(device)
    return made


def on_cpu(x: Any, weight: Any = None, **keywords: Any) -> Any:
    return fusednorm.rms_norm(x.cpu(), None if weight is None else weight.cpu(), **keywords)


def same(result: Any, expected: Any) -> bool:
    """The same bits."""
    import torch

    integer = {4: torch.int32, 2: torch.int16}[expected.element_size()]
    return bool(torch.equal(result.cpu().view(integer), expected.cpu().view(integer)))
