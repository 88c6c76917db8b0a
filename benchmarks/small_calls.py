"""The calls whose host time and instructions are counted: one short row, so that next to nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fusednorm
from fusednorm.audit.peers import absent_package

from .native import native, stubs
from .timing import Call

EPS = 1e-6
EMPTY = "empty METH_FASTCALL function"
FLOOR = "the loan of three arrays, alone"
NUMPY_ADD = "numpy.add(a, b, out=c)"


@dataclass(frozen=True)
class SmallCall:
    """`source` is the same call as source code over `names`; `mode` is entered around every measurement."""

    name: str
    group: str
    call: Call
    source: str
    names: dict[str, Any]
    ours: bool = False
    mode: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


def _floor(group: str, arrays: dict[str, Any], mode: Callable[[], Any]) -> SmallCall:
    three = (arrays["x"], arrays["weight"], arrays["out"])
    names = {**arrays, "borrow": native().borrow}
    return SmallCall(FLOOR, group, Call(native().borrow, three), "borrow(x, weight, out)", names, mode=mode)


def _ours(group: str, arrays: dict[str, Any], allocating: bool, mode: Callable[[], Any]) -> Iterator[SmallCall]:
    x, residual, weight, out = (arrays[name] for name in ("x", "residual", "weight", "out"))
    names = {**arrays, "rms_norm": fusednorm.rms_norm, "fused": fusednorm.fused_add_rmsnorm}

    def one(name: str, call: Call, source: str) -> SmallCall:
        return SmallCall(name, group, call, source, names, ours=True, mode=mode)

    with_out = Call(fusednorm.rms_norm, (x, weight, EPS, out), ("out",))
    yield one("rms_norm(x, w, eps, out=out)", with_out, "rms_norm(x, weight, 1e-6, out=out)")
    in_place = Call(fusednorm.fused_add_rmsnorm, (x, residual, weight, EPS))
    yield one("fused_add_rmsnorm(x, residual, w, eps)", in_place, "fused(x, residual, weight, 1e-6)")
    if allocating:
        new = Call(fusednorm.rms_norm, (x, weight, EPS))
        yield one("rms_norm(x, w, eps), a new result", new, "rms_norm(x, weight, 1e-6)")


def small_calls(columns: int) -> list[SmallCall]:
    """float32, one row of `columns`."""
    shapes = {"x": (1, columns), "residual": (1, columns), "weight": (columns,), "out": (1, columns)}
    producer = stubs()
    stub_arrays = {name: producer.Stub(None, "float32", shape) for name, shape in shapes.items()}
    nothing = producer.nothing
    names = {**stub_arrays, "nothing": nothing}
    empty = Call(nothing, (stub_arrays["x"], stub_arrays["weight"]))
    found = [SmallCall(EMPTY, "", empty, "nothing(x, weight)", names)]
    found.append(_floor("stubs", stub_arrays, nullcontext))
    found += _ours("stubs", stub_arrays, False, nullcontext)

    ndarrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    found += _ours("ndarrays", ndarrays, True, nullcontext)
    a, b, c = ndarrays["x"], ndarrays["residual"], ndarrays["out"]
    add = Call(np.add, (a, b, c), ("out",))
    found.append(SmallCall(NUMPY_ADD, "ndarrays", add, "add(x, residual, out=out)", {**ndarrays, "add": np.add}))
    if absent_package("torch") is None:
        found += _torch_calls(shapes)
    return found


def _torch_calls(shapes: dict[str, tuple[int, ...]]) -> Iterator[SmallCall]:
    import torch

    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    x, residual, weight, out = (tensors[name] for name in ("x", "residual", "weight", "out"))
    norm, columns = torch.nn.functional.rms_norm, shapes["weight"]
    names = {**tensors, "norm": norm, "add": torch.add, "shape": columns}
    for group, mode in (("tensors, no_grad", torch.no_grad), ("tensors, grad mode", torch.enable_grad)):
        yield _floor(group, tensors, mode)
        yield from _ours(group, tensors, True, mode)
        functional = Call(norm, (x, columns, weight, EPS))
        yield SmallCall("F.rms_norm", group, functional, "norm(x, shape, weight, 1e-6)", names, mode=mode)
        add = Call(torch.add, (x, residual, out), ("out",))
        yield SmallCall("torch.add(a, b, out=c)", group, add, "add(x, residual, out=out)", names, mode=mode)
