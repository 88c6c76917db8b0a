"""Makers of the arrays, right and wrong ones, that test_errors.py, test_hostile.py and test_memory.py call with.

Each skips the test that asks for it where its package is missing.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import build_c
import numpy as np
import pytest


def f32(*shape: int, dtype: Any = np.float32) -> Any:
    """A fresh array of distinct ordinary numbers, with some bytes of its own."""
    return (np.arange(1, 1 + np.prod(shape, dtype=int)) / 8).astype(dtype).reshape(shape)


def readonly(*shape: int) -> Any:
    array = f32(*shape)
    array.flags.writeable = False
    return array


def strided(array: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Any:
    """A view with any strides, in bytes, and a start `offset` bytes behind the first element."""
    return np.ndarray(shape, array.dtype, array, offset, strides)


def numpy_dtype(dtype: str, *shape: int) -> Any:
    return np.zeros(shape, dtype)


def bf16() -> Any:
    return pytest.importorskip("ml_dtypes", reason="bf16 in NumPy needs ml_dtypes").bfloat16


def fp8(*shape: int) -> Any:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="float8 in NumPy needs ml_dtypes")
    return np.ones(shape, ml_dtypes.float8_e4m3fn)


# ---- the stub producer ----


def stub_module() -> Any:
    if not build_c.have_compiler() or not build_c.have_python_headers():
        pytest.skip("the stub producer needs a C compiler and Python.h")
    return build_c.stub_producer()


def stub(type_name: str, *shape: int, dtype: str = "float32", buffer: Any = None, **attributes: Any) -> Any:
    """A Stub or a Capsule of tests/c/stub_producer.c, over `buffer` or over zeroed memory of its own."""
    array = getattr(stub_module(), type_name)(buffer, dtype, shape)
    for name, value in attributes.items():
        setattr(array, name, value)
    return array


# ---- torch ----


def torch() -> Any:
    return pytest.importorskip("torch", reason="needs torch")


def t32(*shape: int, **options: Any) -> Any:
    return torch().ones(shape, **options)


def torch_dtype(name: str, *shape: int) -> Any:
    """A tensor of that dtype; without a shape the dtype itself."""
    if not hasattr(torch(), name):
        pytest.skip(f"this torch has no {name}")
    dtype = getattr(torch(), name)
    return torch().zeros(shape, dtype=dtype) if shape else dtype


def parameter() -> Any:
    return torch().nn.Parameter(t32(4, 8))


def fake_tensor(*shape: int) -> Any:
    fakes = pytest.importorskip("torch._subclasses.fake_tensor", reason="needs torch 2")
    with fakes.FakeTensorMode():
        return torch().ones(shape)


def subclass() -> Any:
    return t32(4, 8).as_subclass(type("Logged", (torch().Tensor,), {}))


def quietly(maker: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and deprecations of torch are not this package's business
        return maker(*args)


def sparse_coo() -> Any:
    return t32(4, 8).to_sparse()


def sparse_csr() -> Any:
    return quietly(t32(4, 8).to_sparse_csr)


def mkldnn() -> Any:
    if not torch().backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    return t32(4, 8).to_mkldnn()


def meta() -> Any:
    return t32(4, 8, device="meta")


def quantised() -> Any:
    return quietly(torch().quantize_per_tensor, t32(4, 8), 0.1, 0, torch().qint8)


def nested() -> Any:
    return quietly(torch().nested.nested_tensor, [t32(8), t32(8)])


def negative() -> Any:
    """A float32 tensor with the negative bit: its memory holds the numbers with the other sign."""
    return torch().ones(4, 8, dtype=torch().complex64).conj().imag


def conjugate() -> Any:
    return torch().ones(4, 8, dtype=torch().complex64).conj()


def zero() -> Any:
    """A tensor of zeros without memory, as autograd makes them."""
    return torch()._efficientzerotensor((4, 8))


def dual() -> Any:
    """A tensor with a tangent of forward-mode differentiation; it does not require grad. See `leave_dual_level`."""
    forward = torch().autograd.forward_ad
    forward.enter_dual_level()
    return forward.make_dual(t32(4, 8), t32(4, 8))


def leave_dual_level() -> None:
    """Undoes what `dual` leaves switched on; does nothing where it was not called."""
    forward = sys.modules.get("torch.autograd.forward_ad")
    while forward is not None and forward._current_level >= 0:
        forward.exit_dual_level()


# ---- jax ----


def j32(*shape: int) -> Any:
    return pytest.importorskip("jax.numpy", reason="needs jax").ones(shape)


def jax_dtype(name: str, *shape: int) -> Any:
    return j32(*shape).astype(name)


def jax_deleted() -> Any:
    array = j32(4, 8) + 1
    array.delete()
    return array


def jax_key() -> Any:
    return pytest.importorskip("jax", reason="needs jax").random.key(0)
