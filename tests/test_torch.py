"""PyTorch tensors: every dtype and layout, gradients never lost, writes never hidden, odd tensors never misread."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, HAVE_BFLOAT16, assert_same_bits, from_torch, operands, to_torch

from fusednorm import _reference

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_out_of_place(cpu_path: Any, dtype: str) -> None:
    x, residual, weight = operands(dtype, (3, 5, 40))
    for out_dtype in DTYPES:
        options = {"out_dtype": getattr(torch, out_dtype)}
        out = cpu_path.rms_norm(to_torch(x), to_torch(weight), 1e-5, **options)
        assert out.is_contiguous()
        assert out.device.type == "cpu"
        assert_same_bits(from_torch(out), _reference.rms_norm(x, weight, 1e-5, out_dtype=out_dtype), out_dtype)
        results = cpu_path.fused_add_rmsnorm(
            to_torch(x), to_torch(residual), to_torch(weight), inplace=False, **options
        )
        for result, expected in zip(results, _reference.fused_add_rmsnorm(x, residual, weight, out_dtype=out_dtype)):
            assert result.is_contiguous()
            assert_same_bits(from_torch(result), expected, out_dtype)
    out = cpu_path.rms_norm_batch_invariant(to_torch(x), torch.Size([40]), to_torch(weight))
    assert_same_bits(from_torch(out), _reference.rms_norm_batch_invariant(x, 40, weight), "torch.Size")


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_place(cpu_path: Any, dtype: str) -> None:
    x, residual, weight = operands(dtype)
    expected = _reference.fused_add_rmsnorm(x, residual, weight)
    tensors = to_torch(x.copy()), to_torch(residual.copy()), to_torch(weight)
    results = cpu_path.fused_add_rmsnorm(*tensors)
    for result, tensor, wanted in zip(results, tensors, expected):
        assert result is tensor
        assert_same_bits(from_torch(tensor), wanted)


def test_torch_layouts(cpu_path: Any) -> None:
    x, _, weight = operands("bfloat16" if HAVE_BFLOAT16 else "float16", (6, 48))
    tensor, w = to_torch(x.copy()), to_torch(weight)
    wide = torch.zeros(6, 96, dtype=tensor.dtype)
    wide[:, 1::2] = tensor
    views = {
        "transposed": (tensor.t().contiguous().t(), x),
        "every other column": (wide[:, 1::2], x),
        "misaligned": (torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(6, 48), x),
        "expanded": (tensor[:1].expand(6, 48), np.repeat(x[:1], 6, axis=0)),
        "one row": (tensor[2], x[2]),
        "channels last": (
            tensor.reshape(1, 2, 3, 48).contiguous(memory_format=torch.channels_last),
            x.reshape(1, 2, 3, 48),
        ),
        "unsqueezed": (tensor[:, None, None], x[:, None, None]),
        "no rows": (tensor[:0], x[:0]),
        "no rows, 3-D": (tensor.new_zeros(2, 0, 48), x[:0].reshape(2, 0, 48)),
    }
    for name, (view, values) in views.items():
        out = cpu_path.rms_norm(view, w)
        assert out.is_contiguous(), name
        assert_same_bits(from_torch(out), _reference.rms_norm(values, weight), name)
        if name in ("transposed", "every other column", "misaligned", "channels last"):
            into = view.clone(memory_format=torch.preserve_format) if name != "every other column" else view
            assert cpu_path.rms_norm(view, w, out=into) is into
            assert_same_bits(from_torch(into.contiguous()), _reference.rms_norm(values, weight), f"into {name}")
    with pytest.raises(ValueError, match="out"):
        cpu_path.rms_norm(tensor, w, out=tensor.new_zeros(1, 48).expand(6, 48))


def test_parameters_without_grad_mode(cpu_path: Any) -> None:
    x, residual, weight = operands("float32")
    parameter = torch.nn.Parameter(to_torch(weight.copy()))
    expected = _reference.fused_add_rmsnorm(x, residual, weight)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = cpu_path.rms_norm(to_torch(x), parameter)
            assert_same_bits(from_torch(out), _reference.rms_norm(x, weight), mode.__name__)
            for tensors in (
                (to_torch(x.copy()), to_torch(residual.copy())),
                (torch.tensor(x), torch.tensor(residual)),  # under inference_mode: inference tensors, without a version
                (torch.nn.Parameter(torch.tensor(x)), torch.tensor(residual).requires_grad_()),
            ):
                results = cpu_path.fused_add_rmsnorm(*tensors, parameter)
                for result, tensor, wanted in zip(results, tensors, expected):
                    assert result is tensor
                    assert_same_bits(tensor.detach().numpy(), wanted, mode.__name__)
            out = cpu_path.rms_norm(torch.nn.Parameter(to_torch(x)), parameter)
            assert type(out) is torch.Tensor
            assert not out.requires_grad
            cpu_path.rms_norm(to_torch(x), parameter, out=torch.empty(5, 40))
    assert_same_bits(parameter.detach().numpy(), weight, "the parameter")
    frozen = torch.nn.Parameter(to_torch(weight), requires_grad=False)
    assert_same_bits(from_torch(cpu_path.rms_norm(to_torch(x), frozen)), _reference.rms_norm(x, weight), "frozen")


@pytest.mark.parametrize("name", ["x", "residual", "weight", "post_residual_addition", "out", "residual_out"])
def test_gradients_are_not_lost(cpu_path: Any, name: str) -> None:
    def arguments() -> dict[str, Any]:
        names = ("x", "residual", "post_residual_addition", "out", "residual_out")
        return {k: torch.ones(5, 40) for k in names} | {"weight": torch.ones(40)}

    leaf = arguments()
    leaf[name].requires_grad_()
    computed = arguments()
    computed[name] = torch.ones_like(computed[name], requires_grad=True) * 1.0
    parameter = arguments()
    parameter[name] = torch.nn.Parameter(parameter[name])
    for tensors in (leaf, computed, parameter):
        before = {k: (t.detach().clone(), t._version) for k, t in tensors.items()}
        with pytest.raises(RuntimeError, match=rf"fused_add_rmsnorm: {name} requires grad.*no_grad\(\).*detach\(\)"):
            cpu_path.fused_add_rmsnorm(**tensors)
        if name in ("x", "weight", "out"):
            single = {k: tensors[k] for k in ("x", "weight", "out")}
            with pytest.raises(RuntimeError, match=rf"rms_norm: {name} requires grad"):
                cpu_path.rms_norm(**single)
        if name in ("x", "weight"):
            first = "input" if name == "x" else name
            with pytest.raises(RuntimeError, match=rf"rms_norm_batch_invariant: {first} requires grad"):
                cpu_path.rms_norm_batch_invariant(tensors["x"], 40, tensors["weight"])
        for k, (values, version) in before.items():
            assert torch.equal(tensors[k].detach(), values), k
            assert tensors[k]._version == version, k
    detached = {k: t.detach() for k, t in leaf.items()}
    cpu_path.fused_add_rmsnorm(**detached)


def test_autograd_notices_what_was_overwritten(cpu_path: Any) -> None:
    """A tensor saved for the backward pass and then written must make backward() fail, not give a wrong gradient."""
    for written in ("x", "residual", "out", "residual_out"):
        tensors = {k: torch.rand(5, 40) for k in ("x", "residual", "out", "residual_out")}
        if written in ("x", "residual"):
            tensors = {k: tensors[k] for k in ("x", "residual")}
        scale = torch.ones(5, 40, requires_grad=True)
        loss = (scale * tensors[written]).sum()
        with torch.no_grad():
            cpu_path.fused_add_rmsnorm(**tensors)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_version_counters(cpu_path: Any) -> None:
    names = ("x", "residual", "post_residual_addition", "out", "residual_out")

    def versions(call: Any, *keys: str, error: Any = None) -> set[str]:
        tensors = {k: torch.rand(5, 40) for k in keys if k != "weight"} | {"weight": torch.rand(40)}
        base = dict(tensors)  # views share the counter of their base
        before = {k: t._version for k, t in base.items()}
        if error is None:
            call(**{k: t.view_as(t) for k, t in tensors.items()})
        else:
            with pytest.raises(error):
                call(**tensors, eps=-1.0)
        return {k for k, t in base.items() if t._version > before[k]}

    fused = cpu_path.fused_add_rmsnorm
    assert versions(fused, *names) == {"out", "residual_out"}
    assert versions(fused, "x", "residual") == {"x", "residual"}
    assert versions(fused, "x", "residual", "out") == {"out", "residual"}
    assert versions(fused, "x", "residual", "residual_out") == {"x", "residual_out"}
    assert versions(lambda **k: fused(**k, inplace=False), "x", "residual") == set()
    assert versions(lambda **k: fused(**k, inplace=False), "x", "residual", "out") == {"out"}
    assert versions(cpu_path.rms_norm, "x") == set()
    assert versions(cpu_path.rms_norm, "x", "out") == {"out"}
    assert versions(fused, "x", "residual", error=ValueError) == set()


def not_an_ordinary_tensor() -> dict[str, Any]:
    """Name -> a (4, 8) tensor whose memory does not simply hold its values, or that has none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Sub(torch.Tensor):
        pass

    x = torch.rand(4, 8)
    with FakeTensorMode():
        fake = torch.empty(4, 8)
    return {
        "negative bit": torch.rand(4, 8, dtype=torch.complex64).conj().imag,
        "complex": x.to(torch.complex64),
        "conjugate": x.to(torch.complex64).conj(),
        "sparse COO": x.to_sparse(),
        "sparse CSR": x.to_sparse_csr(),
        "meta": x.to("meta"),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "float64": x.double(),
        "int32": x.int(),
        "bool": x > 0,
        "float8": x.to(torch.float8_e4m3fn),
        "MKL-DNN": x.to_mkldnn() if torch.backends.mkldnn.is_available() else x.double(),
        "nested": torch.nested.nested_tensor([x, x]),
        "fake": fake,
        "a subclass": x.as_subclass(Sub),
        "uninitialised": torch.nn.UninitializedParameter(requires_grad=False),
    }


