"""The Python side of CUDA without a GPU: the extension over tests/c/fake_cuda.c, whose log says what it was asked.

"Device" memory is the host's and a norm runs at once on the CPU, so results can be compared; in which order a real
device works is seen in test_cuda_binding.py. Frameworks: test_cuda_fake_frameworks.py, test_cuda_fake_torch.py.
"""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fake_cuda
import numpy as np
import pytest
from array_makers import f32, stub_module
from fake_cuda import Fake, Interface, capsule, case, expected

import fusednorm


@pytest.fixture
def fake() -> Iterator[Fake]:
    yield from fake_cuda.opened()


# ---- what is there ----


def test_info(fake: Fake) -> None:
    device = {"compute_capability": "9.0", "multiprocessors": 132}
    assert fake.core.info()["cuda"] == {
        "built": True,
        "available": True,
        "reason": "",
        "runtime": "13.0",
        "driver": "12.8",
        "architectures": ["90", "90-ptx"],
        "devices": [{"name": "Fake 0", **device}, {"name": "Fake 1", **device}],
    }
    fake.set("reason", 1)
    cuda = fake.core.info()["cuda"]
    assert (cuda["built"], cuda["available"], cuda["driver"], cuda["devices"]) == (True, False, "", [])
    assert cuda["reason"] == "the fake has no driver"


def test_warmup(fake: Fake) -> None:
    fake.set("current_device", 1)
    for device in (None, "cuda", 0, np.int64(1), "cuda:0"):
        assert fake.core.warmup(device) is None
    fake.core.warmup(device=1)
    assert fake.log() == ["warmup 1", "warmup 1", "warmup 0", "warmup 1", "warmup 0", "warmup 1"]
    for wrong in (-1, 2**40, "cpu", "cuda:", "cuda:-1", "cuda:1 ", "CUDA:0", "cuda:99999999"):
        with pytest.raises(ValueError, match=r"^warmup: device is "):
            fake.core.warmup(wrong)
    for wrong in (1.0, True, b"cuda", object()):
        with pytest.raises(TypeError, match=r"^warmup: device is "):
            fake.core.warmup(wrong)
    with pytest.raises(ValueError, match="no device 2"):
        fake.core.warmup(2)
    assert fake.log() == []


def test_forced_schedule(fake: Fake) -> None:
    fake.core._force_cuda_schedule("packed")
    fake.core._force_cuda_schedule(None)
    with pytest.raises(RuntimeError, match="no schedule"):
        fake.core._force_cuda_schedule("fast")


def test_forced_product(fake: Fake) -> None:
    fake.core._force_cuda_product("64x16_by8")
    fake.core._force_cuda_product(None)
    with pytest.raises(RuntimeError, match="no kernel"):
        fake.core._force_cuda_product("64x17_by8")
    with pytest.raises(TypeError):
        fake.core._force_cuda_product(8)


# ---- __cuda_array_interface__ ----


def test_interface(fake: Fake) -> None:
    x, weight, out = case()
    given = Interface(out)
    assert fake.core.rms_norm(Interface(x), Interface(weight), out=given) is given
    assert out.tobytes() == expected(x, weight)
    assert fake.log() == ["norm 0: 0"]
    wide = f32(4, 16)
    fake.core.rms_norm(Interface(wide[:, ::2]), Interface(weight), out=Interface(out))
    assert out.tobytes() == expected(wide[:, ::2], weight)
    fake.core.fused_add_rmsnorm(Interface(x), Interface(out), Interface(weight))
    fake.core.rms_norm_batch_invariant(Interface(x), 8, out=Interface(out))


def test_interface_bfloat16(fake: Fake) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, out = f32(4, 8, dtype=ml_dtypes.bfloat16), np.zeros((4, 8), ml_dtypes.bfloat16)
    for typestr in ("<V2", "|V2"):
        fake.core.rms_norm(Interface(x, typestr=typestr), out=Interface(out, typestr=typestr))
        assert out.tobytes() == expected(x)
    lying = Interface(x, typestr="<V2")
    lying.dtype = np.dtype("V2")
    with pytest.raises(TypeError, match=r"^rms_norm: x has typestr '<V2'"):
        fake.core.rms_norm(lying, out=Interface(out))


