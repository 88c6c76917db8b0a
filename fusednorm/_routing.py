"""router_logits(): the logits of a mixture-of-experts gate, in the dtype that its routing method wants."""

from __future__ import annotations

from enum import Enum, IntEnum
from operator import index
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fusednorm import _core

if TYPE_CHECKING:
    from fusednorm._core import _Array

_X = TypeVar("_X", bound="_Array")


class RoutingMethod(IntEnum):
    """How experts are chosen from the logits: FlashInfer's RoutingMethodType (0.6), by name and value."""

    Default = 0  # softmax, then the top k
    Renormalize = 1  # the top k, then softmax
    DeepSeekV3 = 2  # sigmoid and a correction bias, then the top k of the best groups
    Llama4 = 3  # the top 1, then sigmoid
    RenormalizeNaive = 4  # softmax, the top k, renormalised
    TopK = 5  # the top k alone
    SigmoidRenorm = 6  # sigmoid, the top k, renormalised
    MiniMax2 = 7  # sigmoid and a correction bias, the top k, renormalised
    Sigmoid = 8  # sigmoid, then the top k


# A bias chooses between scores that sigmoid has pressed together: in bfloat16 many of them are equal.
_BIAS_CORRECTED = frozenset({RoutingMethod.DeepSeekV3, RoutingMethod.MiniMax2})


def _parse(function: str, method: Any) -> RoutingMethod:
    """Of an enumeration's member, ours or another's, the name counts: values have moved between versions."""
    if type(method) is RoutingMethod:
        return method
    name = method.name if isinstance(method, Enum) else method
    try:
        return RoutingMethod[name] if isinstance(name, str) else RoutingMethod(_integer(name))
    except (KeyError, ValueError):
        exception: type[Exception] = ValueError
    except TypeError:
        exception = TypeError
    known = ", ".join(f"{each.name} ({each.value})" for each in RoutingMethod)
    raise exception(f"{function}: routing_method is {method!r}: it must be a name or a number of {known}")


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return index(value)


def router_logits_dtype(routing_method: RoutingMethod | Enum | int | str) -> Literal["float32", "bfloat16"]:
    """The dtype of logits: "float32" where the method adds a correction bias to sigmoids, "bfloat16" otherwise.

    routing_method: a member of RoutingMethod or of FlashInfer's RoutingMethodType, its value, or its name.
    DeepSeekV3 and MiniMax2 want float32 for their accuracy. FlashInfer's TRT-LLM fp8 MoE kernels demanded float32 for
    DeepSeekV3 and bfloat16 for every other method up to version 0.6.7; since 0.6.8 they take either for all of them.
    """
    return "float32" if _parse("router_logits_dtype", routing_method) in _BIAS_CORRECTED else "bfloat16"


def router_logits(
    x: _X,
    gate_weight: _Array,
    routing_method: RoutingMethod | Enum | int | str,
    *,
    bias: _Array | None = None,
    out_dtype: Any = None,
) -> _X:
    """x @ gate_weight.T + bias over the last dimension, as mm_dtype computes it, rounded once to out_dtype.

    x: (..., K), of any strides, never copied. gate_weight: (N, K), a row an expert.
    bias: (N,), of the gate's linear layer, or None. Not the routing's correction bias: that is added after the sigmoid.
    routing_method decides the dtype of the result (router_logits_dtype) where out_dtype does not.
    Returns an array (..., N) of x's framework. Arrays and errors are as for mm_dtype.
    """
    method = _parse("router_logits", routing_method)
    if out_dtype is None:
        out_dtype = "float32" if method in _BIAS_CORRECTED else "bfloat16"
    return _core._linear(x, gate_weight, out_dtype, bias)
