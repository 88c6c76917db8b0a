"""RoutingMethod, router_logits_dtype and router_logits, with every kind of array and of leading dimensions."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, HAVE_BFLOAT16, assert_same_bits, from_float32, from_torch, seeded, to_torch

import fusednorm
from fusednorm import RoutingMethod, _reference, router_logits, router_logits_dtype

# As printed by FlashInfer 0.6.18.
FLASHINFER = {"Default": 0, "Renormalize": 1, "DeepSeekV3": 2, "Llama4": 3, "RenormalizeNaive": 4, "TopK": 5}
FLASHINFER |= {"SigmoidRenorm": 6, "MiniMax2": 7, "Sigmoid": 8}
Theirs = enum.IntEnum("Theirs", FLASHINFER)  # type: ignore[misc]
needs_bfloat16 = pytest.mark.skipif(not HAVE_BFLOAT16, reason="bfloat16 in NumPy needs ml_dtypes")


def gate(dtype: str, shape: tuple[int, ...] = (3, 4, 6, 70), experts: int = 9) -> tuple[Any, Any, Any]:
    rng = seeded("gate", dtype, shape)
    x, weight = rng.standard_normal(shape, np.float32), rng.standard_normal((experts, shape[-1]), np.float32)
    return from_float32(x, dtype), from_float32(weight, dtype), rng.standard_normal(experts, np.float32)


def expected(x: Any, weight: Any, out_dtype: str, bias: Any = None) -> Any:
    rows = np.ascontiguousarray(x).reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    return _reference.mm_dtype(rows, weight.T, out_dtype, bias=bias).reshape(*x.shape[:-1], weight.shape[0])


def test_names_and_values() -> None:
    assert {method.name: method.value for method in RoutingMethod} == FLASHINFER


@pytest.mark.parametrize("name", FLASHINFER)
def test_dtype_of_each_method(name: str) -> None:
    wanted = "float32" if name in ("DeepSeekV3", "MiniMax2") else "bfloat16"
    for spelled in (name, FLASHINFER[name], RoutingMethod[name], Theirs[name], np.int64(FLASHINFER[name])):
        assert router_logits_dtype(spelled) == wanted
    if HAVE_BFLOAT16:
        x, weight, _ = gate("float32", (2, 8))
        for spelled in (name, FLASHINFER[name], RoutingMethod[name], Theirs[name]):
            assert router_logits(x, weight, spelled).dtype.name == wanted


def test_names_of_members_count() -> None:
    """Values have moved: 6 was once Unspecified."""
    old = enum.IntEnum("Old", {"TopK": 5, "Unspecified": 6})  # type: ignore[misc]
    assert router_logits_dtype(enum.Enum("Auto", ["MiniMax2"]).MiniMax2) == "float32"  # type: ignore[attr-defined]
    assert router_logits_dtype(old.TopK) == "bfloat16"
    with pytest.raises(ValueError, match=r"router_logits_dtype: routing_method is .*Unspecified.*SigmoidRenorm \(6\)"):
        router_logits_dtype(old.Unspecified)
    for wrong in (None, True, 2.0, b"Default"):
        with pytest.raises(TypeError, match="router_logits_dtype: routing_method"):
            router_logits_dtype(wrong)  # type: ignore[arg-type]
    for wrong in ("default", 9, -1):
        with pytest.raises(ValueError, match="router_logits_dtype: routing_method"):
            router_logits_dtype(wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(cpu_path: Any, dtype: str) -> None:
    x, weight, bias = gate(dtype)
    for out_dtype in DTYPES:
        for given in (None, bias):
            out = router_logits(x, weight, "TopK", bias=given, out_dtype=out_dtype)
            assert_same_bits(out, expected(x, weight, out_dtype, given), (out_dtype, given is None))
    assert_same_bits(router_logits(x, weight, 2), expected(x, weight, "float32"))
    rows = x.reshape(-1, x.shape[-1])
    assert_same_bits(router_logits(rows, weight, 2), fusednorm.mm_dtype(rows, weight.T, "float32"))


VIEWS: dict[str, Any] = {
    "as it is": lambda x: x,
    "every other": lambda x: x[:, ::2],
    "every other of two": lambda x: x[::2, :, 1::3],
    "transposed": lambda x: x.transpose(2, 0, 1, 3),
    "reversed": lambda x: x[::-1, :, ::-1, ::-1],
    "last first": lambda x: np.asfortranarray(x),
    "columns": lambda x: x[..., 3::2],
    "one row": lambda x: x[1, 2, 3],
    "ones": lambda x: x[:1, :, None, 2:3],
    "many ones": lambda x: x[(None,) * 20],
    "broadcast": lambda x: np.broadcast_to(x[:, :1], (2, *x.shape)),
    "no rows": lambda x: x[:, :0],
    "no length": lambda x: x[..., :0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_leading_dimensions(cpu_path: Any, view: str) -> None:
    x, weight, bias = gate("float32")
    x = VIEWS[view](x)
    weight = weight[:, : x.shape[-1]]
    before = x.tobytes()
    out = router_logits(x, weight, "DeepSeekV3", bias=bias)
    assert out.flags.c_contiguous
    assert_same_bits(out, expected(x, weight, "float32", bias), view)
    assert x.tobytes() == before


@needs_bfloat16
def test_frameworks(cpu_path: Any) -> None:
    x, weight, bias = gate("bfloat16")
    wanted = expected(x, weight, "bfloat16", bias)
    torch = pytest.importorskip("torch", reason="needs torch")
    tensors = [to_torch(array.copy()) for array in (x, weight, bias)]
    out = router_logits(*tensors[:2], "TopK", bias=tensors[2])
    assert_same_bits(from_torch(out), wanted)
    out = router_logits(tensors[0].transpose(0, 1), tensors[1], "MiniMax2", out_dtype=torch.float16)
    assert_same_bits(from_torch(out), expected(x.transpose(1, 0, 2, 3), weight, "float16"))
    assert out.is_contiguous()
    jnp = pytest.importorskip("jax.numpy", reason="needs jax")
    out = router_logits(jnp.asarray(x), jnp.asarray(weight), "TopK", bias=bias)
    assert type(out) is type(jnp.asarray(x))
    assert_same_bits(np.asarray(out), wanted)


@needs_bfloat16
def test_products_of_frameworks(cpu_path: Any) -> None:
    x, weight, bias = gate("bfloat16", (5, 40))
    wanted = _reference.mm_dtype(x, weight.T, "float32", bias=bias)
    torch = pytest.importorskip("torch", reason="needs torch")
    a, b = to_torch(x.copy()), to_torch(weight.copy())
    out = fusednorm.mm_dtype(a, b.T, torch.float32, bias=to_torch(bias))
    assert_same_bits(from_torch(out), wanted)
    assert_same_bits(
        from_torch(fusednorm.mm_dtype(a, weight.T, bias=bias)), _reference.mm_dtype(x, weight.T, bias=bias)
    )
    given = torch.empty(9, 5).T
    assert fusednorm.mm_dtype(x, b.T, bias=bias, out=given) is given
    assert_same_bits(from_torch(given.contiguous()), wanted)
    jnp = pytest.importorskip("jax.numpy", reason="needs jax")
    out = fusednorm.mm_dtype(jnp.asarray(x), jnp.asarray(weight).T, "float32", bias=jnp.asarray(bias))
    assert type(out) is type(jnp.asarray(x))
    assert_same_bits(np.asarray(out), wanted)