def test_interface_streams(fake: Fake) -> None:
    x, weight, out = case()
    fake.core.rms_norm(Interface(x, stream=32), Interface(weight, stream=32), out=Interface(out))
    assert fake.log() == ["norm 0: 32"]
    fake.core.rms_norm(Interface(x, stream=32), Interface(weight, stream=48), out=Interface(out, stream=1))
    order = ["order 0: 48 before 32", "order 0: 0 before 32", "norm 0: 32"]
    assert fake.log() == [*order, "order 0: 32 before 48", "order 0: 32 before 0"]
    fake.core.rms_norm(Interface(x, stream=32), Interface(weight), out=Interface(out, stream=32), stream=64)
    assert fake.log() == ["order 0: 32 before 64", "norm 0: 64", "order 0: 64 before 32"]


@pytest.mark.parametrize(
    ("changes", "exception", "words"),
    [
        ({"typestr": "<f8"}, TypeError, "'<f8'"),
        ({"typestr": ">f4"}, TypeError, "'>f4'"),
        ({"typestr": 4}, BufferError, "typestr"),
        ({"typestr": None}, BufferError, "typestr"),
        ({"shape": [4, 8]}, BufferError, "shape"),
        ({"shape": (4, -8)}, BufferError, "shape"),
        ({"shape": (2**62, 2**62)}, BufferError, "shape"),
        ({"shape": (4, 8.0)}, BufferError, "shape"),
        ({"shape": (1,) * 65}, BufferError, "shape"),
        ({"strides": (4,)}, BufferError, "strides"),
        ({"strides": (32, 2**70)}, BufferError, "strides"),
        ({"data": None}, BufferError, "data"),
        ({"data": (-1, False)}, BufferError, "data"),
        ({"data": (0, False)}, TypeError, "no memory"),
        ({"data": (8, False)}, ValueError, "no device can reach"),
        ({"stream": -1}, BufferError, "stream"),
        ({"stream": "0"}, BufferError, "stream"),
        ({"mask": Interface(f32(4, 8))}, TypeError, "mask"),
    ],
    ids=lambda value: re.sub(r"<[^>]*>", "", str(value)),  # no addresses: all workers must see the same names
)
@pytest.mark.parametrize("slot", ["x", "out"])
def test_malformed_interface(fake: Fake, slot: str, changes: Any, exception: Any, words: str) -> None:
    arrays = {"x": f32(4, 8), "out": np.zeros((4, 8), np.float32)}
    given = {name: Interface(array, **(changes if name == slot else {})) for name, array in arrays.items()}
    with pytest.raises(exception, match=rf"^rms_norm: {slot}[ :].*{words}"):
        fake.core.rms_norm(**given)
    assert not arrays["out"].any()
    assert fake.log() == []


def test_interface_refusals(fake: Fake) -> None:
    x, weight, out = case()
    with pytest.raises(TypeError, match=r"give the outputs \(out="):
        fake.core.rms_norm(Interface(x))
    out.flags.writeable = False
    with pytest.raises(BufferError, match="out is read-only"):
        fake.core.rms_norm(Interface(x), out=Interface(out))
    with pytest.raises(ValueError, match="weight is on cpu:0, but x is on cuda:0"):
        fake.core.rms_norm(Interface(x), weight, out=Interface(x))
    with pytest.raises(ValueError, match="out is on cuda:0, but x is on cpu:0"):
        fake.core.rms_norm(x, weight, out=Interface(x))
    assert fake.log() == []


def test_nothing_has_no_device(fake: Fake) -> None:
    """An empty array's pointer may be anything, and its device is that of the others."""
    fake.set("current_device", 1)
    empty = np.zeros((0, 8), np.float32)
    fake.core.rms_norm(Interface(empty, data=(8, False)), Interface(f32(8)), out=Interface(empty, data=(0, False)))
    assert fake.log() == []


