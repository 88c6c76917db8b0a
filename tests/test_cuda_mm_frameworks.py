"""Products on CUDA: wrong calls, streams, and arrays of torch, CuPy, JAX and bare interfaces."""

from __future__ import annotations

from typing import Any

import helpers
import numpy as np
import pytest
from cuda_tensors import SLEEP, same
from test_cuda_frameworks import Interface, bits, cp, random, run, use  # noqa: F401  (cp is a fixture)
from test_cuda_mm_rows import empty, make, product, torch

import fusednorm

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")


def wrong_calls() -> dict[str, tuple[type[BaseException], str, tuple[Any, ...], dict[str, Any]]]:
    a, b, bias, out = make(4, 8), make(8, 3), make(3), empty(4, 3)
    square = make(8, 8)
    return {
        "b on the CPU": (ValueError, "b is on cpu:0, but a is on cuda:0", (a, b.cpu()), {}),
        "a on the CPU": (ValueError, "b is on cuda:0, but a is on cpu:0", (a.cpu(), b), {}),
        "bias on the CPU": (ValueError, "bias is on cpu:0", (a, b), {"bias": bias.cpu()}),
        "out on the CPU": (ValueError, "out is on cpu:0", (a, b), {"out": out.cpu()}),
        "float64": (TypeError, "a .*float64", (a.double(), b), {}),
        "int32": (TypeError, "b .*int32", (a, b.int()), {}),
        "out_dtype": (TypeError, "float64", (a, b), {"out_dtype": torch.float64}),
        "shape": (ValueError, r"b has shape \(7, 3\)", (a, b[:7]), {}),
        "out's shape": (ValueError, r"out has shape \(3, 4\)", (a, b), {"out": empty(3, 4)}),
        "gradient": (RuntimeError, "no_grad", (a, b.clone().requires_grad_()), {}),
        "out is a": (ValueError, "out overlaps a", (square, make(8, 8, key=1)), {"out": square}),
        "out in b": (ValueError, "out overlaps b", (make(8, 8, key=1), square), {"out": square}),
        "out upon itself": (ValueError, "overlap each other", (a, b), {"out": empty(1, 3).expand(4, 3)}),
    }


@pytest.mark.parametrize("what", wrong_calls())
def test_wrong_call(what: str) -> None:
    exception, words, operands, keywords = wrong_calls()[what]
    arrays = [value.detach() for value in (*operands, *keywords.values()) if isinstance(value, torch.Tensor)]
    held = [array.clone() for array in arrays]
    with pytest.raises(exception, match=rf"^mm_dtype: .*{words}"):
        fusednorm.mm_dtype(*operands, **keywords)
    torch.cuda.synchronize()
    assert all(torch.equal(array.nan_to_num(777), before.nan_to_num(777)) for array, before in zip(arrays, held))


