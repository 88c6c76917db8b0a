"""CuPy, JAX, arrays with nothing but `__cuda_array_interface__`, and mixtures of them with torch, on a GPU.

Values are written by torch and by copies, so that CuPy compiles no kernel. JAX has a process of its own, since
conftest.py keeps it on the CPU here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_tensors
import helpers
import numpy as np
import pytest
from cuda_tensors import SLEEP, on_cpu, same, tensors

import fusednorm

torch = cuda_tensors.require()
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")


@pytest.fixture(autouse=True)
def _ready() -> Iterator[None]:
    yield
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def cp() -> Any:
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    if cupy.cuda.runtime.getDeviceCount() < 1:
        pytest.skip("CuPy finds no device")
    return cupy


def use(cp: Any, stream: Any) -> Any:
    """torch's stream as CuPy's current one."""
    if hasattr(cp.cuda.Stream, "from_external"):
        return cp.cuda.Stream.from_external(stream)
    return cp.cuda.ExternalStream(stream.cuda_stream)


def bits(cp: Any, array: Any) -> bytes:
    """The values, after all work."""
    cp.cuda.Device().synchronize()
    return cp.asnumpy(array).tobytes()  # type: ignore[no-any-return]


def random(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(helpers.SEED).standard_normal(shape, np.float32).astype(dtype)


# ---- CuPy ----


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cupy(cp: Any, dtype: str) -> None:
    x, weight = random(64, 1024, dtype=dtype), random(1024, dtype=dtype)
    given, w = cp.asarray(x), cp.asarray(weight)
    expected = fusednorm.rms_norm(x, weight).tobytes()
    result = fusednorm.rms_norm(given, w)
    assert (type(result), result.dtype, result.flags.c_contiguous) == (cp.ndarray, given.dtype, True)
    assert bits(cp, result) == expected
    turned = cp.asarray(np.ascontiguousarray(x.T)).T
    assert bits(cp, fusednorm.rms_norm(turned, w)) == expected
    assert (
        bits(cp, fusednorm.rms_norm(given[:, ::-1], w[::-1])) == fusednorm.rms_norm(x[:, ::-1], weight[::-1]).tobytes()
    )
    half = fusednorm.rms_norm(given, out_dtype="float16")
    assert half.dtype == np.float16
    assert bits(cp, half) == fusednorm.rms_norm(x, out_dtype="float16").tobytes()
    out = cp.empty_like(given)
    assert fusednorm.rms_norm(given, w, out=out) is out
    assert bits(cp, out) == expected
    residual = random(65, 1024, dtype=dtype)[1:]
    resident = cp.asarray(residual)
    wanted = fusednorm.fused_add_rmsnorm(x, residual, weight, inplace=False)
    got = fusednorm.fused_add_rmsnorm(given, resident, w)
    assert got[0] is given
    assert [bits(cp, array) for array in got] == [array.tobytes() for array in wanted]
    assert fusednorm.rms_norm(cp.empty((0, 1024), dtype), w).shape == (0, 1024)


def test_cupy_bfloat16(cp: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = random(64, 1024, dtype=ml_dtypes.bfloat16)
    try:
        given = cp.asarray(x)
    except (TypeError, ValueError, KeyError):
        with pytest.raises(TypeError, match="out_dtype is bfloat16, which this CuPy does not have"):
            fusednorm.rms_norm(cp.asarray(random(4, 8)), out_dtype="bfloat16")
        return
    result = fusednorm.rms_norm(given)
    assert result.dtype == x.dtype
    assert bits(cp, result) == fusednorm.rms_norm(x).tobytes()


def test_cupy_s_current_stream(cp: Any) -> None:
    side = torch.cuda.Stream()
    for first in (True, False):
        x, weight = tensors(dtype=torch.float32)
        expected = on_cpu(2 * x, weight)
        given, w = cp.from_dlpack(x), cp.from_dlpack(weight)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            x.mul_(2)
        with use(cp, side):
            result = fusednorm.rms_norm(given, w)
        assert first or not side.query(), "the call has waited"  # the first may load kernels, which waits
        assert bits(cp, result) == expected.numpy().tobytes()


def test_cupy_on_a_given_stream(cp: Any) -> None:
    """The arrays are dropped while the kernel that reads them is queued, and their memory is asked for again."""
    side = torch.cuda.Stream()
    for _ in range(10):
        x, weight = random(256, 1024), random(1024)
        given, w = cp.asarray(x), cp.asarray(weight)
        cp.cuda.Device().synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP // 4)
        result = fusednorm.rms_norm(given, w, stream=side)
        del given, w
        others = [cp.asarray(np.full((256, 1024), 7, np.float32)) for _ in range(4)]
        assert bits(cp, result) == fusednorm.rms_norm(x, weight).tobytes()
        del others


def test_cupy_graph(cp: Any) -> None:
    given, w = cp.asarray(random(64, 1024)), cp.asarray(random(1024))
    out = cp.empty_like(given)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        fusednorm.rms_norm(given, w, out=out)
        graph = stream.end_capture()
    for factor in (1, 2, 3):
        x = random(64, 1024) * np.float32(factor) + np.float32(factor)
        given.set(x)
        cp.cuda.Device().synchronize()
        graph.launch(stream=stream)
        assert bits(cp, out) == fusednorm.rms_norm(x, cp.asnumpy(w)).tobytes()


@two_devices
def test_cupy_on_another_device_than_the_current(cp: Any) -> None:
    x = random(64, 1024)
    with cp.cuda.Device(1):
        given = cp.asarray(x)
        cp.cuda.Device().synchronize()
    result = fusednorm.rms_norm(given)
    assert (result.device.id, cp.cuda.Device().id) == (1, 0)
    with cp.cuda.Device(1):
        assert bits(cp, result) == fusednorm.rms_norm(x).tobytes()


@pytest.mark.parametrize("late", ["torch", "cupy"])
@pytest.mark.parametrize("first", ["torch", "cupy"])
def test_torch_and_cupy_on_different_streams(cp: Any, first: str, late: str) -> None:
    """One framework's stream is late; after the call each overwrites its input on its own stream."""
    x, weight = tensors(dtype=torch.float32)
    out = torch.zeros_like(x)
    expected = on_cpu(2 * x, 2 * weight)
    streams = {"torch": torch.cuda.Stream(), "cupy": torch.cuda.Stream()}
    own, foreign = (x, weight) if first == "torch" else (weight, x)
    with use(cp, streams["cupy"]), torch.cuda.stream(streams["torch"]):
        held = cp.from_dlpack(foreign)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[late]):
            torch.cuda._sleep(SLEEP)
        own.mul_(2)
        with torch.cuda.stream(streams["cupy"]):
            foreign.mul_(2)
        fusednorm.rms_norm(*((own, held) if first == "torch" else (held, own)), out=out)
        own.zero_()
        with torch.cuda.stream(streams["cupy"]):
            foreign.zero_()
        copied = out.clone()
    torch.cuda.synchronize()
    assert same(copied, expected)


