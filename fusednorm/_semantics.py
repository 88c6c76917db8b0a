"""SEMANTICS: where other people's norms round, as keyword arguments of ours.

A preset moves the rounding points to those of its code. It cannot move the order in which that code adds the squares,
nor its 1/sqrt: in 16 bits fewer than one element in 1000 then differs, in fp32 about a third do, by a few ulp.
`differs` names what remains; docs/numerics.md compares the presets, tests/test_semantics.py measures those it can run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, eq=False)
class Semantics:
    """One preset: `rms_norm(x, w, **preset.rms_norm)`, `fused_add_rmsnorm(x, r, w, **preset.fused_add_rmsnorm)`."""

    name: str
    source: str = field(repr=False)  # whose code it describes, and which version of it
    differs: str = field(repr=False)  # what keeps the bits apart all the same
    rms_norm: Mapping[str, Any]
    fused_add_rmsnorm: Mapping[str, Any]


def _preset(
    name: str, *, cast: bool = False, weight_offset: float = 0.0, round_sum: bool = False, source: str, differs: str
) -> Semantics:
    common = {"cast_x_before_out_mul": cast, "weight_offset": weight_offset}
    fused = {**common, "round_sum": round_sum}
    return Semantics(name, source, differs, MappingProxyType(common), MappingProxyType(fused))


_PRESETS = (
    _preset(
        "hf_llama",
        cast=True,
        round_sum=True,
        source="transformers 5.23, models/llama/modeling_llama.py: LlamaRMSNorm.forward after the decoder layer's "
        "`hidden_states = residual + hidden_states`, an addition in the model's dtype.",
        differs="The order of torch's mean, and torch's fp32 rsqrt. With an fp32 weight and a 16-bit x its result is "
        "fp32 by type promotion: pass out_dtype=float32.",
    ),
    _preset(
        "gemma",
        weight_offset=1.0,
        round_sum=True,
        source="transformers 5.23, models/gemma, gemma2 and gemma3: GemmaRMSNorm.forward after the decoder layer's "
        "addition in the model's dtype. Qwen3-Next and Qwen3.5 round in the same places. Gemma 3n and Gemma 4 do not "
        "add 1: they round as 'torch' does.",
        differs="The order of torch's mean, and torch's fp32 rsqrt.",
    ),
    _preset(
        "flashinfer",
        source="FlashInfer 0.6.18 (commit fb28d72): rmsnorm and fused_add_rmsnorm, in CUDA (norm.cuh) and in CuTe DSL "
        "(flashinfer/norm/kernels). For its gemma_* functions add weight_offset=1.0.",
        differs="Squares summed with FMA, thread by thread, then by shuffles; an approximate rsqrt that flushes "
        "subnormals. The products associate as ours do: (s * r) * (w + offset).",
    ),
    _preset(
        "sglang",
        source="SGLang 0.5.23, srt/layers/layernorm.py: RMSNorm.forward_cuda, which calls sgl_kernel, that is the "
        "kernels of FlashInfer. For a layer built with cast_x_before_out_mul=True add that flag. Its own JIT kernel "
        "(kernels/jit/csrc/elementwise/fused_add_rmsnorm.cuh) is round_sum='after_variance' without that flag; the one "
        "of pull request 34727, to follow it, is round_sum=True.",
        differs="As 'flashinfer'. A post_residual_addition is added to the residual first, in 16 bits. The JIT kernel "
        "multiplies as (s * w) * r and by 1 / H.",
    ),
    _preset(
        "vllm",
        round_sum=True,
        source="vLLM 0.24 to 0.26, csrc/libtorch_stable/layernorm_kernels.cu: rms_norm and fused_add_rms_norm, the "
        "operators that run when compilation is off. Up to 0.19, and on its main branch from 29 May to 18 June 2026, "
        "they rounded before the weight: add cast_x_before_out_mul=True. Its native operators (vllm/ir) state "
        "cast_x_before_out_mul=True and round_sum=False.",
        differs="Squares summed with FMA, thread by thread, by another number of threads from 256 tokens on; the "
        "approximate rsqrtf. The products associate as ours do.",
    ),
    _preset(
        "torch",
        round_sum=True,
        source="torch 2.13, F.rms_norm(x, (H,), w, eps) on the CPU; fused: F.rms_norm(x + residual, (H,), w, eps), "
        "an addition in the tensors' dtype.",
        differs="The order of torch's mean, and torch's fp32 rsqrt. eps=None means finfo(float32).eps there for 16-bit "
        "inputs too.",
    ),
)

SEMANTICS: Mapping[str, Semantics] = MappingProxyType({preset.name: preset for preset in _PRESETS})