TENSORS = ["negative bit", "complex", "conjugate", "sparse COO", "sparse CSR", "meta", "quantised", "float64", "int32"]
TENSORS += ["bool", "float8", "MKL-DNN", "nested", "fake", "a subclass", "uninitialised"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_other_tensors_are_refused(cpu_path: Any, kind: str) -> None:
    tensor = not_an_ordinary_tensor()[kind]
    for name in ("x", "residual", "out", "weight"):
        arguments = {k: torch.full((4, 8), 2.0) for k in ("x", "residual", "out")} | {"weight": torch.ones(8)}
        before = {k: t.clone() for k, t in arguments.items()}
        with torch.no_grad(), pytest.raises(TypeError, match=rf"fused_add_rmsnorm: {name}\b"):
            cpu_path.fused_add_rmsnorm(**{**arguments, name: tensor})
        assert all(torch.equal(before[k], t) for k, t in arguments.items())


def test_lazy_tensors(cpu_path: Any) -> None:
    """Zeros without memory and copies not yet made: right or refused, and the original of a lazy copy stays."""
    zeros = torch._efficientzerotensor((4, 8))
    with contextlib.suppress(TypeError):
        assert torch.equal(cpu_path.rms_norm(zeros), torch.zeros(4, 8))
    x, residual, _ = operands("float32")
    original = torch.tensor(x)
    lazy = torch._lazy_clone(original)
    expected = _reference.fused_add_rmsnorm(x, residual)
    cpu_path.fused_add_rmsnorm(lazy, to_torch(residual.copy()))
    assert_same_bits(lazy.numpy(), expected[0], "the lazy copy")
    assert_same_bits(original.numpy(), x, "its original")


@pytest.mark.filterwarnings("ignore")
def test_function_transforms(cpu_path: Any) -> None:
    """vmap, grad and jvp pass tensors that only stand for others: an error, never a result without them."""
    x = torch.rand(3, 4, 8)
    norm, functorch = cpu_path.rms_norm, torch.func
    calls = {
        "vmap": lambda: functorch.vmap(norm)(x),
        "vmap of a weight": lambda: functorch.vmap(lambda w: norm(x[0], w))(torch.rand(3, 8)),
        "grad": lambda: functorch.grad(lambda t: norm(t).sum())(x),
        "jvp": lambda: functorch.jvp(norm, (x,), (x,)),
        "functionalize": lambda: functorch.functionalize(norm)(x),
        "forward mode": lambda: forward_mode(norm, x),
        "jacrev": lambda: functorch.jacrev(norm)(x),
    }
    for name, call in calls.items():
        with pytest.raises((TypeError, RuntimeError)) as info:
            call()
        assert "rms_norm: " in str(info.value), name


def forward_mode(norm: Any, x: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return norm(torch.autograd.forward_ad.make_dual(x, x))


def test_default_dtype_and_device_are_ignored(cpu_path: Any) -> None:
    """Results follow x, whatever the thread's defaults say."""
    x, _, _ = operands("float32")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            out = cpu_path.rms_norm(to_torch(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(from_torch(out), _reference.rms_norm(x))
