"""Every path gives the reference's bits, and the reference gives the contract's.

A case's inputs and the reference's results are made once and compared with every path in turn. On the reference's own
turn the results are compared with `helpers.contract`, the contract stated a second time.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import helpers
import numpy as np
import pytest
from helpers import DTYPES, assert_guards, assert_same_bits, poisoned, random_rows, random_weight, seeded

import fusednorm
from fusednorm import _reference

LENGTHS = [1, 2, 7, 8, 9, 63, 64, 65, 100, 111, 128, 255, 256, 257, 768, 1000, 1024, 2880, 3584, 4095, 4096, 5120, 7168]
LENGTHS += [8192, 12288, 16384, 28672, 131072, 2**20]
EPSILONS = (1e-6, 1e-5, 0.0, 1e-12, 1e-45, 1e-320, 1.0, 3e38)  # 1e-45 is a subnormal float32, 1e-320 rounds to 0
OFFSETS = (0.0, 1.0, -0.0, -1.0, 0.1, 1e-3, 3e38)
ROUND_SUMS: tuple[bool | str, ...] = (False, True, "after_variance")
NONE_OR_DTYPE = (None, *DTYPES)
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", None: "-"}


CHOICES: dict[str, tuple[Any, ...]] = {
    "x": DTYPES,
    "out": DTYPES,
    "weight": NONE_OR_DTYPE,
    "residual": DTYPES,
    "residual_out": DTYPES,
    "post": NONE_OR_DTYPE,
    "cast": (False, True),
    "round_sum": ROUND_SUMS,
}


class Case(NamedTuple):
    rows: int
    columns: int
    x: str
    out: str
    weight: str | None = None
    residual: str | None = None
    residual_out: str | None = None
    post: str | None = None
    eps: float = 1e-6
    weight_offset: float = 0.0
    cast: bool = False
    round_sum: bool | str = False

    @property
    def hash(self) -> int:
        return zlib.crc32(repr((helpers.SEED, *self)).encode())

    def __str__(self) -> str:
        operands = ",".join(SHORT[d] for d in (self.x, self.residual, self.post, self.weight))
        results = ",".join(SHORT[d] for d in (self.out, self.residual_out))
        return f"{self.rows}x{self.columns}:{operands}->{results}"


class Prepared(NamedTuple):
    x: Any
    residual: Any
    post: Any
    weight: Any
    out: Any
    residual_out: Any


@lru_cache(maxsize=64)
def small_operand(role: str, rows: int, columns: int, dtype: str) -> Any:
    return make_operand(role, rows, columns, dtype)


def make_operand(role: str, rows: int, columns: int, dtype: str | None) -> Any:
    if dtype is None:
        return None
    rng = seeded(role, rows, columns, dtype)
    return random_weight(rng, columns, dtype) if role == "weight" else random_rows(rng, (rows, columns), dtype)


def prepare(case: Case, make: Any) -> Prepared:
    x, residual, post, weight = (
        None if dtype is None else make(role, case.rows, case.columns, dtype)
        for role, dtype in zip(("x", "residual", "post", "weight"), (case.x, case.residual, case.post, case.weight))
    )
    options = {"weight_offset": case.weight_offset, "cast_x_before_out_mul": case.cast, "out_dtype": case.out}
    if residual is None:
        return Prepared(x, None, None, weight, _reference.rms_norm(x, weight, case.eps, **options), None)
    options |= {"post_residual_addition": post, "round_sum": case.round_sum, "residual_out_dtype": case.residual_out}
    return Prepared(x, residual, post, weight, *_reference.fused_add_rmsnorm(x, residual, weight, case.eps, **options))


@lru_cache(maxsize=4096)
def prepared_small(case: Case) -> Prepared:
    return prepare(case, small_operand)


@lru_cache(maxsize=2)
def prepared_large(case: Case) -> Prepared:
    return prepare(case, make_operand)


def check(path: Any, case: Case) -> None:
    known = (prepared_small if case.rows * case.columns <= 1024 else prepared_large)(case)
    if path.name == "reference":
        check_reference(case, known)
        return
    mode = ("given", "allocated", "in place")[case.hash % 3]
    before = [None if a is None else a.copy() for a in known[:4]]
    x, residual, post, weight = (None if a is None else path.array(a.copy()) for a in known[:4])
    options: dict[str, Any] = {"weight_offset": case.weight_offset, "cast_x_before_out_mul": case.cast}
    guards = []

    def given(dtype: str | None) -> Any:
        array, raw = poisoned((case.rows, case.columns), str(dtype))
        guards.append((array, raw))
        return path.array(array)

    if residual is None:
        options |= {"out": given(case.out)} if mode == "given" else {"out_dtype": case.out}
        out = path.rms_norm(x, weight, case.eps, **options)
        results = [(out, known.out)]
    else:
        options |= {"post_residual_addition": post, "round_sum": case.round_sum, "inplace": mode == "in place"}
        if mode == "given" or (mode == "in place" and case.out != case.x):
            options["out"] = given(case.out)
        elif mode == "allocated":
            options["out_dtype"] = case.out
        if case.residual_out != case.residual or (mode == "given" and case.hash & 8):
            options["residual_out"] = given(case.residual_out)
        out, residual_out = path.fused_add_rmsnorm(x, residual, weight, case.eps, **options)
        results = [(out, known.out), (residual_out, known.residual_out)]
    for name, (actual, expected) in zip(("out", "residual_out"), results):
        assert_same_bits(path.numpy(actual), expected, f"{name} of {case!r} ({mode})")
    for _, raw in guards:
        assert_guards(raw, case)
    for name, array, original in zip(("x", "residual", "post", "weight"), (x, residual, post, weight), before):
        if array is not None and not any(array is result for result, _ in results):
            assert path.numpy(array).tobytes() == original.tobytes(), f"{name} of {case!r} was written"


def check_reference(case: Case, known: Prepared) -> None:
    rows = min(case.rows, max(1, 2**16 // case.columns))  # exact arithmetic is slow, and rows are independent
    x, residual, post = (None if a is None else a[:rows] for a in known[:3])
    options = (case.eps, case.weight_offset, case.cast, case.round_sum, case.out, case.residual_out)
    expected = helpers.contract(x, residual, post, known.weight, *options)
    assert_same_bits(known.out[:rows], expected[0], f"out of {case!r}")
    if expected[1] is not None:
        assert_same_bits(known.residual_out[:rows], expected[1], f"residual_out of {case!r}")


def combination(rows: int, columns: int, rng: np.random.Generator, **fixed: Any) -> Case:
    """A random one of all dtype and keyword combinations."""
    case = Case(rows, columns, **{name: values[rng.integers(len(values))] for name, values in CHOICES.items()})
    eps = EPSILONS[rng.integers(len(EPSILONS))] if rng.random() < 0.5 else 1e-6
    case = case._replace(eps=eps, weight_offset=OFFSETS[rng.integers(len(OFFSETS))])._replace(**fixed)
    return case._replace(
        weight_offset=case.weight_offset if case.weight else 0.0,
        residual_out=case.residual_out if case.residual else None,
        post=case.post if case.residual else None,
        round_sum=case.round_sum if case.residual else False,
    )


# Row lengths and row counts


def length_cases() -> list[Any]:
    """For each length and dtype of x: both operations with that dtype throughout, and one drawn from all there are."""
    cases = []
    for columns, x, kind in itertools.product(LENGTHS, DTYPES, ("norm", "fused", "mixed")):
        rows = min(max(2**18 // columns, 1 + (kind == "norm")), 4099)
        fixed: dict[str, Any] = {"x": x}
        if kind != "mixed":
            fixed |= {"out": x, "weight": x, "residual": None if kind == "norm" else x, "residual_out": x, "post": None}
        case = combination(rows, columns, seeded("lengths", columns, x, kind), **fixed)
        cases.append(pytest.param(case, id=f"{columns}-{SHORT[x]}-{kind}"))
    return cases


@pytest.mark.parametrize("case", length_cases())
def test_row_lengths(path: Any, case: Case) -> None:
    check(path, case)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17, 31, 64, 65, 127, 257, 1000])
@pytest.mark.parametrize("columns", [1, 9, 64, 128, 1000, 2880])
def test_row_counts(path: Any, rows: int, columns: int) -> None:
    for i in range(2):
        check(path, combination(rows, columns, seeded("rows", rows, columns, i), **({} if i else {"residual": None})))


# Dtypes: the entire product at two short rows, a covering set of pairs at long ones


@pytest.mark.parametrize("columns", [13, 72])
@pytest.mark.parametrize("residual", NONE_OR_DTYPE, ids=lambda d: f"residual_{SHORT[d]}")
@pytest.mark.parametrize("x", DTYPES, ids=lambda d: f"x_{SHORT[d]}")
def test_all_dtypes_and_roundings(path: Any, columns: int, x: str, residual: str | None) -> None:
    fused = residual is not None
    product = itertools.product(
        NONE_OR_DTYPE,
        DTYPES,
        NONE_OR_DTYPE if fused else (None,),
        DTYPES if fused else (None,),
        ROUND_SUMS if fused else (False,),
        (False, True),
    )
    for i, (weight, out, post, residual_out, round_sum, cast) in enumerate(product):
        if path.name == "reference" and i % 7:  # coprime to every factor: a seventh of each, at a tenth of the speed
            continue
        eps, offset = EPSILONS[i % len(EPSILONS)], OFFSETS[i % len(OFFSETS)] if weight else 0.0
        case = Case(5, columns, x, out, weight, residual, residual_out, post, eps, offset, cast, round_sum)
        check(path, case)


def covering_pairs(rows: int, columns: int) -> list[Case]:
    """Cases in which every two choices meet: each is the best of some random ones."""
    rng = seeded("pairs", columns)
    missing = {
        ((a, u), (b, v))
        for a, b in itertools.combinations(CHOICES, 2)
        for u, v in itertools.product(CHOICES[a], CHOICES[b])
    }

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations([(name, getattr(case, name)) for name in CHOICES], 2))

    cases = []
    while missing:
        best = max((combination(rows, columns, rng) for _ in range(20)), key=lambda case: len(pairs(case) & missing))
        if pairs(best) & missing:
            missing -= pairs(best)
            cases.append(best)
    return cases


@pytest.mark.parametrize("columns", [100, 257, 768, 2880, 4095, 5120, 8192])
def test_pairs_of_dtypes(path: Any, columns: int) -> None:
    for case in covering_pairs(max(3, 20000 // columns), columns):
        check(path, case)


# Keywords


@pytest.mark.parametrize("columns", [1, 8, 100, 256, 1023])
def test_eps_and_offset(path: Any, columns: int) -> None:
    for i, (eps, offset, cast, weight) in enumerate(itertools.product(EPSILONS, OFFSETS, (False, True), NONE_OR_DTYPE)):
        dtype = DTYPES[i % len(DTYPES)]
        if weight is None and offset != 0:
            continue
        check(path, Case(3, columns, dtype, "float32", weight, eps=eps, weight_offset=offset, cast=cast))


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_scalars(path: Any, dtype: str) -> None:
    """1e-5 as float64 and as float32 round to one eps; so do the integers."""
    x, w = random_rows(seeded("scalars"), (4, 96), dtype, "normal"), random_weight(seeded("scalars"), 96, dtype)
    for one, other in ((1e-5, np.float32(1e-5)), (1e-5, np.float64(1e-5)), (1.0, 1), (1.0, np.int32(1)), (0.0, 0)):
        expected = _reference.rms_norm(x, w, one, weight_offset=one)
        out = path.rms_norm(path.array(x), path.array(w), other, weight_offset=other)
        assert_same_bits(path.numpy(out), expected, f"eps={other!r}")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_aten_signature(path: Any, dtype: str, weighted: bool) -> None:
    rng = seeded("aten", dtype)
    for columns, eps in itertools.product((1, 65, 1024), (None, 0.0, 1e-5)):
        x = random_rows(rng, (2, 7, columns), dtype)
        w = random_weight(rng, columns, dtype) if weighted else None
        expected = _reference.rms_norm(x, w, 2.0 ** (1 - helpers.PRECISION[dtype][0]) if eps is None else eps)
        for shape in (columns, (columns,), [columns]):
            out = path.rms_norm_batch_invariant(path.array(x), shape, None if w is None else path.array(w), eps)
            assert_same_bits(path.numpy(out), expected, f"{columns} {eps} {shape!r}")


@pytest.mark.parametrize("name", ["hf_llama", "gemma", "flashinfer", "sglang", "vllm", "torch"])
def test_presets(path: Any, name: str) -> None:
    rng, preset = seeded("presets", name), fusednorm.SEMANTICS[name]
    for dtype in DTYPES:
        x, residual = (random_rows(rng, (9, 256), dtype) for _ in range(2))
        w = random_weight(rng, 256, dtype)
        out = path.rms_norm(path.array(x), path.array(w), **preset.rms_norm)
        assert_same_bits(path.numpy(out), _reference.rms_norm(x, w, **preset.rms_norm), f"{name} {dtype}")
        options = dict(preset.fused_add_rmsnorm)
        actual = path.fused_add_rmsnorm(path.array(x), path.array(residual), path.array(w), inplace=False, **options)
        for a, e in zip(actual, _reference.fused_add_rmsnorm(x, residual, w, **options)):
            assert_same_bits(path.numpy(a), e, f"{name} {dtype}")


# The bits of a row depend on the row alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, columns", [(37, 64), (19, 111), (4099, 128), (150, 4096), (80, 7168), (24, 40000), (5, 131072), (3, 2**20)]
)
def test_row_keeps_its_bits(path: Any, threads: None, rows: int, columns: int, dtype: str) -> None:
    rng = seeded("rows", rows, columns, dtype)
    other = dtype if dtype == "bfloat16" else "float32"  # bfloat16 throughout, which has an order of its own
    x, residual = random_rows(rng, (rows, columns), dtype), random_rows(rng, (rows, columns), other)
    weight = path.array(random_weight(rng, columns, dtype))

    def norm(x: Any, residual: Any) -> list[Any]:
        options = {"round_sum": "after_variance", "out_dtype": other, "inplace": False}
        results = path.fused_add_rmsnorm(path.array(x), path.array(residual), weight, **options)
        return [path.numpy(result) for result in results]

    fusednorm.set_num_threads(1)
    batch = norm(x, residual)

    def compare(select: Any, context: str, *operands: Any) -> None:
        for actual, expected in zip(norm(*(operands or (x[select], residual[select]))), batch):
            assert_same_bits(actual, expected[select], f"{context}, {rows}x{columns} {dtype}")

    for number in (1, 2, 3, 7):
        fusednorm.set_num_threads(number)
        if path.name != "reference" or number == 1:
            compare(slice(None), f"{number} threads")
            for i in {0, rows // 2, rows - 1}:
                compare(slice(i, i + 1), f"row {i} alone, {number} threads")
    for i in rng.permutation(rows)[:24]:
        compare(slice(i, i + 1), f"row {i} alone")
    for size in {2, 3, 5, 17, rows // 2, rows - 1} & set(range(1, rows)):
        compare(slice(rows - size, None), f"the last {size} rows")
    compare(rng.permutation(rows), "permuted")
    compare(slice(None, None, -1), "backwards")  # a view with a negative stride
    compare(slice(1, None, 2), "every other row")
    wide = [np.zeros((rows, 2 * columns), a.dtype) for a in (x, residual)]
    for shift in (0, 1):
        views = [a[:, shift::2] for a in wide]
        for view, values in zip(views, (x, residual)):
            view[...] = values
        compare(slice(None), "every other column", *views)
    raw = [np.zeros(a.nbytes + 8, np.uint8) for a in (x, residual)]
    for offset in (1, 2, 4):
        views = [np.ndarray(a.shape, a.dtype, b, offset) for a, b in zip((x, residual), raw)]
        for view, values in zip(views, (x, residual)):
            view[...] = values
        compare(slice(None), f"at byte {offset}", *views)


# Bits that may never change


def counted(count: int, salt: int) -> Any:
    """float32 numbers in [-4, 4) from integer arithmetic alone."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(salt << 32)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z >> np.uint64(40)).astype(np.float32) - np.float32(2**23)) / np.float32(2**21)


