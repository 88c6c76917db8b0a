"""SEMANTICS against the code that each preset names, where it runs on a CPU; on the reference, as all paths equal it.

A right preset leaves the order of the sum and 1/sqrt to differ: fewer than one 16-bit element in 1000. A wrong rounding
point moves more than one in 20. Both are asserted, so that a preset which rounds anywhere else fails.
"""

from __future__ import annotations

import warnings
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, bits, from_float32

from fusednorm._reference import fold, fused_add_rmsnorm, rms_norm, rsqrt, widen
from fusednorm._semantics import SEMANTICS

Array = np.ndarray[Any, Any]
HALVES = [dtype for dtype in DTYPES if dtype != "float32"]
ROWS, COLUMNS = 256, 1024
EPS = 1e-6
RIGHT, WRONG = 1e-3, 0.05  # shares of elements that differ: at most, at least


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch", reason="the presets describe torch code")
    with module.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # F.rms_norm warns of a weight in another dtype
        yield module


@pytest.fixture
def models(torch: Any) -> Any:
    return pytest.importorskip("transformers.models", reason="hf_llama and gemma describe transformers' own modules")


def tensor(torch: Any, a: Array) -> Any:
    return (
        torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype.name == "bfloat16" else torch.from_numpy(a)
    )


def ndarray(torch: Any, t: Any) -> Array:
    t = t.detach().contiguous()
    return t.view(torch.int16).numpy().view("bfloat16") if t.dtype == torch.bfloat16 else t.numpy()


def random(rng: np.random.Generator, shape: Any, dtype: str, scale: float = 1.0, shift: float = 0.0) -> Array:
    return from_float32(rng.standard_normal(shape, np.float32) * np.float32(scale) + np.float32(shift), dtype)


def share(a: Array, b: Array) -> float:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return float(np.mean(bits(a) != bits(b)))


def check(name: str, expected: Array, x: Array, r: Array | None, w: Array, wrong: list[dict[str, Any]]) -> None:
    """`expected` is what the preset gives, and not what it gives with any of the changes in `wrong`."""
    keywords = dict(SEMANTICS[name].rms_norm if r is None else SEMANTICS[name].fused_add_rmsnorm)

    def ours(options: dict[str, Any]) -> Array:
        options = {**options, "out_dtype": expected.dtype}
        return rms_norm(x, w, EPS, **options) if r is None else fused_add_rmsnorm(x, r, w, EPS, **options)[0]

    different = share(ours(keywords), expected)
    assert different < RIGHT, f"{name}: {different:.3%} of the elements differ"
    for change in wrong:
        moved = share(ours({**keywords, **change}), expected)
        assert moved > WRONG, f"{name} with {change}: only {moved:.3%} of the elements differ"


# The table itself


def test_presets_are_read_only_keyword_sets() -> None:
    assert list(SEMANTICS) == ["hf_llama", "gemma", "flashinfer", "sglang", "vllm", "torch"]
    x, w = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    for name, preset in SEMANTICS.items():
        assert preset.name == name
        assert preset.source
        assert preset.differs
        assert set(preset.rms_norm) == {"cast_x_before_out_mul", "weight_offset"}
        assert dict(preset.fused_add_rmsnorm) == {**preset.rms_norm, "round_sum": preset.fused_add_rmsnorm["round_sum"]}
        rms_norm(x, w, **preset.rms_norm)
        fused_add_rmsnorm(x, x, w, **preset.fused_add_rmsnorm)
        for keywords in (preset.rms_norm, preset.fused_add_rmsnorm):
            with pytest.raises(TypeError):
                keywords["weight_offset"] = 2.0  # type: ignore[index]
        with pytest.raises(FrozenInstanceError):
            preset.rms_norm = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        SEMANTICS["mine"] = SEMANTICS["torch"]  # type: ignore[index]


# transformers


