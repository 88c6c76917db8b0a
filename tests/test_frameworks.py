"""JAX, ml_dtypes, NumPy's odder arrays and plain DLPack producers: their arrays in, their arrays out, or an error."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, HAVE_BFLOAT16, assert_same_bits, check_python, from_torch, operands, to_torch

from fusednorm import _reference

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]
try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None  # type: ignore[assignment]

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
needs_jax = pytest.mark.skipif(jax is None, reason="jax is not installed")


# JAX


@needs_jax
@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_out_of_place(cpu_path: Any, dtype: str) -> None:
    x, residual, weight = operands(dtype, (2, 5, 40))
    jx, jr, jw = map(jnp.asarray, (x, residual, weight))
    for out_dtype, spelled in itertools.product(DTYPES, (str, jnp.dtype, lambda name: getattr(jnp, name))):
        out = cpu_path.rms_norm(jx, jw, out_dtype=spelled(out_dtype))
        assert isinstance(out, jax.Array)
        assert_same_bits(np.asarray(out), _reference.rms_norm(x, weight, out_dtype=out_dtype), out_dtype)
    results = cpu_path.fused_add_rmsnorm(jx, jr, jw, post_residual_addition=jr, inplace=False, round_sum=True)
    expected = _reference.fused_add_rmsnorm(x, residual, weight, post_residual_addition=residual, round_sum=True)
    for result, wanted in zip(results, expected):
        assert isinstance(result, jax.Array)
        assert_same_bits(np.asarray(result), wanted)
        assert_same_bits(np.asarray(result[::-1]), wanted[::-1])  # JAX computes with it
    assert_same_bits(np.asarray(cpu_path.rms_norm_batch_invariant(jx, 40)), _reference.rms_norm_batch_invariant(x, 40))
    assert cpu_path.rms_norm(jx[:0]).shape == (0, 5, 40)
    assert_same_bits(np.asarray(jx), x, "x")


@needs_jax
def test_jax_arrays_are_immutable(cpu_path: Any) -> None:
    x, residual, weight = operands("float32")
    jx, jr = jnp.asarray(x.copy()), jnp.asarray(residual.copy())
    fused = cpu_path.fused_add_rmsnorm
    calls = {
        "x": lambda: fused(jx, jr),
        "out": lambda: cpu_path.rms_norm(x, out=jr),
        "residual": lambda: fused(x.copy(), jr),
        "residual_out": lambda: fused(x.copy(), residual.copy(), residual_out=jr),
        "out ": lambda: cpu_path.rms_norm_batch_invariant(x, 40, out=jx),
    }
    for name, call in calls.items():
        with pytest.raises(BufferError, match=rf"norm\w*: \w*{name.strip()}\b.*(?i:jax|immutable|inplace=False)"):
            call()
    assert_same_bits(np.asarray(jx), x)
    assert_same_bits(np.asarray(jr), residual)
    out = np.empty_like(x)
    assert cpu_path.rms_norm(jx, jnp.asarray(weight), out=out) is out
    assert_same_bits(out, _reference.rms_norm(x, weight))


@needs_jax
def test_jax_tracers(cpu_path: Any) -> None:
    """Under a transformation JAX's own TypeError arrives, which names the traced array and the line."""
    x, weight = jnp.ones((4, 8)), jnp.ones(8)
    for transform in (jax.jit, jax.grad):
        with pytest.raises(TypeError, match=r"(?i)trace.*float32\[4,8\]"):
            transform(lambda a: cpu_path.rms_norm(a).sum())(x)
        with pytest.raises(TypeError, match=r"(?i)trace.*float32\[8\]"):
            transform(lambda w: cpu_path.rms_norm(x, w).sum())(weight)
    with pytest.raises(TypeError, match=r"(?i)trace.*float32\[8\]"):
        jax.vmap(cpu_path.rms_norm)(x)


# DLPack and nothing else