FROZEN = {
    1: "5eeed428f695b7ca803d19f9cb5cdd6cacc0279c9af5680737b0fa127d417912",
    7: "4afa8b76cd35fc489cfcc3e7afae99206106feb29c8db7ac6779826839cbc7ac",
    8: "02f5bf9432195969f98c96b2662ee56c0a3c260b8176b0778b57f38bc9c82dbc",
    100: "de30f7bf812d0119654b5bf62c1a9c5ab07d2c89696dd992da8a0df92f106b16",
    2880: "7fe22d904c86b99432635fd1e67cddac8a0e43ba8292ccd6f6993e34499cf1d2",
    4096: "835836c2ab5f3636871d16d441400e6cf75b5fb81da1596ebc4efe40015c5894",
    7168: "ff9d4bda73fae105d71d7134070aafb5299770656723c33b1e5f580d3bf06164",
    16384: "e4f38ba926fcebe1dfbc4441cae1f1c405dd57ea99e84d55c709e2ec6bf42466",
}


@pytest.mark.parametrize("columns", FROZEN)
def test_frozen_bits(path: Any, columns: int) -> None:
    """SHA-256 of results as they were when the contract was published; a change here changes users' bits."""
    rows = 4
    x, residual = (counted(rows * columns, salt).reshape(rows, columns) for salt in (1, 2))
    weight = counted(columns, 3).astype("float16")
    digest = hashlib.sha256()
    for round_sum, cast in itertools.product(ROUND_SUMS, (False, True)):
        results = path.fused_add_rmsnorm(
            path.array(x.astype("float16")),
            path.array(residual),
            path.array(weight),
            1e-5,
            weight_offset=1.0,
            cast_x_before_out_mul=cast,
            round_sum=round_sum,
            out_dtype="float32",
            residual_out=path.array(np.empty((rows, columns), "float16")),
            inplace=False,
        )
        for result in results:
            digest.update(path.numpy(result).tobytes())
    helpers.count_elements(12 * rows * columns)
    assert digest.hexdigest() == FROZEN[columns]
