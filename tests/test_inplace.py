"""In place, out of place, half in place: who is returned, what is written, what stays, what may share memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, assert_guards, assert_same_bits, poisoned, random_rows, random_weight, seeded

import fusednorm
from fusednorm import _reference

SHAPE = (7, 72)


class Arrays:
    """Fresh inputs, each between guards; `check` says what every one of them must hold now."""

    def __init__(
        self, path: Any, x: str = "float16", residual: str = "float32", shape: tuple[int, ...] = SHAPE
    ) -> None:
        rng = seeded("in place", x, residual, shape)
        self.path, self.inputs, self.guarded = path, {}, {}
        for name, dtype in (("x", x), ("residual", residual), ("post_residual_addition", residual)):
            self.inputs[name] = self.new(name, dtype, shape, random_rows(rng, shape, dtype))
        self.inputs["weight"] = self.new("weight", x, shape[-1:], random_weight(rng, shape[-1], x))
        self.before = {name: path.numpy(a).copy() for name, a in self.inputs.items()}

    def new(self, name: str, dtype: str, shape: tuple[int, ...], values: Any = None) -> Any:
        array, raw = poisoned(shape, dtype)
        if values is not None:
            array[...] = values
        self.guarded[name] = raw
        return self.path.array(array)

    def check(self, **written: Any) -> None:
        for name, expected in (self.before | written).items():
            assert_same_bits(self.path.numpy(self.inputs[name]), expected, name)
        for name, raw in self.guarded.items():
            assert_guards(raw, name)


@pytest.mark.parametrize("round_sum", [False, True, "after_variance"])
@pytest.mark.parametrize("residual", DTYPES)
@pytest.mark.parametrize("x", DTYPES)
def test_every_choice_of_outputs(path: Any, x: str, residual: str, round_sum: bool | str) -> None:
    for out, residual_out, inplace in itertools.product((None, *DTYPES), (None, *DTYPES), (True, False)):
        arrays = Arrays(path, x, residual)
        options: dict[str, Any] = {"round_sum": round_sum}
        given = {}
        for name, dtype in (("out", out), ("residual_out", residual_out)):
            if dtype is not None:
                given[name] = arrays.new(name, dtype, SHAPE)
        expected = _reference.fused_add_rmsnorm(
            **arrays.before, **options, out_dtype=out or x, residual_out_dtype=residual_out or residual
        )
        actual = path.fused_add_rmsnorm(**arrays.inputs, **given, **options, inplace=inplace)
        assert isinstance(actual, tuple)
        context = f"out={out} residual_out={residual_out} inplace={inplace}"
        written = {}
        for name, own, result, wanted in zip(("out", "residual_out"), ("x", "residual"), actual, expected):
            assert_same_bits(path.numpy(result), wanted, f"{name}, {context}")
            if name in given:
                assert result is given[name], context
            elif inplace:
                assert result is arrays.inputs[own], context
                written[own] = wanted
            else:
                assert not any(path.shares_memory(result, a) for a in arrays.inputs.values()), context
                assert path.numpy(result).flags.c_contiguous
        arrays.check(**written)


def test_in_place_needs_x_dtype(core_path: Any) -> None:
    arrays = Arrays(core_path)
    with pytest.raises(ValueError, match="out_dtype"):
        core_path.fused_add_rmsnorm(**arrays.inputs, out_dtype="float32")
    arrays.check()
    out, residual_out = core_path.fused_add_rmsnorm(**arrays.inputs, out_dtype="float32", inplace=False)
    assert (out.dtype, residual_out.dtype) == (np.float32, np.float32)
    assert core_path.fused_add_rmsnorm(**arrays.inputs, out_dtype="float16")[0] is arrays.inputs["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_in_place(path: Any, dtype: str) -> None:
    for alias in (lambda a: a, lambda a: a[:], lambda a: a[::-1][::-1], lambda a: a.reshape(1, *SHAPE)[0]):
        arrays = Arrays(path, dtype)
        x, weight = arrays.inputs["x"], arrays.inputs["weight"]
        expected = _reference.rms_norm(arrays.before["x"], arrays.before["weight"])
        out = alias(x)
        assert path.rms_norm(x, weight, out=out) is out
        arrays.check(x=expected)
        again = _reference.rms_norm_batch_invariant(expected, SHAPE[-1], arrays.before["weight"])
        assert path.rms_norm_batch_invariant(x, SHAPE[-1], weight, out=alias(x)) is not None
        arrays.check(x=again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_exactly_the_input(path: Any, dtype: str) -> None:
    """Another object over the same elements is in place too, on strided arrays as well."""
    buffer = random_rows(seeded("exactly", dtype), (6, 5, 40), dtype, "normal")
    for select in (np.s_[:, ::2], np.s_[..., ::-1], np.s_[1:, :, 3:11], np.s_[::-2, 1:2]):
        rest, rest_residual = buffer.copy(), buffer[::-1].copy()
        expected = _reference.fused_add_rmsnorm(rest[select].copy(), rest_residual[select].copy())
        held, held_residual = path.array(rest.copy()), path.array(rest_residual.copy())
        x, residual = held[select], held_residual[select]
        out, residual_out = held[select], held_residual[select]
        results = path.fused_add_rmsnorm(x, residual, out=out, residual_out=residual_out)
        assert results[0] is out
        assert results[1] is residual_out
        for whole, kept, wanted in ((held, rest, expected[0]), (held_residual, rest_residual, expected[1])):
            kept[select] = wanted
            assert_same_bits(path.numpy(whole), kept, f"{select}")


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 2**20), (3, 131072), (700, 512)])
def test_large_and_in_place(core_path: Any, threads: None, shape: tuple[int, ...], number: int) -> None:
    """Rows that threads share are read twice: neither reading may see what another thread has written."""
    fusednorm.set_num_threads(number)
    for dtypes, round_sum in itertools.product(
        (("float32", "float32"), ("float16", "float32")), (False, "after_variance")
    ):
        arrays = Arrays(core_path, *dtypes, shape)
        expected = _reference.fused_add_rmsnorm(**arrays.before, round_sum=round_sum)
        core_path.fused_add_rmsnorm(**arrays.inputs, round_sum=round_sum)
        arrays.check(x=expected[0], residual=expected[1])


# Sharing memory


def test_inputs_may_be_one_array(path: Any) -> None:
    arrays = Arrays(path, "float32")
    x, weight = arrays.inputs["x"], arrays.inputs["weight"]
    copy = arrays.before["x"]
    expected = _reference.fused_add_rmsnorm(copy, copy, copy[0], post_residual_addition=copy)
    results = path.fused_add_rmsnorm(x, x, x[0], post_residual_addition=x, inplace=False)
    for actual, wanted in zip(results, expected):
        assert_same_bits(path.numpy(actual), wanted, "x is everything")
    arrays.check()
    expected_square = _reference.rms_norm(np.ascontiguousarray(copy[:, :7].T))
    assert_same_bits(path.numpy(path.rms_norm(x[:, :7].T)), expected_square, "transposed")
    del weight


def _shifted(array: Any) -> Any:
    """The same shape and dtype, one row further on: all but one row is shared."""
    whole = np.concatenate([array, array])
    return whole[: len(array)], whole[1 : 1 + len(array)]


def overlaps() -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Name -> what to change in the arguments of a legal call (x, residual, post, weight, all float32, (8, 8))."""

    def shifted(first: str, second: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda a: dict(zip((first, second), _shifted(a["x"])))

    return {
        "out is residual": lambda a: {"out": a["residual"]},
        "out is post": lambda a: {"out": a["post_residual_addition"]},
        "out is weight's memory": lambda a: {"out": a["x"].copy(), "weight": None} | _weight_inside("out"),
        "residual_out is x": lambda a: {"residual_out": a["x"], "inplace": False},
        "residual_out is post": lambda a: {"residual_out": a["post_residual_addition"]},
        "residual_out holds the weight": lambda a: _weight_inside("residual_out"),
        "out is residual_out": lambda a: dict.fromkeys(("out", "residual_out"), a["x"].copy()),
        "x is residual, in place": lambda a: {"residual": a["x"]},
        "x is residual, out in place": lambda a: {"residual": a["x"], "residual_out": a["x"].copy()},
        "x is residual, residual_out in place": lambda a: {"residual": a["x"], "out": a["x"].copy()},
        "x is post, in place": lambda a: {"post_residual_addition": a["x"]},
        "residual is post, in place": lambda a: {"post_residual_addition": a["residual"]},
        "weight is a row of x, in place": lambda a: {"weight": a["x"][3]},
        "weight is a column of residual, in place": lambda a: {"weight": a["residual"][:, 5]},
        "out is x backwards": lambda a: {"out": a["x"][::-1]},
        "out is x transposed": lambda a: {"out": a["x"].T},
        "out is x as float16": lambda a: {"out": a["x"].view(np.float16)[:, ::2]},
        "out is half of x": lambda a: {"out": a["x"].reshape(-1).view(np.float16)[:64].reshape(8, 8)},
        "residual_out is residual backwards": lambda a: {"residual_out": a["residual"][:, ::-1]},
        "out is x one row on": shifted("x", "out"),
        "x is out one row on": shifted("out", "x"),
        "residual_out is residual one row on": shifted("residual", "residual_out"),
        "out is post one row on": shifted("post_residual_addition", "out"),
        "out and residual_out share rows": shifted("out", "residual_out"),
        "out is x one byte on": lambda a: dict(zip(("x", "out"), _one_byte_on())),
        "out's rows are one row": lambda a: {"out": np.lib.stride_tricks.as_strided(a["x"].copy(), (8, 8), (0, 4))},
        "out's columns are one": lambda a: {"out": np.lib.stride_tricks.as_strided(a["x"].copy(), (8, 8), (32, 0))},
        "residual_out slides": lambda a: {
            "residual_out": np.lib.stride_tricks.as_strided(a["x"].copy(), (8, 8), (4, 4))
        },
        "x broadcast, in place": lambda a: {"x": np.lib.stride_tricks.as_strided(a["x"].copy(), (8, 8), (0, 4))},
    }


def _weight_inside(output: str) -> dict[str, Any]:
    array = np.ones((8, 8), np.float32)
    return {output: array, "weight": array[2]}


def _one_byte_on() -> tuple[Any, Any]:
    raw = np.zeros(8 * 8 * 4 + 1, np.uint8)
    return tuple(np.ndarray((8, 8), np.float32, raw, offset) for offset in (0, 1))


@pytest.mark.parametrize("name", overlaps())
def test_other_overlaps_are_refused(core_path: Any, name: str) -> None:
    rng = seeded("overlaps")
    names = ("x", "residual", "post_residual_addition")
    arguments: dict[str, Any] = {k: random_rows(rng, (8, 8), "float32", "normal") for k in names}
    arguments["weight"] = random_weight(rng, 8, "float32")
    arguments |= overlaps()[name](arguments)
    before = {k: a.copy() for k, a in arguments.items() if isinstance(a, np.ndarray)}
    arguments = core_path.together(arguments)
    with pytest.raises(ValueError, match=r"fused_add_rmsnorm: .*(overlap|share)"):
        core_path.fused_add_rmsnorm(**arguments)
    for k, a in before.items():
        assert core_path.numpy(arguments[k]).tobytes() == a.tobytes(), f"{k} was written before the error"


def test_norm_refuses_overlaps(core_path: Any) -> None:
    x = random_rows(seeded("norm overlaps"), (8, 8), "float32", "normal")
    before, whole = x.copy(), np.concatenate([x, x])
    wrong = [
        {"x": x, "out": x.T},
        {"x": x, "out": x[::-1]},
        {"x": x, "weight": x[0], "out": x},
        {"x": whole[:8], "out": whole[1:9]},
        {"x": whole[1:9], "out": whole[:8]},
        {"x": x, "out": np.lib.stride_tricks.as_strided(whole, (8, 8), (0, 4))},
    ]
    for host in wrong:
        arguments = core_path.together(host)
        with pytest.raises(ValueError, match="out"):
            core_path.rms_norm(**arguments)
        with pytest.raises(ValueError, match="out"):
            core_path.rms_norm_batch_invariant(arguments["x"], 8, arguments.get("weight"), out=arguments["out"])
        for array in arguments.values():
            core_path.numpy(array)
        assert x.tobytes() == before.tobytes()
        assert whole.tobytes() == before.tobytes() * 2
