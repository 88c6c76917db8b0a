"""CuPy and JAX on CUDA without a GPU, as test_cuda_fake.py: stand-ins with the attributes that are asked for."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_cuda
import numpy as np
import pytest
from array_makers import f32, stub, stub_module
from fake_cuda import Fake, Interface, Tensor, capsule, case, expected


@pytest.fixture
def fake() -> Iterator[Fake]:
    yield from fake_cuda.opened()


# ---- an exchange API ----


def test_exchange(fake: Fake) -> None:
    x, weight, _ = case()
    counters = stub_module().counters
    before = counters()
    arrays = [stub("Stub", *array.shape, buffer=array.data, device_type=2) for array in (x, weight)]
    with pytest.raises(ValueError, match="out is on cpu:0, but x is on cuda:0"):
        fake.core.rms_norm(*arrays, out=f32(4, 8))
    result = fake.core.rms_norm(*arrays)
    assert result.device_type == 2
    assert result.tobytes() == expected(x, weight)
    assert fake.work() == ["norm 0: 0"]
    fake.core.rms_norm(*arrays, out=result, stream=32)
    assert fake.work() == ["order 0: 0 before 32", "norm 0: 32", "order 0: 32 before 0"]
    after = counters()
    assert after["exported"] == before["exported"], "borrowed"
    assert after["streams"] > before["streams"]


# ---- CuPy ----


class Memory(SimpleNamespace):
    """What `cupy.ndarray.data` is."""


class CupyArray:
    def __init__(self, array: Any, device: int = 0, stream: int = 0) -> None:
        self.array, self.dtype, self.shape, self.strides = array, array.dtype, array.shape, array.strides
        self.data = Memory(ptr=array.ctypes.data if array.size else 0, device_id=device)
        self.allocated_on = stream

    def __dlpack__(self, **keywords: Any) -> Any:
        raise AssertionError("CuPy is asked for attributes")


class Streams:
    """What `cupy.cuda.Stream` is."""

    def __init__(self, cupy: FakeCupy) -> None:
        self.cupy = cupy

    @property
    def null(self) -> Any:
        return self.cupy.use(0)

    @property
    def ptds(self) -> Any:
        return self.cupy.use(2)

    def from_external(self, stream: Any) -> Any:
        return self.cupy.use(stream.__cuda_stream__()[1])


class FakeCupy(ModuleType):
    """Current streams by device, and the contexts that change them."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.current, self.device = {0: 0, 1: 0}, 0
        self.ndarray = CupyArray
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(is_hip=False, getDevice=lambda: self.device),
            get_current_stream=lambda device: SimpleNamespace(ptr=self.current[device]),
            Device=self.on_device,
            Stream=Streams(self),
        )

    def empty(self, shape: Any, dtype: Any) -> CupyArray:
        return CupyArray(np.zeros(shape, dtype), self.device, self.current[self.device])

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    @contextmanager
    def use(self, handle: int) -> Iterator[None]:
        before, self.current[self.device] = self.current[self.device], handle
        yield
        self.current[self.device] = before


_cupy = FakeCupy()  # one for all tests, since the extension remembers its type


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    monkeypatch.setitem(sys.modules, "cupy", _cupy)
    _cupy.current, _cupy.device = {0: 0, 1: 0}, 0
    return _cupy


def test_cupy(fake: Fake, cupy: FakeCupy) -> None:
    x, weight, out = case()
    cupy.current[0] = 48
    result = fake.core.rms_norm(CupyArray(x), CupyArray(weight))
    assert type(result) is CupyArray
    assert (result.array.tobytes(), result.allocated_on) == (expected(x, weight), 48)
    assert fake.core.rms_norm(CupyArray(x[:, ::-1]), out=CupyArray(out)).array is out
    assert out.tobytes() == expected(x[:, ::-1])
    assert fake.log() == ["norm 0: 48"] * 2, "nothing to keep, nothing to order"
    assert fake.core.rms_norm(CupyArray(x), out_dtype="float16").dtype == np.float16
    pair = fake.core.fused_add_rmsnorm(CupyArray(x), CupyArray(out), inplace=False)
    assert [type(array) for array in pair] == [CupyArray] * 2
    empty = fake.core.rms_norm(CupyArray(np.zeros((0, 8), np.float32)), CupyArray(weight, 0))
    assert empty.shape == (0, 8)


def test_cupy_on_another_device(fake: Fake, cupy: FakeCupy) -> None:
    x, weight, _ = case()
    cupy.current[1] = 64
    result = fake.core.rms_norm(CupyArray(x, 1), CupyArray(weight, 1))
    assert (result.data.device_id, result.allocated_on, cupy.device) == (1, 64, 0)
    assert fake.work() == ["norm 1: 64"]
    with pytest.raises(ValueError, match="weight is on cuda:0, but x is on cuda:1"):
        fake.core.rms_norm(CupyArray(x, 1), CupyArray(weight, 0))
    assert fake.work() == []


@pytest.mark.parametrize(("stream", "handle"), [(0, 0), (2, 2), (96, 96)])
def test_cupy_on_a_given_stream(fake: Fake, cupy: FakeCupy, stream: int, handle: int) -> None:
    x, weight, _ = case()
    cupy.current[0] = 48
    fake.set("busy", 1)
    given = CupyArray(x)
    references = sys.getrefcount(given)
    result = fake.core.rms_norm(given, CupyArray(weight), stream=stream)
    assert (result.allocated_on, cupy.current[0]) == (handle, 48)
    assert fake.log() == [f"norm 0: {handle}", f"event 0: {handle}"], "the caller orders"
    assert sys.getrefcount(given) == references + 1, "kept until the kernel has run"
    fake.set("busy", 0)
    fake.core.rms_norm(f32(1, 8))
    assert sys.getrefcount(given) == references


