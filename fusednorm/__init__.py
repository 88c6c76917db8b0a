"""RMSNorm, fused residual-add RMSNorm and products in any dtype, with one published bit-level contract.

rms_norm, fused_add_rmsnorm, rms_norm_batch_invariant, mm_dtype and router_logits take NumPy, PyTorch, CuPy, JAX and
other DLPack arrays of float32, float16 and bfloat16, in CPU memory or on a CUDA device, and give each row the same bits
whatever the batch, strides, alignment, threads or processor. The norms' bits are the same on a GPU too.
SEMANTICS names how other libraries round, as keyword arguments. docs/numerics.md in the source states the contract.
"""

from fusednorm._core import (
    fused_add_rmsnorm,
    get_num_threads,
    get_weights_are_constant,
    info,
    mm_dtype,
    rms_norm,
    rms_norm_batch_invariant,
    set_num_threads,
    set_weights_are_constant,
    warmup,
)
from fusednorm._routing import RoutingMethod, router_logits, router_logits_dtype
from fusednorm._semantics import SEMANTICS, Semantics
from fusednorm._version import __version__
from fusednorm._weights import weights_are_constant

__all__ = [
    "SEMANTICS",
    "RoutingMethod",
    "Semantics",
    "__version__",
    "fused_add_rmsnorm",
    "get_num_threads",
    "get_weights_are_constant",
    "info",
    "mm_dtype",
    "rms_norm",
    "rms_norm_batch_invariant",
    "router_logits",
    "router_logits_dtype",
    "set_num_threads",
    "set_weights_are_constant",
    "warmup",
    "weights_are_constant",
]