class Producer:
    """Only `__dlpack__`, of the ndarray or tensor that it holds."""

    def __init__(self, held: Any, legacy: bool = False) -> None:
        self.held, self.legacy, self.calls = held, legacy, 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.held.__dlpack_device__()

    def __dlpack__(self, **keywords: Any) -> Any:
        self.calls += 1
        if self.legacy and "max_version" in keywords:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        return self.held.__dlpack__(**keywords)


class WithNamespace(Producer):
    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return np


@pytest.mark.parametrize("legacy", [False, True], ids=["versioned", "legacy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dlpack_producers(cpu_path: Any, dtype: str, legacy: bool) -> None:
    if dtype == "bfloat16" and (torch is None or not HAVE_BFLOAT16):
        pytest.skip("NumPy does not export bfloat16: it takes torch and ml_dtypes")
    hold = to_torch if dtype == "bfloat16" else lambda a: a
    x, residual, weight = operands(dtype, (5, 40))
    producers = [Producer(hold(a.copy()), legacy) for a in (x, residual, weight)]
    out, residual_out = np.empty_like(x), np.empty_like(residual)
    results = cpu_path.fused_add_rmsnorm(*producers, out=out, residual_out=residual_out)
    assert results[0] is out
    assert results[1] is residual_out
    takes_max_version = dtype == "bfloat16" or tuple(map(int, np.__version__.split(".")[:2])) >= (2, 1)
    assert [p.calls for p in producers] == [1 if takes_max_version and not legacy else 2] * 3
    for actual, expected in zip(results, _reference.fused_add_rmsnorm(x, residual, weight)):
        assert_same_bits(actual, expected, "into ndarrays")
    results = cpu_path.fused_add_rmsnorm(*producers)
    assert results[0] is producers[0]
    for producer, expected in zip(producers, _reference.fused_add_rmsnorm(x, residual, weight)):
        held = producer.held if dtype != "bfloat16" else from_torch(producer.held)
        assert_same_bits(held, expected, "in place")
    strided = np.zeros((40, 5), dtype).T if dtype != "bfloat16" else None
    if strided is not None:
        strided[...] = x
        cpu_path.rms_norm(Producer(strided[::-1], legacy), out=out)
        assert_same_bits(out, _reference.rms_norm(x[::-1].copy()), "strided")


def test_dlpack_results(cpu_path: Any) -> None:
    """Allocated results need a namespace that takes them over; without one the outputs must be given."""
    x, residual, weight = operands("float32")
    out = cpu_path.rms_norm(WithNamespace(x), Producer(weight))
    assert_same_bits(np.asarray(out), _reference.rms_norm(x, weight))
    results = cpu_path.fused_add_rmsnorm(WithNamespace(x), WithNamespace(residual), inplace=False)
    for actual, expected in zip(results, _reference.fused_add_rmsnorm(x, residual)):
        assert_same_bits(np.asarray(actual), expected)
    with pytest.raises(TypeError, match=r"rms_norm: x\b.*out="):
        cpu_path.rms_norm(Producer(x))


def test_read_only_producers(cpu_path: Any) -> None:
    x, residual, _ = operands("float32")
    kept = x.copy()
    x.setflags(write=False)
    try:
        x.__dlpack__(max_version=(1, 0))
    except (BufferError, TypeError) as error:
        pytest.skip(f"this NumPy does not export read-only arrays: {error}")
    out = np.empty_like(x)
    cpu_path.rms_norm(Producer(x), out=out)
    assert_same_bits(out, _reference.rms_norm(x))
    with pytest.raises(BufferError, match=r"fused_add_rmsnorm: out.*read-only|fused_add_rmsnorm: x.*read-only"):
        cpu_path.fused_add_rmsnorm(Producer(x), residual)
    with pytest.raises(BufferError, match=r"rms_norm: out.*read-only"):
        cpu_path.rms_norm(residual, out=Producer(x))
    assert_same_bits(x, kept)


# ndarrays of every make


def test_memmap_and_read_only(cpu_path: Any, tmp_path: Any) -> None:
    x, _, weight = operands("float16", (30, 64))
    file = tmp_path / "x.bin"
    x.tofile(file)
    expected = _reference.rms_norm(x, weight)
    mapped = np.memmap(file, np.float16, "r", shape=x.shape)
    assert_same_bits(np.asarray(cpu_path.rms_norm(mapped, weight)), expected, "a read-only map")
    with pytest.raises(BufferError, match=r"rms_norm: out.*read-only"):
        cpu_path.rms_norm(x, out=mapped)
    writable = np.memmap(file, np.float16, "r+", shape=x.shape)
    assert cpu_path.rms_norm(writable, weight, out=writable) is writable
    writable.flush()
    assert_same_bits(np.fromfile(file, np.float16).reshape(x.shape), expected, "the file")
    x.setflags(write=False)
    assert_same_bits(cpu_path.rms_norm(x, weight), expected, "a read-only array")
    for arguments in ({"out": x}, {"out": x[1:]}):
        with pytest.raises(BufferError, match=r"rms_norm: out.*read-only"):
            cpu_path.rms_norm(weight[None].repeat(len(arguments["out"]), axis=0), **arguments)
    with pytest.raises(BufferError, match="read-only"):
        cpu_path.fused_add_rmsnorm(x, x.copy())
    with pytest.raises(BufferError, match="read-only"):
        cpu_path.fused_add_rmsnorm(x.copy(), x)


# Mixed


@needs_torch
def test_mixed_frameworks(cpu_path: Any) -> None:
    x, residual, weight = operands("float32")
    expected = _reference.fused_add_rmsnorm(x, residual, weight, residual_out_dtype="float32")
    kinds: list[Any] = [lambda a: a.copy(), lambda a: to_torch(a.copy()), lambda a: Producer(a.copy())]
    if jax is not None:
        kinds.append(lambda a: jnp.asarray(a.copy()))
    for kind_x, kind_residual, kind_weight in itertools.product(kinds, kinds, kinds):
        for kind_out in kinds[:2]:
            outputs = {"out": kind_out(np.empty_like(x)), "residual_out": kinds[1](np.empty_like(x))}
            given = kind_x(x), kind_residual(residual), kind_weight(weight)
            results = cpu_path.fused_add_rmsnorm(*given, **outputs)
            for name, result, wanted in zip(outputs, results, expected):
                assert result is outputs[name]
                assert_same_bits(np.asarray(result), wanted, name)
    results = cpu_path.fused_add_rmsnorm(x, to_torch(residual), weight, inplace=False)
    assert isinstance(results[0], np.ndarray)
    results = cpu_path.fused_add_rmsnorm(to_torch(x), residual, weight, inplace=False)
    assert isinstance(results[0], torch.Tensor)
    shared = to_torch(x)
    with pytest.raises(ValueError, match="overlap"):
        cpu_path.fused_add_rmsnorm(shared, residual.copy(), out=shared, residual_out=x)


# Nothing is imported on the caller's behalf


FRAMEWORKS = ("torch", "jax", "ml_dtypes", "cupy", "tensorflow", "transformers", "matplotlib")


def test_import_brings_in_no_framework() -> None:
    code = f"""
import sys, numpy as np, fusednorm
x = np.ones((4, 8), np.float16)
fusednorm.rms_norm(x, x[0], out_dtype="float32")
fusednorm.fused_add_rmsnorm(x, x.copy())
fusednorm.rms_norm_batch_invariant(x, 8)
fusednorm.mm_dtype(x, x.T, "float32"); fusednorm.router_logits(x, x, "DeepSeekV3")
fusednorm.info(); fusednorm.SEMANTICS["vllm"]
try:
    fusednorm.rms_norm([1.0])
except TypeError:
    pass
print(*sorted(set({FRAMEWORKS!r}) & set(sys.modules)))
"""
    assert check_python(code).split() == []
