"""Wrong calls: each raises exactly one exception whose text helps, and leaves every byte of every argument alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import array_makers as make
import numpy as np
import pytest
from array_makers import f32, j32, readonly, strided, stub, t32
from wrong_calls import OMITTED, REQUIRED, RIGHT, ROWS, SLOTS, Row, check_wrong_call, resolve

import fusednorm
from fusednorm import _core


@pytest.fixture(autouse=True)
def _dual_level() -> Iterator[None]:
    yield
    make.leave_dual_level()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_wrong_call(row: Row) -> None:
    check_wrong_call(row)


def test_the_table_is_complete() -> None:
    repeated = [name for name, count in Counter(row.id for row in ROWS).items() if count > 1]
    assert not repeated
    assert len(ROWS) >= 120
    for slot in SLOTS:
        exceptions = {row.exception for row in ROWS if (row.function, row.argument) == slot}
        assert {TypeError, ValueError} <= exceptions, slot
    assert {row.exception for row in ROWS} == {TypeError, ValueError, BufferError, RuntimeError}
    assert {row.function for row in ROWS} == set(RIGHT)


# The nearest right call of many rows: a function that always raises would pass all of the above.
R, F, B, S = RIGHT
RIGHT_CALLS: list[tuple[str, str, dict[str, Any]]] = [
    *[(function, "as it is", {}) for function in RIGHT],
    (R, "weight None", {"weight": None}),
    (R, "no out", {"out": OMITTED}),
    (R, "out None", {"out": None}),
    (R, "eps 0", {"eps": 0}),
    (R, "eps of NumPy", {"eps": np.float64(1e-5)}),
    (R, "largest eps", {"eps": 3e38}),
    (R, "offset 0 without weight", {"weight_offset": 0.0, "weight": None}),
    (R, "offset", {"weight_offset": 1.0}),
    (R, "stream None", {"stream": None}),
    (R, "float16 x", {"x": partial(f32, 4, 8, dtype=np.float16)}),
    (R, "bfloat16 x", {"x": lambda: f32(4, 8).astype(make.bf16())}),
    (R, "read-only inputs", {"x": partial(readonly, 4, 8), "weight": partial(readonly, 8)}),
    (R, "x broadcast", {"x": lambda: np.broadcast_to(f32(8), (4, 8))}),
    (R, "weight broadcast", {"weight": lambda: strided(f32(1), (8,), (0,))}),
    (R, "x reversed", {"x": lambda: f32(4, 8)[::-1, ::-1]}),
    (R, "out is x", {"out": lambda x: x}),
    (R, "out another view of x", {"out": lambda x: x[:]}),
    (R, "out beside x", {"x": lambda: f32(4, 16)[:, :8], "out": lambda x: x.base.reshape(4, 16)[:, 8:]}),
    (R, "out between x", {"x": lambda: f32(4, 16)[:, ::2], "out": lambda x: x.base.reshape(4, 16)[:, 1::2]}),
    (R, "size 1 with stride 0", {"x": partial(f32, 1, 8), "out": lambda: strided(f32(8), (1, 8), (0, 4))}),
    (R, "0 rows", {"x": partial(f32, 0, 8), "out": partial(f32, 0, 8)}),
    (R, "0 rows in front", {"x": partial(f32, 0, 3, 8), "out": partial(f32, 0, 3, 8)}),
    (R, "one dimension", {"x": partial(f32, 8), "out": partial(f32, 8)}),
    (R, "out_dtype is outs", {"out_dtype": "float32"}),
    (R, "torch without grad", {"x": partial(t32, 4, 8), "weight": partial(t32, 8)}),
    (R, "torch out for ndarray x", {"out": partial(t32, 4, 8)}),
    (R, "negative torch, resolved", {"x": lambda: make.negative().resolve_neg()}),
    (R, "torch detached", {"x": lambda: t32(4, 8, requires_grad=True).detach()}),
    (R, "jax x", {"x": partial(j32, 4, 8), "weight": partial(j32, 8)}),
    (R, "jax x, no out", {"x": partial(j32, 4, 8), "out": OMITTED}),
    (R, "stub x and out", {"x": partial(stub, "Stub", 4, 8), "out": partial(stub, "Stub", 4, 8)}),
    (R, "read-only capsule x", {"x": partial(stub, "Capsule", 4, 8, flags=1)}),
    (F, "out of place", {"inplace": False}),
    (
        F,
        "read-only, out of place",
        {"inplace": False, "x": partial(readonly, 4, 8), "residual": partial(readonly, 4, 8)},
    ),
    (F, "read-only x with out", {"x": partial(readonly, 4, 8), "out": partial(f32, 4, 8)}),
    (F, "jax out of place", {"inplace": False, "x": partial(j32, 4, 8), "residual": partial(j32, 4, 8)}),
    (F, "jax x with out", {"x": partial(j32, 4, 8), "out": partial(f32, 4, 8)}),
    (F, "out and residual_out are the inputs", {"out": lambda x: x, "residual_out": lambda residual: residual}),
    (F, "x is residual, out of place", {"inplace": False, "residual": lambda x: x}),
    (F, "post is x, out of place", {"inplace": False, "post_residual_addition": lambda x: x}),
    (F, "out_dtype out of place", {"inplace": False, "out_dtype": "float16"}),
    (F, "out_dtype is xs", {"out_dtype": np.float32}),
    (F, "round_sum after_variance", {"round_sum": "after_variance"}),
    (F, "round_sum True", {"round_sum": True}),
    (F, "no post", {"post_residual_addition": None}),
    (B, "eps None, weight None", {"eps": None, "weight": None}),
    (B, "tuple", {"normalized_shape": (8,)}),
    (B, "NumPy integer", {"normalized_shape": [np.int64(8)]}),
    (B, "torch.Size", {"normalized_shape": lambda: make.torch().Size([8])}),
]


@pytest.mark.parametrize(
    ("name", "changes"), [(f, c) for f, _, c in RIGHT_CALLS], ids=[f"{f}-{w}" for f, w, _ in RIGHT_CALLS]
)
def test_right_call(name: str, changes: dict[str, Any], threads: None) -> None:
    values = {key: value for key, value in resolve({**RIGHT[name], **changes}).items() if value is not OMITTED}
    positional = [values.pop(key) for key in REQUIRED[name]]
    result = getattr(fusednorm, name)(*positional, **values)
    if name == S:
        assert result is None
        return
    results = result if name == F else (result,)
    given = [values.get("out"), values.get("residual_out")]
    if name == F and values.get("inplace", True):
        given = [old if new is None else new for old, new in zip(positional, given, strict=True)]
    for array, expected in zip(results, given, strict=False):
        if expected is None:
            assert type(array) is type(positional[0])
        else:
            assert array is expected
        assert tuple(array.shape) == tuple(positional[0].shape)


def test_keywords_may_name_every_argument() -> None:
    x, residual, weight, out = f32(4, 8), f32(4, 8), f32(8), f32(4, 8)
    assert fusednorm.rms_norm(out=out, eps=1e-6, weight=weight, x=x) is out
    assert fusednorm.fused_add_rmsnorm(eps=1e-6, weight=weight, residual=residual, x=x)[0] is x
    assert fusednorm.rms_norm_batch_invariant(out=out, eps=None, weight=weight, normalized_shape=[8], input=x) is out
    name = "".join(["e", "p", "s"])  # equal to the parameter's name, and another object
    assert fusednorm.rms_norm(x, out=out, **{name: 1e-6}) is out


@pytest.mark.parametrize("position", range(3))
def test_grad_mode_decides(position: int) -> None:
    torch = make.torch()
    arguments = [t32(4, 8), t32(8), t32(4, 8)]
    arguments[position].requires_grad_()
    x, weight, out = arguments
    with pytest.raises(RuntimeError, match="no_grad"):
        fusednorm.rms_norm(x, weight, out=out)
    with torch.no_grad():
        assert fusednorm.rms_norm(x, weight, out=out) is out
    with torch.inference_mode():
        assert fusednorm.rms_norm(x, weight, out=out) is out
        assert fusednorm.rms_norm(torch.nn.Parameter(x), torch.nn.Parameter(weight)).shape == (4, 8)


@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize", "jvp"])
def test_torch_function_transforms_are_refused(transform: str) -> None:
    """Their tensors are of the exact type Tensor; a result computed past them would be wrong or lose a gradient."""
    func = make.torch().func

    def norm(x: Any) -> Any:
        return fusednorm.rms_norm(x).sum() if transform in ("grad", "jvp") else fusednorm.rms_norm(x)

    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: func.vmap(norm)(t32(4, 8)),
        "grad": lambda: func.grad(norm)(t32(4, 8)),
        "functionalize": lambda: func.functionalize(norm)(t32(4, 8)),
        "jvp": lambda: func.jvp(norm, (t32(4, 8),), (t32(4, 8),)),
    }
    with pytest.raises((RuntimeError, TypeError)):
        calls[transform]()


def test_jax_tracers_are_refused() -> None:
    jax = pytest.importorskip("jax", reason="needs jax")
    with pytest.raises((TypeError, RuntimeError, BufferError, jax.errors.JAXTypeError)):
        jax.jit(fusednorm.rms_norm)(j32(4, 8))


@pytest.mark.parametrize("name", ["sse9", "AVX2 ", "cuda", "reference"])
def test_an_unknown_path_is_refused(name: str) -> None:
    available = fusednorm.info()["cpu"]["available"]
    with pytest.raises(RuntimeError) as caught:
        _core._force_cpu_path(name)
    assert repr(name) in str(caught.value) or f'"{name}"' in str(caught.value)
    assert all(path in str(caught.value) for path in available)
    fusednorm.rms_norm(f32(4, 8))  # and the process goes on


def test_a_path_that_the_machine_lacks_is_refused() -> None:
    missing = {"scalar", "avx2", "avx512", "avx512_bf16", "neon"} - set(fusednorm.info()["cpu"]["available"])
    assert missing, "no processor has them all"
    for name in missing:
        with pytest.raises(RuntimeError, match=name) as caught:
            _core._force_cpu_path(name)
        assert "scalar" in str(caught.value)


@pytest.mark.parametrize("name", ["sse9", "neon,scalar", "avx1024"])
def test_environment_variable(name: str) -> None:
    """A wrong FUSEDNORM_CPU is an error of the first operation, not of the import."""
    code = (
        "import fusednorm, numpy\n"
        "x = numpy.ones((2, 8), 'f4')\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        fusednorm.rms_norm(x, out=x)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "assert (x == 1).all()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FUSEDNORM_CPU": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, "each call says it, not the first alone"
    for line in lines:
        assert "FUSEDNORM_CPU" in line
        assert name in line
        assert "scalar" in line