# ---- stream= ----


class Protocol:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __cuda_stream__(self) -> Any:
        return self.answer


STREAMS = [(0, 0), (1, 0), (2, 2), (2**64 - 1, 2**64 - 1), (Protocol((0, 96)), 96)]
STREAMS += [(SimpleNamespace(__cuda_stream__=(0, 96)), 96), (SimpleNamespace(cuda_stream=80), 80)]
STREAMS += [(SimpleNamespace(ptr=48, synchronize=None), 48)]


@pytest.mark.parametrize(("stream", "handle"), STREAMS, ids=lambda value: str(value)[:20])
def test_stream(fake: Fake, stream: Any, handle: int) -> None:
    x, weight, out = case()
    fake.core.rms_norm(Interface(x), Interface(weight), out=Interface(out), stream=stream)
    assert fake.log() == [f"norm 0: {handle}"]
    with pytest.raises(ValueError, match=r"^rms_norm: stream is .* x is on the CPU"):
        fake.core.rms_norm(x, weight, stream=stream)


WRONG = [True, "0", 1.0, b"", object(), Protocol(5), Protocol((1, 96)), Protocol((0, "x")), Protocol((0,)), Protocol]
WRONG += [SimpleNamespace(cuda_stream=None), SimpleNamespace(ptr=48)]


@pytest.mark.parametrize("stream", WRONG, ids=lambda value: str(value)[:20])
def test_wrong_stream(fake: Fake, stream: Any) -> None:
    x, _, out = case()
    with pytest.raises(TypeError, match=r"^rms_norm: stream is "):
        fake.core.rms_norm(Interface(x), out=Interface(out), stream=stream)
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match=r"^rms_norm: stream is "):
            fake.core.rms_norm(Interface(x), out=Interface(out), stream=number)
    assert fake.log() == []


# ---- __dlpack__ ----


@pytest.mark.parametrize(("stream", "number"), [(None, 1), (0, 1), (1, 1), (2, 2), (96, 96)])
@pytest.mark.parametrize("legacy", [False, True])
def test_producers_are_told_the_stream(fake: Fake, stream: int | None, number: int, legacy: bool) -> None:
    seen = []
    x, weight, out = case()
    hook = lambda array, keywords: seen.append(keywords["stream"])  # noqa: E731
    arrays = [capsule(array, hook=hook, legacy=legacy) for array in (x, weight, out)]
    fake.core.rms_norm(*arrays[:2], out=arrays[2], stream=stream)
    assert seen == [number] * 3
    assert out.tobytes() == expected(x, weight)
    assert fake.work() == [f"norm 0: {0 if number == 1 else number}"]


def test_producers_are_told_another_array_s_stream(fake: Fake) -> None:
    seen = []
    x, weight, out = case()
    made = capsule(x, hook=lambda array, keywords: seen.append(keywords), refuses_max_version=True)
    fake.core.rms_norm(made, Interface(weight, stream=32), out=Interface(out, stream=48))
    assert seen == [{"stream": 32}]
    assert fake.work() == ["order 0: 48 before 32", "norm 0: 32", "order 0: 32 before 48"]


def test_managed_memory_is_on_the_others_device(fake: Fake) -> None:
    x, weight, out = case()
    managed = capsule(weight, device_type=13)
    fake.core.rms_norm(capsule(x, device_id=1), managed, out=capsule(out, device_id=1))
    assert fake.work() == ["norm 1: 0"]
    fake.core.rms_norm(managed_x := capsule(x, device_type=13), managed, out=capsule(out, device_id=1))
    assert fake.work() == ["norm 1: 0"]
    fake.core.rms_norm(managed_x, out=managed_x)
    assert fake.work() == ["norm 0: 0"]
    with pytest.raises(ValueError, match="weight is on cuda:1, but x is on cuda:0"):
        fake.core.rms_norm(capsule(x), capsule(weight, device_id=1), out=capsule(out))


