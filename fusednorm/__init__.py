"""RMSNorm and fused residual-add RMSNorm with one published bit-level contract.

rms_norm, fused_add_rmsnorm and rms_norm_batch_invariant take NumPy, PyTorch, CuPy, JAX and other DLPack arrays of
float32, float16 and bfloat16, in CPU memory or on a CUDA device, and give each row the same bits whatever the batch,
strides, alignment, threads, processor or device.
SEMANTICS names how other libraries round, as keyword arguments. docs/numerics.md in the source states the contract.
"""

from fusednorm._core import (
    fused_add_rmsnorm,
    get_num_threads,
    get_weights_are_constant,
    info,
    rms_norm,
    rms_norm_batch_invariant,
    set_num_threads,
    set_weights_are_constant,
    warmup,
)
from fusednorm._semantics import SEMANTICS, Semantics
from fusednorm._version import __version__
from fusednorm._weights import weights_are_constant

__all__ = [
    "SEMANTICS",
    "Semantics",
    "__version__",
    "fused_add_rmsnorm",
    "get_num_threads",
    "get_weights_are_constant",
    "info",
    "rms_norm",
    "rms_norm_batch_invariant",
    "set_num_threads",
    "set_weights_are_constant",
    "warmup",
    "weights_are_constant",
]