# ---- __cuda_array_interface__ ----


class Interface:
    """As Numba's device arrays: nothing but the interface."""

    def __init__(self, tensor: Any, stream: int | None = None) -> None:
        typestr = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<V2"}[tensor.dtype]
        self.tensor, self.dtype = tensor, str(tensor.dtype).removeprefix("torch.")
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": typestr,
            "data": (tensor.data_ptr(), False),
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
            "version": 3,
            "stream": stream,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_interface(dtype: Any) -> None:
    x, weight = tensors(dtype=dtype)
    out = torch.zeros_like(x)
    given = Interface(out)
    assert fusednorm.rms_norm(Interface(x), Interface(weight), out=given) is given
    torch.cuda.synchronize()
    assert same(out, on_cpu(x, weight))
    with pytest.raises(TypeError, match="give the outputs"):
        fusednorm.rms_norm(Interface(x))
    host = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"^rms_norm: x"):
        fusednorm.rms_norm(Interface(host), out=Interface(host))


def test_interface_streams_are_ordered() -> None:
    x, weight = tensors()
    out = torch.zeros_like(x)
    expected = on_cpu(2 * x, weight)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        x.mul_(2)
    fusednorm.rms_norm(Interface(x, side.cuda_stream), weight, out=out)
    with torch.cuda.stream(side):
        x.zero_()
    torch.cuda.synchronize()
    assert same(out, expected)