def outstanding() -> int:
    count: int = stub_module().counters()["outstanding"]
    return count


def test_memory_outlives_the_kernel(fake: Fake) -> None:
    x, _, out = case()
    before = outstanding()
    fake.set("busy", 1)
    for _ in range(3):
        fake.core.rms_norm(capsule(x), out=capsule(out))
        gc.collect()
    assert outstanding() == before + 6
    for _ in range(100):
        fake.core.rms_norm(capsule(x), out=capsule(out))
    assert outstanding() == before + 2 * 64, "the oldest is waited for"
    assert not any(line.startswith("finish") for line in fake.log()[:9])
    fake.set("busy", 0)
    fake.core.rms_norm(f32(4, 8))
    assert outstanding() == before
    assert fake.log()[-1] == "finish, 0 left"


def test_memory_in_a_capture_and_after_an_error_is_released(fake: Fake) -> None:
    x, _, out = case()
    before = outstanding()
    fake.set("busy", 1)
    fake.set("capturing", 1)
    fake.core.rms_norm(capsule(x), out=capsule(out))
    assert outstanding() == before
    fake.set("capturing", 0)
    fake.set("fails", 1)
    with pytest.raises(RuntimeError, match="cudaErrorFake"):
        fake.core.rms_norm(capsule(x), out=capsule(out))
    assert outstanding() == before


def test_a_deleter_may_call_again(fake: Fake) -> None:
    x, _, out = case()
    calls = []

    def again() -> None:
        calls.append(fake.core.rms_norm(capsule(f32(4, 8)), out=capsule(np.zeros((4, 8), np.float32))))

    before = outstanding()
    fake.set("busy", 1)
    for _ in range(5):
        fake.core.rms_norm(capsule(x, on_delete=again), out=capsule(out))
    fake.set("busy", 0)
    for _ in range(3):
        fake.core.rms_norm(f32(4, 8))
    assert len(calls) == 5
    assert outstanding() == before


def test_a_build_whose_driver_is_missing(fake: Fake) -> None:
    """In a fresh module, since one that has met a device does not ask again."""
    core: Any = fake.fresh()
    fake.set("reason", 1)
    x, _, out = case()
    for array in (Interface(x), capsule(x)):
        with pytest.raises(
            RuntimeError, match=r"^rms_norm: x is on .*no CUDA device can be used: the fake has no driver"
        ):
            core.rms_norm(array, out=Interface(out))
    fake.set("reason", 0)
    core.rms_norm(Interface(x), out=Interface(out))
    assert out.tobytes() == expected(x)


# ---- the promise about weights ----


def promised(fake: Fake, weight: bool = True) -> bool:
    x, w, out = case()
    fake.core.rms_norm(Interface(x), Interface(w) if weight else None, out=Interface(out))
    return fake.log() == ["norm 0: 0, constant"]


def test_weights_are_constant(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusednorm._weights._core", fake.core)
    assert not promised(fake)
    with fusednorm.weights_are_constant():
        assert promised(fake)
        assert not promised(fake, weight=False)
        with fusednorm.weights_are_constant(False):
            assert not promised(fake)
            fake.core.set_weights_are_constant(True)
            assert not promised(fake), "the nearest context wins"
            fake.core.set_weights_are_constant(False)
        assert promised(fake)
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(promised(fake)))
        thread.start()
        thread.join()
        assert elsewhere == [False], "a promise is for one thread"
        assert not fake.core.get_weights_are_constant()
    assert not promised(fake)
    fake.core.set_weights_are_constant(True)
    assert fake.core.get_weights_are_constant()
    assert promised(fake)
    for function in (fusednorm.weights_are_constant, fake.core.set_weights_are_constant):
        make: Callable[[Any], Any] = function
        for wrong in (1, None, "yes"):
            with pytest.raises(TypeError, match="weights_are_constant: constant is "):
                make(wrong)
