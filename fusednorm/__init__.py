"""RMSNorm and fused residual-add RMSNorm with one published bit-level contract.

rms_norm, fused_add_rmsnorm and rms_norm_batch_invariant take NumPy, PyTorch, JAX and other DLPack arrays of float32,
float16 and bfloat16, and give each row the same bits whatever the batch, strides, alignment, threads or processor.
SEMANTICS names how other libraries round, as keyword arguments. docs/numerics.md in the source states the contract.
"""

from fusednorm._core import (
    fused_add_rmsnorm,
    get_num_threads,
    info,
    rms_norm,
    rms_norm_batch_invariant,
    set_num_threads,
)
from fusednorm._semantics import SEMANTICS, Semantics
from fusednorm._version import __version__

__all__ = [
    "SEMANTICS",
    "Semantics",
    "__version__",
    "fused_add_rmsnorm",
    "get_num_threads",
    "info",
    "rms_norm",
    "rms_norm_batch_invariant",
    "set_num_threads",
]