@two_devices
def test_another_device_than_the_current() -> None:
    a, b = make(40, 512, dtype="float32").to("cuda:1"), make(512, 70, dtype="float32").to("cuda:1")
    result = fusednorm.mm_dtype(a, b)
    assert (result.device, torch.cuda.current_device()) == (a.device, 0)
    torch.cuda.synchronize(1)
    assert same(result, fusednorm.mm_dtype(a.cpu(), b.cpu()))
    with pytest.raises(ValueError, match="b is on cuda:0, but a is on cuda:1"):
        fusednorm.mm_dtype(a, b.to("cuda:0"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_streams(dtype: str) -> None:
    """torch's current stream, and a given one: a is written late there."""
    for m in (1, 40, 300):
        a, b = make(m, 1024, dtype=dtype), make(256, 1024, dtype=dtype, key="weight").T
        expected = product(2 * a, b)
        side = torch.cuda.Stream()
        for given in (False, True):
            late = a.clone()
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                torch.cuda._sleep(SLEEP // 4)
                late.mul_(2)
            if given:
                result = fusednorm.mm_dtype(late, b, "float32", stream=side)
            else:
                with torch.cuda.stream(side):
                    result = fusednorm.mm_dtype(late, b, "float32")
            side.synchronize()
            assert same(result, expected), (m, given)


def test_torch_is_told_that_out_was_written() -> None:
    out = empty(4, 3)
    version = out._version
    assert fusednorm.mm_dtype(make(4, 8), make(8, 3), out=out) is out
    assert out._version == version + 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cupy(cp: Any, dtype: str) -> None:  # noqa: F811
    a, b = random(64, 512, dtype=dtype), random(512, 96, dtype=dtype)
    given, weight = cp.asarray(a), cp.asarray(np.ascontiguousarray(b.T)).T
    result = fusednorm.mm_dtype(given, weight, "float32")
    assert (type(result), result.dtype, result.flags.c_contiguous) == (cp.ndarray, np.float32, True)
    on_torch = product(torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda())
    assert bits(cp, result) == on_torch.cpu().numpy().tobytes()
    if dtype == "float32":
        assert bits(cp, result) == fusednorm.mm_dtype(a, b).tobytes()
    out = cp.empty((64, 96), np.float32)
    cp.cuda.Device().synchronize()
    with use(cp, torch.cuda.Stream()):
        assert fusednorm.mm_dtype(given, weight, out=out) is out
    assert bits(cp, out) == bits(cp, result)


def test_interface() -> None:
    a, b = make(40, 512), make(512, 70)
    out, expected = empty(40, 70), product(a, b)
    given = Interface(out)
    assert fusednorm.mm_dtype(Interface(a), Interface(b), out=given) is given
    torch.cuda.synchronize()
    assert same(out, expected)
    out.fill_(0)
    fusednorm.mm_dtype(Interface(a), b, out=out)
    torch.cuda.synchronize()
    assert same(out, expected)
    with pytest.raises(TypeError, match="give the outputs"):
        fusednorm.mm_dtype(Interface(a), Interface(b))


JAX = """
import jax, jax.numpy as jnp
assert jax.devices()[0].platform == "gpu"
same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    a = jax.random.randint(jax.random.key(1), (40, 1000), -8, 9).astype(dtype)
    b = jax.random.randint(jax.random.key(2), (1000, 70), -8, 9).astype(dtype)
    y = fusednorm.mm_dtype(a, b, jnp.float32)
    assert isinstance(y, jax.Array) and y.dtype == jnp.float32 and y.shape == (40, 70) and y.devices() == a.devices()
    exact = np.asarray(a).astype(np.float64) @ np.asarray(b).astype(np.float64)
    assert (np.asarray(y) == exact).all()
    assert same(fusednorm.mm_dtype(a, b), y.astype(dtype))
    logits = fusednorm.router_logits(a.reshape(4, 10, 1000), b.T, "DeepSeekV3")
    assert same(logits, y.reshape(4, 10, 70))
    if dtype == jnp.float32:
        x = jax.random.normal(jax.random.key(3), (40, 1000), dtype)
        assert same(fusednorm.mm_dtype(x, b), fusednorm.mm_dtype(np.asarray(x), np.asarray(b)))
try:
    fusednorm.mm_dtype(a, b, out=y)
except BufferError as error:
    assert "jax" in str(error)
else:
    raise AssertionError("a jax array was written")
assert fusednorm.mm_dtype(jnp.zeros((0, 8)), jnp.zeros((8, 3))).shape == (0, 3)
print("done")
"""


def test_jax() -> None:
    pytest.importorskip("jax", reason="needs jax")
    probe = run("import jax\nprint(jax.default_backend())", JAX_PLATFORMS="", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if "gpu" not in probe:
        pytest.skip("this jax has no GPU")
    output = run(JAX, JAX_PLATFORMS="cuda,cpu", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    assert output.endswith("done\n"), helpers.SEED


SAME_BITS = """
import hashlib, torch
torch.manual_seed(3)
hashes = []
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
for m, n, dtype in ((1, 512, bf16), (40, 512, bf16), (300, 640, fp16), (40, 512, fp32)):
    w = [torch.randn(n, n, device="cuda", dtype=torch.float32).mul_(n**-0.5).to(dtype) for _ in range(5)]
    x = torch.randn(m, n, device="cuda").to(dtype)
    for i in range(100):
        x = fusednorm.mm_dtype(x, w[i % 5].T)
        x = fusednorm.rms_norm(x)
    hashes.append(hashlib.sha256(x.float().cpu().numpy().tobytes()).hexdigest())
print(hashes)
"""


def test_without_dependent_launch() -> None:
    """Chains of products and norms, each of which reads what the one ahead of it writes."""
    assert run(SAME_BITS, FUSEDNORM_PDL="0") == run(SAME_BITS, FUSEDNORM_PDL="1")