@pytest.mark.parametrize("weight_dtype", ["of x", "float32"])
@pytest.mark.parametrize("dtype", HALVES)
def test_hf_llama(models: Any, torch: Any, dtype: str, weight_dtype: str, rng: np.random.Generator) -> None:
    """An fp32 weight promotes the result to fp32: out_dtype says so."""
    x, r = random(rng, (ROWS, COLUMNS), dtype), random(rng, (ROWS, COLUMNS), dtype, 3.0)
    w = random(rng, COLUMNS, dtype if weight_dtype == "of x" else weight_dtype, 0.3, 1.0)
    module = models.llama.modeling_llama.LlamaRMSNorm(COLUMNS, EPS)
    module.weight.data = tensor(torch, w)
    total = tensor(torch, r) + tensor(torch, x)
    assert share(fused_add_rmsnorm(x, r, w)[1], ndarray(torch, total)) == 0
    expected = ndarray(torch, module(total))
    assert expected.dtype == w.dtype
    check("hf_llama", expected, x, r, w, [{"cast_x_before_out_mul": False}, {"round_sum": False}])
    expected = ndarray(torch, module(tensor(torch, x)))
    check("hf_llama", expected, x, None, w, [{"cast_x_before_out_mul": False}])


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_inside_a_decoder_layer(models: Any, torch: Any, name: str, rng: np.random.Generator) -> None:
    """The residual sum and the norm of a whole layer in bfloat16, seen through hooks: transformers rounds the sum."""
    if "bfloat16" not in DTYPES:
        pytest.skip("ml_dtypes is not installed")
    title, family = name.capitalize(), getattr(models, name)
    config = getattr(family, f"configuration_{name}")
    modeling = getattr(family, f"modeling_{name}")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 64, "rms_norm_eps": EPS, "pad_token_id": 0}
    torch.manual_seed(int(rng.integers(1 << 30)))
    model = getattr(modeling, f"{title}Model")(getattr(config, f"{title}Config")(**sizes, **heads)).to(torch.bfloat16)
    layer = model.layers[0]
    layer.post_attention_layernorm.weight.data.normal_(1.0, 0.3)
    seen: dict[str, Array] = {}

    def keep(key: str, value: Any) -> None:
        seen[key] = ndarray(torch, value[0] if isinstance(value, tuple) else value)[0].copy()

    layer.register_forward_pre_hook(
        lambda m, a, k: keep("residual", a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    layer.self_attn.register_forward_hook(lambda m, a, out: keep("x", out))
    layer.post_attention_layernorm.register_forward_hook(lambda m, a, out: (keep("sum", a), keep("out", out))[0])
    model(inputs_embeds=tensor(torch, random(rng, (1, ROWS, 256), "bfloat16", 0.5)))
    w = ndarray(torch, layer.post_attention_layernorm.weight)
    preset = "hf_llama" if name == "llama" else "gemma"
    residual_out = fused_add_rmsnorm(seen["x"], seen["residual"], w, EPS, **SEMANTICS[preset].fused_add_rmsnorm)[1]
    assert share(residual_out, seen["sum"]) == 0
    check(preset, seen["out"], seen["x"], seen["residual"], w, [{"round_sum": False}])


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gemma(models: Any, torch: Any, dtype: str, family: str, rng: np.random.Generator) -> None:
    x, r = random(rng, (ROWS, COLUMNS), dtype), random(rng, (ROWS, COLUMNS), dtype, 3.0)
    w = random(rng, COLUMNS, dtype, 0.3)
    modeling = getattr(getattr(models, family), f"modeling_{family}")
    module = getattr(modeling, f"{family.capitalize()}RMSNorm")(COLUMNS, EPS)
    module.weight.data = tensor(torch, w)
    expected = ndarray(torch, module(tensor(torch, r) + tensor(torch, x)))
    check("gemma", expected, x, r, w, [{"cast_x_before_out_mul": True}, {"round_sum": False}, {"weight_offset": 0.0}])
    one_plus_w = from_float32(np.float32(1) + widen(w), dtype)  # the trap: 1 + w rounded to 16 bits
    moved = share(fused_add_rmsnorm(x, r, one_plus_w, EPS, round_sum=True)[0], expected)
    assert moved > WRONG


@pytest.mark.parametrize("dtype", HALVES)
def test_gemma4_does_not_add_one(models: Any, torch: Any, dtype: str, rng: np.random.Generator) -> None:
    modeling = pytest.importorskip("transformers.models.gemma4.modeling_gemma4", reason="an older transformers")
    x, r = random(rng, (ROWS, COLUMNS), dtype), random(rng, (ROWS, COLUMNS), dtype, 3.0)
    w = random(rng, COLUMNS, dtype, 0.3, 1.0)
    module = modeling.Gemma4RMSNorm(COLUMNS, EPS)
    module.weight.data = tensor(torch, w)
    expected = ndarray(torch, module(tensor(torch, r) + tensor(torch, x)))
    check("torch", expected, x, r, w, [{"weight_offset": 1.0}, {"cast_x_before_out_mul": True}, {"round_sum": False}])


# torch


@pytest.mark.parametrize("weight_dtype", ["of x", "float32"])
@pytest.mark.parametrize("dtype", HALVES)
def test_torch(torch: Any, dtype: str, weight_dtype: str, rng: np.random.Generator) -> None:
    x, r = random(rng, (ROWS, COLUMNS), dtype), random(rng, (ROWS, COLUMNS), dtype, 3.0)
    w = random(rng, COLUMNS, dtype if weight_dtype == "of x" else weight_dtype, 0.3, 1.0)
    norm = torch.nn.functional.rms_norm
    expected = ndarray(torch, norm(tensor(torch, x), (COLUMNS,), tensor(torch, w), EPS))
    assert expected.dtype == x.dtype
    check("torch", expected, x, None, w, [{"cast_x_before_out_mul": True}])
    total = tensor(torch, x) + tensor(torch, r)
    expected = ndarray(torch, norm(total, (COLUMNS,), tensor(torch, w), EPS))
    check("torch", expected, x, r, w, [{"cast_x_before_out_mul": True}, {"round_sum": False}])


def test_torch_in_fp32_differs_by_a_few_ulp(torch: Any, rng: np.random.Generator) -> None:
    """No rounding point is left in fp32: what differs is the order of the sum and 1/sqrt, and it shows."""
    x, w = random(rng, (ROWS, COLUMNS), "float32"), random(rng, COLUMNS, "float32", 0.3, 1.0)
    expected = ndarray(torch, torch.nn.functional.rms_norm(tensor(torch, x), (COLUMNS,), tensor(torch, w), EPS))
    out = rms_norm(x, w, EPS, **SEMANTICS["torch"].rms_norm)
    assert np.abs(bits(out).astype(np.int64) - bits(expected).astype(np.int64)).max() <= 8
    assert share(out, expected) > WRONG


@pytest.mark.parametrize("dtype", HALVES)
def test_eps_none(torch: Any, dtype: str, rng: np.random.Generator) -> None:
    """torch takes finfo(float32).eps for 16-bit inputs; rms_norm_batch_invariant takes finfo(input.dtype).eps."""
    from fusednorm._reference import rms_norm_batch_invariant

    x = random(rng, (ROWS, COLUMNS), dtype, 1e-3)
    expected = ndarray(torch, torch.nn.functional.rms_norm(tensor(torch, x), (COLUMNS,)))
    assert share(rms_norm(x, eps=2.0**-23), expected) < RIGHT
    assert share(rms_norm_batch_invariant(x, (COLUMNS,)), expected) > 0.99
    assert share(rms_norm_batch_invariant(x, (COLUMNS,), None, 2.0**-23), expected) < RIGHT
    x = random(rng, (ROWS, COLUMNS), "float32", 1e-3)
    expected = ndarray(torch, torch.nn.functional.rms_norm(tensor(torch, x), (COLUMNS,)))
    np.testing.assert_allclose(rms_norm_batch_invariant(x, (COLUMNS,)), expected, rtol=1e-6)


# The GPU kernels' rounding points, stated in torch operations


@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_stated_in_torch(torch: Any, dtype: str, rng: np.random.Generator) -> None:
    x, r = random(rng, (ROWS, COLUMNS), dtype), random(rng, (ROWS, COLUMNS), dtype, 3.0)
    w = random(rng, COLUMNS, dtype, 0.3, 1.0)
    a, b, c = (tensor(torch, v) for v in (x, r, w))

    def inverse(s: Any) -> Any:
        return torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + EPS)

    exact_sum, rounded_sum = a.float() + b.float(), (a + b).float()
    statements = {
        "flashinfer": (exact_sum * inverse(exact_sum) * c.float(), {"round_sum": True}),
        "sglang": (exact_sum * inverse(exact_sum) * c.float(), {"round_sum": True}),
        "vllm": (rounded_sum * inverse(rounded_sum) * c.float(), {"round_sum": False}),
    }
    for name, (statement, wrong) in statements.items():
        expected = ndarray(torch, statement.to(a.dtype))
        check(name, expected, x, r, w, [wrong, {"cast_x_before_out_mul": True}])
        plain = ndarray(torch, (a.float() * inverse(a.float()) * c.float()).to(a.dtype))
        check(name, plain, x, None, w, [{"cast_x_before_out_mul": True}])
    # SGLang's JIT kernel: the variance of the exact sum, the rounded sum normalised, the weight multiplied first.
    jit = ndarray(torch, (rounded_sum * c.float() * inverse(exact_sum)).to(a.dtype))
    assert share(fused_add_rmsnorm(x, r, w, EPS, round_sum="after_variance")[0], jit) < RIGHT
    # vLLM's native operators, and SGLang's layers with cast_x_before_out_mul: the exact sum, rounded before the weight.
    native = ndarray(torch, (exact_sum * inverse(exact_sum)).to(a.dtype) * c)
    assert share(fused_add_rmsnorm(x, r, w, EPS, cast_x_before_out_mul=True)[0], native) < RIGHT


@pytest.mark.parametrize("dtype", HALVES)
def test_products_in_another_order(dtype: str, rng: np.random.Generator) -> None:
    """(s * w) * r instead of (s * r) * w: a third of the fp32 elements differ, few of the 16-bit ones."""
    x, w = random(rng, (ROWS, COLUMNS), dtype), random(rng, COLUMNS, "float32", 0.3, 1.0)
    s = widen(x)
    r = rsqrt(fold(s * s) / np.float32(COLUMNS) + np.float32(EPS))
    other = (s * widen(w)) * r
    assert 0.2 < share(rms_norm(x, w, EPS, out_dtype="float32"), other) < 0.6
    assert share(rms_norm(x, w, EPS), from_float32(other, dtype)) < RIGHT