def test_cupy_refusals(fake: Fake, cupy: FakeCupy) -> None:
    x, _, out = case()
    with pytest.raises(TypeError, match=r"^rms_norm: x is a .*, a subclass of cupy.ndarray"):
        fake.core.rms_norm(type("Masked", (CupyArray,), {})(x))
    with pytest.raises(TypeError, match=r"^rms_norm: x has dtype float64: it must be float32"):
        fake.core.rms_norm(CupyArray(f32(4, 8, dtype=np.float64)))
    wrong = CupyArray(x)
    wrong.strides = (4,)
    with pytest.raises(BufferError, match=r"^rms_norm: x has shape"):
        fake.core.rms_norm(wrong, out=CupyArray(out))


def test_two_frameworks_are_ordered(fake: Fake, cupy: FakeCupy) -> None:
    x, weight, out = case()
    cupy.current[0] = 48
    fake.core.rms_norm(CupyArray(x), Interface(weight, stream=64), out=Interface(out))
    assert fake.work() == ["order 0: 64 before 48", "norm 0: 48", "order 0: 48 before 64"]
    fake.core.rms_norm(Interface(x, stream=64), CupyArray(weight), out=CupyArray(out))
    assert fake.work() == ["order 0: 48 before 64", "norm 0: 64", "order 0: 64 before 48"]
    seen: list[Any] = []
    made = capsule(x, hook=lambda array, keywords: seen.append(keywords["stream"]))
    fake.core.rms_norm(made, CupyArray(weight), out=Interface(out))
    assert seen == [48]
    assert fake.work() == ["norm 0: 48"]


# ---- JAX ----


def jax_like(array: Any, device: int = 0) -> Any:
    """An immutable array whose library is below: what the extension takes for JAX's."""
    made = _jax_type()(array.data, str(array.dtype), array.shape)
    made.device_type, made.device_id, made.legacy = 2, device, True
    return made


class Namespace:
    """What of jax.numpy is asked for."""

    float32, float16 = np.dtype(np.float32), np.dtype(np.float16)
    consumer = 1
    fails = False

    def empty(self, shape: Any, *, dtype: Any, device: Any) -> Any:
        return jax_like(np.zeros(shape, dtype), device)

    def from_dlpack(self, buffer: Any) -> Any:
        if self.fails:
            raise LookupError("from_dlpack fails on demand")
        taken = buffer.__dlpack__(stream=self.consumer)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = Tensor.from_address(pointer(taken, b"dltensor"))
        assert (tensor.device_type, tensor.device_id) == buffer.__dlpack_device__()
        return SimpleNamespace(capsule=taken, bytes=lambda size: ctypes.string_at(tensor.data, size), **vars(tensor))


_namespace = Namespace()


def _jax_type() -> Any:
    capsule_type = stub_module().Capsule
    if not hasattr(_jax_type, "made"):
        attributes = {"__module__": "jax.stand_in", "__array_namespace__": lambda self: _namespace}
        attributes["device"] = property(lambda self: self.device_id)
        _jax_type.made = type("Array", (capsule_type,), attributes)  # type: ignore[attr-defined]
    return _jax_type.made  # type: ignore[attr-defined]


@pytest.mark.parametrize(("stream", "consumer"), [(None, 1), (None, None), (None, 96), (96, 96), (96, 1), (96, -1)])
def test_jax(fake: Fake, monkeypatch: pytest.MonkeyPatch, stream: int | None, consumer: int | None) -> None:
    monkeypatch.setattr(_namespace, "consumer", consumer, raising=False)
    x, weight, _ = case()
    before = stub_module().counters()["outstanding"]
    fake.set("busy", 1)
    result = fake.core.rms_norm(jax_like(x, 1), jax_like(weight, 1), stream=stream)
    assert result.bytes(4 * x.size) == expected(x, weight)
    work, ready = stream or 0, 0 if consumer in (1, None) else consumer
    order = [] if ready in (work, -1) else [f"order 1: {work} before {ready}"]
    assert fake.work() == [f"norm 1: {work}", *order]
    assert stub_module().counters()["outstanding"] == before + 3, "two inputs and the result"
    del result
    gc.collect()
    assert stub_module().counters()["outstanding"] == before + 3, "the kernel that fills it has not run yet"
    fake.set("busy", 0)
    fake.core.rms_norm(f32(1, 8))
    gc.collect()
    assert stub_module().counters()["outstanding"] == before


def test_jax_pairs_dtypes_and_failures(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, out = case()
    pair = fake.core.fused_add_rmsnorm(jax_like(x), jax_like(x), jax_like(weight), inplace=False, out_dtype="float16")
    assert pair[1].bytes(4 * x.size) == (x + x).tobytes()
    del pair
    with pytest.raises(BufferError, match="out is a jax array, which is immutable"):
        fake.core.rms_norm(jax_like(x), out=jax_like(out))
    with pytest.raises(BufferError, match=r"x is a jax array.*inplace=False"):
        fake.core.fused_add_rmsnorm(jax_like(x), jax_like(x))
    assert fake.core.rms_norm(jax_like(np.zeros((0, 8), np.float32))).shape == (0, 8)
    monkeypatch.setattr(_namespace, "fails", True, raising=False)
    with pytest.raises(LookupError):
        fake.core.rms_norm(jax_like(x))
    fake.core.rms_norm(f32(1, 8))
    gc.collect()
    assert stub_module().counters()["deleted_twice"] == 0
