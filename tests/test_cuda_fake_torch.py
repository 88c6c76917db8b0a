"""torch on CUDA without a GPU, as test_cuda_fake.py: torch's own tensors, which claim to be on cuda:0."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
from array_makers import f32
from fake_cuda import Fake, Interface, Tensor, capsule, case, expected

from fusednorm import _streams


@pytest.fixture
def fake() -> Iterator[Fake]:
    yield from fake_cuda.opened()


class ExchangeAPI(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("major", "minor")),
        *((name, ctypes.c_void_p) for name in ("previous", "allocate", "managed", "to_object", "borrow", "stream")),
    )


Borrow = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Tensor))
Stream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class Torch:
    """torch's own table, but its tensors are on cuda:0 and its current stream is `current`."""

    def __init__(self, torch: Any) -> None:
        python = ctypes.pythonapi
        python.PyCapsule_GetPointer.restype = python.PyCapsule_New.restype = ctypes.py_object
        get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", python))
        new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        self.original = ExchangeAPI.from_address(get(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api"))
        self.current, self.lend = 0, Borrow(self.original.borrow)
        self.functions = (Borrow(self.borrow), Stream(self.stream))
        self.table = ExchangeAPI.from_buffer_copy(self.original)
        self.table.borrow, self.table.stream = (ctypes.cast(f, ctypes.c_void_p).value for f in self.functions)
        self.capsule = new(("PyCapsule_New", python))(ctypes.addressof(self.table), b"dlpack_exchange_api", None)

    def borrow(self, tensor: int, out: Any) -> int:
        status = self.lend(tensor, out)
        out.contents.device_type = 2
        return int(status)

    def stream(self, device_type: int, device: int, out: Any) -> int:
        assert (device_type, device) == (2, 0)
        out[0] = self.current
        return 0


@pytest.fixture
def torch_on_cuda(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    """In a fresh module, which asks torch for its table again."""
    torch = pytest.importorskip("torch", reason="needs torch")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("needs torch 2.10")
    made = Torch(torch)
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", made.capsule)
    usual, fake.core = fake.core, fake.fresh()
    yield made
    fake.core = usual


def test_torch(fake: Fake, torch_on_cuda: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    calls: list[Any] = []
    monkeypatch.setattr(_streams, "torch_record", lambda tensors, *where: calls.append((len(tensors), *where)))
    monkeypatch.setattr(
        _streams,
        "torch_empty_like",
        lambda like, dtype, *where: calls.append(where) or torch.empty_like(like, dtype=dtype),  # type: ignore[func-returns-value]
    )
    x, weight, _ = case()
    tensors = [torch.from_numpy(array) for array in (x, weight)]
    out = torch.zeros(4, 8)
    torch_on_cuda.current = 48
    version = out._version
    assert fake.core.rms_norm(*tensors, out=out) is out
    assert out._version == version + 1
    assert out.numpy().tobytes() == expected(x, weight)
    result = fake.core.rms_norm(*tensors)
    assert result.numpy().tobytes() == expected(x, weight)
    fake.core.rms_norm(*tensors, out=out, stream=48)
    assert (fake.log(), calls) == (["norm 0: 48"] * 3, [])
    fake.core.rms_norm(*tensors, stream=64)
    assert (fake.log(), calls) == (["norm 0: 64"], [(64, 0), (3, 64, 0)])
    calls.clear()
    torch_on_cuda.current = 0
    fake.core.rms_norm(*tensors, out=out, stream=1)
    assert (fake.log(), calls) == (["norm 0: 0"], [])
    big = torch.ones(300, 300)
    fake.core.rms_norm(big, out=big)
    assert fake.log() == ["norm 0: 0"], "borrowed whatever the size"


def test_torch_refusals(fake: Fake, torch_on_cuda: Torch) -> None:
    import torch

    x = torch.ones(4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="x requires grad while grad mode is on"):
        fake.core.rms_norm(x)
    with torch.no_grad():
        fake.core.rms_norm(x)
    with pytest.raises(ValueError, match="weight is on cpu:0, but x is on cuda:0"):
        fake.core.rms_norm(x.detach(), f32(8))
    assert fake.work() == ["norm 0: 0"]


def test_torch_with_another_framework(fake: Fake, torch_on_cuda: Torch) -> None:
    import torch

    x, weight, out = case()
    torch_on_cuda.current = 48
    fake.core.rms_norm(torch.from_numpy(x), Interface(weight, stream=64), out=torch.from_numpy(out))
    assert out.tobytes() == expected(x, weight)
    assert fake.work() == ["order 0: 64 before 48", "norm 0: 48", "order 0: 48 before 64"]
    fake.core.rms_norm(Interface(x, stream=64), torch.from_numpy(weight), out=torch.from_numpy(out))
    assert fake.work() == ["order 0: 48 before 64", "norm 0: 64", "order 0: 64 before 48"]


def test_old_torch(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.10 a tensor comes by `__dlpack__`, and its stream from torch.cuda."""
    torch = pytest.importorskip("torch", reason="needs torch")
    seen: list[Any] = []

    def export(self: Any, *, stream: Any, max_version: Any) -> Any:
        seen.append(stream)
        return made[id(self)].__dlpack__(stream=stream, max_version=max_version)

    x, weight, out = case()
    tensors = [torch.from_numpy(array) for array in (x, weight, out)]
    made = {id(tensor): capsule(array) for tensor, array in zip(tensors, (x, weight, out), strict=True)}
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", 0)
    monkeypatch.setattr(torch.Tensor, "__dlpack__", export)
    monkeypatch.setattr(torch.Tensor, "__dlpack_device__", lambda self: (2, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=48))
    core: Any = fake.fresh()
    core.rms_norm(*tensors[:2], out=tensors[2])
    assert out.tobytes() == expected(x, weight)
    assert (seen, fake.work()) == ([48] * 3, ["norm 0: 48"])


def test_streams_in_torch_and_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """_streams, with modules that record what is asked of them."""
    calls: list[Any] = []

    @contextmanager
    def context(value: Any) -> Iterator[None]:
        calls.append(("enter", value))
        yield
        calls.append("leave")

    record: Callable[..., Any] = lambda name: lambda *args, **keywords: calls.append((name, args, keywords))  # noqa: E731
    cuda = SimpleNamespace(ExternalStream=lambda handle, device: ("stream", handle, device), stream=context)
    torch = SimpleNamespace(cuda=cuda, contiguous_format="C", empty_like=record("empty_like"))
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    _streams.torch_empty_like("x", "f32", 64, 1)
    asked = ("empty_like", ("x",), {"dtype": "f32", "memory_format": "C"})
    assert calls == [("enter", ("stream", 64, 1)), asked, "leave"]
    calls.clear()
    _streams.torch_new_empty(SimpleNamespace(new_empty=record("new_empty")), (4, 3), "f32", 64, 1)
    assert calls == [("enter", ("stream", 64, 1)), ("new_empty", ((4, 3),), {"dtype": "f32"}), "leave"]
    calls.clear()
    _streams.torch_record([SimpleNamespace(record_stream=calls.append)], 64, 1)
    assert calls == [("stream", 64, 1)]
    old = SimpleNamespace(Stream=SimpleNamespace(null=None), Device=context, ExternalStream=lambda *a: context(a))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=old, empty=record("empty")))  # type: ignore[arg-type]
    calls.clear()
    _streams.cupy_empty((4, 8), "f32", 64, 1)
    assert calls == [("enter", 1), ("enter", (64, 1)), ("empty", ((4, 8), "f32"), {}), "leave", "leave"]