# ---- JAX, processes ----


def run(code: str, **environment: str) -> str:
    """Runs the code in a process of its own; what it printed."""
    prelude = "import os, sys\nimport numpy as np\nimport fusednorm\n"
    root = str(Path(fusednorm.__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


JAX = """
import jax, jax.numpy as jnp
assert jax.devices()[0].platform == "gpu"
same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
on_cpu = lambda *a, **k: fusednorm.rms_norm(*(np.asarray(v) for v in a), **k)
key = jax.random.key(7)
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    x = jax.random.normal(key, (300, 4096), dtype)
    w = jax.random.normal(key, (4096,), dtype)
    y = fusednorm.rms_norm(x, w)
    assert isinstance(y, jax.Array) and y.dtype == dtype and y.devices() == x.devices(), y.devices()
    assert same(y, on_cpu(x, w))
    assert same(fusednorm.rms_norm(x, w, out_dtype=jnp.float32), on_cpu(x, w, out_dtype="float32"))
    a, b = fusednorm.fused_add_rmsnorm(x, x, w, inplace=False)
    c, d = fusednorm.fused_add_rmsnorm(np.asarray(x), np.asarray(x), np.asarray(w), inplace=False)
    assert same(a, c) and same(b, d)
    z = x
    for _ in range(200):  # results straight into JAX's work and back, inputs dropped at once
        z = fusednorm.rms_norm(z * 1, w) + x
    e = np.asarray(x)
    e_w = np.asarray(w)
    for _ in range(200):
        e = np.asarray(jnp.asarray(fusednorm.rms_norm(e, e_w)) + x)
    assert same(z, e)
    assert same(x, jax.random.normal(key, (300, 4096), dtype)), "an input was written"
for wrong in (lambda: fusednorm.rms_norm(x, w, out=x), lambda: fusednorm.fused_add_rmsnorm(x, x, w)):
    try:
        wrong()
    except BufferError as error:
        assert "jax" in str(error)
    else:
        raise AssertionError("a jax array was written")
assert fusednorm.rms_norm(jnp.zeros((0, 8))).shape == (0, 8)
print("done")
"""


def test_jax() -> None:
    pytest.importorskip("jax", reason="needs jax")
    probe = run("import jax\nprint(jax.default_backend())", JAX_PLATFORMS="", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if "gpu" not in probe:
        pytest.skip("this jax has no GPU")
    output = run(JAX, JAX_PLATFORMS="cuda,cpu", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    assert output.endswith("done\n")


SAME_BITS = """
import hashlib, torch
torch.manual_seed(3)
x, w = torch.randn(64, 1024, device="cuda"), torch.randn(1024, device="cuda")
for _ in range(100):
    x = fusednorm.rms_norm(x, w)
    w = w * 1.5
    w = w / 1.5
print(hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest())
"""


def test_without_dependent_launch() -> None:
    assert run(SAME_BITS, FUSEDNORM_PDL="0") == run(SAME_BITS, FUSEDNORM_PDL="1")


OLD_TORCH = """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = 0
x, w, out = (torch.ones(*n, device="cuda") for n in ((64, 1024), (1024,), (64, 1024)))
ramp = torch.arange(1024, device="cuda")
side = torch.cuda.Stream()
for delay in (1, 200_000_000):
    x.fill_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(delay)
        x.mul_(ramp)
        fusednorm.rms_norm(x, w, out=out)
        copied = out.clone()
    torch.cuda.synchronize()
    assert torch.equal(copied.cpu(), torch.from_numpy(fusednorm.rms_norm(x.cpu().numpy())))
print("done")
"""


def test_a_torch_without_the_exchange_api() -> None:
    """Its tensors come by `__dlpack__`, on torch's current stream all the same."""
    assert run(OLD_TORCH) == "done\n"
