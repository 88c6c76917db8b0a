"""The Python side of products on CUDA without a GPU, over tests/c/fake_cuda.c, as test_cuda_fake.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fake_cuda
import numpy as np
import pytest
from array_makers import f32
from fake_cuda import Fake, Interface, capsule

import fusednorm


@pytest.fixture
def fake() -> Iterator[Fake]:
    yield from fake_cuda.opened()


def operands() -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(5)
    a, b, bias = (rng.standard_normal(shape, np.float32) for shape in ((4, 8), (8, 3), 3))
    return a, b, bias, np.zeros((4, 3), np.float32)


def test_interface(fake: Fake) -> None:
    a, b, bias, out = operands()
    given = Interface(out)
    assert fake.core.mm_dtype(Interface(a), Interface(b), bias=Interface(bias), out=given) is given
    assert out.tobytes() == fusednorm.mm_dtype(a, b, bias=bias).tobytes()
    assert fake.log() == ["mm 0: 0"]
    turned = np.asfortranarray(b)
    fake.core.mm_dtype(Interface(a), Interface(turned), out=Interface(out))
    assert out.tobytes() == fusednorm.mm_dtype(a, b).tobytes()
    with pytest.raises(TypeError, match=r"give the outputs \(out="):
        fake.core.mm_dtype(Interface(a), Interface(b))


def test_streams(fake: Fake) -> None:
    a, b, bias, out = operands()
    fake.core.mm_dtype(Interface(a, stream=32), Interface(b, stream=48), bias=Interface(bias), out=Interface(out))
    before = ["order 0: 48 before 32", "mm 0: 32", "order 0: 32 before 48"]
    assert fake.log() == before
    fake.core.mm_dtype(Interface(a, stream=32), Interface(b), out=Interface(out, stream=32), stream=64)
    assert fake.log() == ["order 0: 32 before 64", "mm 0: 64", "order 0: 64 before 32"]


def test_devices(fake: Fake) -> None:
    a, b, bias, out = operands()
    fake.core.mm_dtype(capsule(a, device_id=1), capsule(b, device_id=1), out=capsule(out, device_id=1))
    assert fake.work() == ["mm 1: 0"]
    for given, words in [
        ((capsule(a), b, None, capsule(out)), "b is on cpu:0, but a is on cuda:0"),
        ((a, capsule(b), None, out), "b is on cuda:0, but a is on cpu:0"),
        ((capsule(a), capsule(b, device_id=1), None, capsule(out)), "b is on cuda:1, but a is on cuda:0"),
        ((capsule(a), capsule(b), bias, capsule(out)), "bias is on cpu:0, but a is on cuda:0"),
        ((capsule(a), capsule(b), None, out), "out is on cpu:0, but a is on cuda:0"),
    ]:
        with pytest.raises(ValueError, match=f"^mm_dtype: {words}"):
            fake.core.mm_dtype(*given[:2], bias=given[2], out=given[3])
    assert fake.work() == []


def test_refusals(fake: Fake) -> None:
    square = f32(8, 8)
    for pair in ((square, f32(8, 8)), (f32(8, 8), square)):
        with pytest.raises(ValueError, match=r"^mm_dtype: out overlaps (a|b)"):
            fake.core.mm_dtype(*map(Interface, pair), out=Interface(square))
    fake.set("fails", 1)
    with pytest.raises(RuntimeError, match="cudaErrorFake"):
        fake.core.mm_dtype(Interface(square), Interface(square), out=Interface(np.zeros_like(square)))
    assert fake.log() == []


def test_empty_products(fake: Fake) -> None:
    """Without an element of out there is nothing to do; without k, out is the bias."""
    bias = operands()[2]
    fake.core.mm_dtype(Interface(f32(0, 8)), Interface(f32(8, 3)), out=Interface(f32(0, 3)))
    assert fake.log() == []
    out = np.full((4, 3), np.nan, np.float32)
    fake.core.mm_dtype(Interface(f32(4, 0)), Interface(f32(0, 3)), bias=Interface(bias), out=Interface(out))
    assert (out == bias).all()
    assert fake.log() == ["mm 0: 0"]


def test_weights_are_constant(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusednorm._weights._core", fake.core)
    a, b, _, out = operands()
    with fusednorm.weights_are_constant():
        fake.core.mm_dtype(Interface(a), Interface(b), out=Interface(out))
    fake.core.mm_dtype(Interface(a), Interface(b), out=Interface(out))
    assert fake.log() == ["mm 0: 0, constant", "mm 0: 0"]
