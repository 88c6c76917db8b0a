"""Products of 16-bit operands on CUDA: exact sums, the order of steps and chunks, dtypes of results, accuracy.

What a step of the tensor core does with inexact sums is its own; so numbers here are such that any arithmetic gives the
same, or results are compared with each other. Rows and layouts: test_cuda_mm_rows.py and test_cuda_mm_layouts.py.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Callable
from typing import Any

import build_c
import helpers
import numpy as np
import pytest
import test_tensor_core
from cuda_cases import FEW_TOKENS, forced_products, split_kernels
from test_cuda_mm_rows import GATES, PROJECTIONS, Comparison, dtype_of, empty, make, product, torch

import fusednorm
from fusednorm import _core

pytestmark = pytest.mark.usefixtures("cuda")

DTYPES = ("bfloat16", "float16")
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def whole_numbers(*shape: int, dtype: str = "bfloat16", key: object = "") -> Any:
    """-8 to 8, whose sums fit 24 bits up to K = 2^18."""
    seed = int(helpers.seeded("whole", shape, dtype, key).integers(2**62))
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator, device="cuda").to(dtype_of(dtype))


def same_numbers(actual: Any, expected: Any, context: object) -> None:
    """+0 and -0 are the same, NaN is not."""
    helpers.count_elements(actual.numel())
    assert actual.shape == expected.shape
    assert torch.equal(actual.double(), expected.double()), f"{context}; seed {helpers.SEED}"


# ---- exact sums ----


@each_dtype
@pytest.mark.parametrize("n", [1, 3, 16, 33, 200, 511, 513, 640])
def test_every_length(n: int, dtype: str) -> None:
    """K tails. Rows begin at 16-byte alignment with other numbers behind them, or lie one after the other."""
    width = 1104
    a, b = whole_numbers(300, width, dtype=dtype, key=n), whole_numbers(n, width, dtype=dtype, key="b")
    for k in (*range(41), *range(248, 268), *range(500, 531), *range(1016, 1034), width):
        x, y = a[:, :k], b[:, :k]
        wanted = x.double() @ y.double().T
        for m in (1, 4, 5, 31, 130, 300) if k % 3 else (2, 3, 40, 65):
            same_numbers(product(x[:m], y.T), wanted[:m], (m, n, k))
        same_numbers(product(x[:100].contiguous(), y.contiguous().T), wanted[:100], ("dense", n, k))
        gaps = torch.cat([y, torch.full((n, 7), float("nan"), dtype=y.dtype, device="cuda")], 1)[:, :k]
        same_numbers(product(x[:17], gaps.T), wanted[:17], ("beside NaN", n, k))


@each_dtype
@pytest.mark.parametrize("k", [2880, 4096, 5000])
def test_shapes(k: int, dtype: str) -> None:
    for m, n in itertools.product((1, 8, 9, 64, 65, 127, 129, 257, 1000), (1, 7, 31, 128, 255, 512, 513, 1021, 2050)):
        a, b = whole_numbers(m, k, dtype=dtype, key=n), whole_numbers(n, k, dtype=dtype, key=m)
        same_numbers(product(a, b.T), a.double() @ b.double().T, (m, n, k))


@pytest.mark.parametrize("k", [1, 1000, 4097, 65536, 2**17 + 1, 2**20 - 1, 2**20])
def test_no_term_is_lost(k: int) -> None:
    for n, m in ((1, 1), (3, 33), (512, 130), (520, 1), (520, 130)):
        a, b = (torch.ones(1, 1, dtype=torch.bfloat16, device="cuda").expand(size, k) for size in (m, n))
        for x, y in ((a, b), (a.contiguous(), b.contiguous())):
            same_numbers(product(x, y.T), torch.full((m, n), float(k), device="cuda"), (m, n, k))


@each_dtype
def test_every_term_counts(dtype: str) -> None:
    """One term alone at every k, in either operand: the identity."""
    k = 1063
    eye = torch.eye(k, dtype=dtype_of(dtype), device="cuda")
    for n in (2, 600):
        values = make(n, k, dtype=dtype, key="one term")
        same_numbers(product(eye, values.T), values.T, n)
        same_numbers(product(values, eye), values, n)


# ---- empty shapes, dtypes of results, bias ----


@each_dtype
def test_empty_shapes(dtype: str) -> None:
    bias = make(1000, key="bias")
    for m, n in ((1, 1), (5, 300), (200, 1000)):
        a, b = make(m, 0, dtype=dtype), make(0, n, dtype=dtype)
        same_numbers(product(a, b), torch.zeros(m, n, device="cuda"), (m, n))
        same_numbers(product(a, b, bias=bias[:n]), bias[:n].expand(m, n), (m, n, "bias"))
    for m, n, k in ((0, 5, 8), (5, 0, 8), (0, 0, 0)):
        assert product(make(m, k, dtype=dtype), make(k, n, dtype=dtype)).shape == (m, n)
        assert fusednorm.mm_dtype(make(m, k, dtype=dtype), make(k, n, dtype=dtype)).shape == (m, n)


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(256, 2048), (9, 700), (1000, 512), (515, 1040)])
def test_one_rounding(n: int, k: int, dtype: str) -> None:
    """Out is the fp32 result rounded once, and a bias is added before that, in fp32."""
    compared = Comparison()
    b = make(n, k, dtype=dtype, key="weight").T
    for m in (1, 2, 4, 6, 40, 131, 520):
        a = make(m, k, dtype=dtype)
        plain = product(a, b)
        for name in (None, "float32", *DTYPES):
            bias = None if name is None else make(n, dtype=name, key="bias")
            whole = plain if bias is None else plain + bias.float()
            for out_dtype in ("float32", *DTYPES):
                wanted = whole.to(dtype_of(out_dtype))
                out = empty(m, n, dtype_of(out_dtype))
                fusednorm.mm_dtype(a, b, bias=bias, out=out)
                compared.add((m, name, out_dtype), out, wanted)
                made = fusednorm.mm_dtype(a, b, out_dtype, bias=bias)
                assert (made.dtype, made.is_contiguous()) == (wanted.dtype, True)
                compared.add((m, name, out_dtype, "new"), made, wanted)
            if bias is not None:
                apart = bias.repeat_interleave(2)[::2]
                compared.add((m, name, "bias with gaps"), product(a, b, bias=apart), whole)
        compared.add((m, "a's dtype"), fusednorm.mm_dtype(a, b), plain.to(a.dtype))
    compared.check()


def test_router_logits() -> None:
    x, gate, bias = make(2, 30, 7168), make(256, 7168), make(256, dtype="float32", key="bias")
    plain = product(x.view(60, 7168), gate.T)
    compared = Comparison()
    compared.add("fp32", fusednorm.router_logits(x, gate, "DeepSeekV3").view(60, 256), plain)
    compared.add("bias", fusednorm.router_logits(x, gate, "DeepSeekV3", bias=bias).view(60, 256), plain + bias)
    compared.add("bf16", fusednorm.router_logits(x, gate, "Renormalize").view(60, 256), plain.bfloat16())
    compared.add("one row", fusednorm.router_logits(x[1, 7], gate, "DeepSeekV3")[None], plain[37:38])
    compared.check()


# ---- the order of terms ----

LARGE, SMALL = 2.0**15, 2.0**-14  # of both dtypes; LARGE + SMALL is LARGE whether a step rounds or truncates


def declared() -> dict[str, int]:
    """What the sources say of how K is cut."""
    text = (build_c.ROOT / "csrc" / "cuda" / "mm_tensor.h").read_text()
    return {name: int(number) for name, number in re.findall(r"FN_MM_GATE_(CHUNK|COLUMNS|PARTS) = (\d+)", text)}


def cut(n: int, k: int) -> list[list[slice]]:
    """docs/numerics.md: the chunks of each part."""
    if n > 512 or k <= 256:
        return [[slice(0, k)]]
    part = max(256, -(-k // (8 * 64)) * 64)
    return [
        [slice(at, min(at + 256, begin + part, k)) for at in range(begin, min(begin + part, k), 256)]
        for begin in range(0, k, part)
    ]


def added(sums: list[Any]) -> Any:
    """In ascending order, starting with the first."""
    return functools.reduce(operator.add, sums)


def by_the_rule(n: int, k: int, chain: Callable[[slice], Any]) -> Any:
    """The product, from what the chain of a chunk gives."""
    parts = [added([chain(chunk) for chunk in part]) for part in cut(n, k)]
    return added([added(half) for half in (parts[:4], parts[4:]) if half])


def test_the_sources_say_what_the_documentation_says() -> None:
    assert declared() == {"CHUNK": 256, "COLUMNS": 512, "PARTS": 8}


MANY_ROWS = ((1600, 330), (1600, 500), (3001, 160), (3001, 500), (4097, 330), (8191, 200))
LENGTHS = (256, 257, 320, 1000, 1544, 2048, 2112, 2880, 5120, 7168, 7176, 9000, 12288, 16384)


@each_dtype
@pytest.mark.parametrize("k", LENGTHS)
def test_the_rule(k: int, dtype: str) -> None:
    """A product of few columns, from chains that products of many columns give."""
    compared = Comparison()
    a, b = make(8191, k, dtype=dtype, key="rule"), make(512, k, dtype=dtype, key="weight")
    many = torch.cat([b, b[:8]])
    wanted = by_the_rule(512, k, lambda chunk: product(a[:, chunk].contiguous(), many[:, chunk].contiguous().T))[
        :, :512
    ]
    for n in (1, 32, 129, 256, 512):
        for m in (1, 2, 3, 4, 9, 17, 32, 33, 65, 130, 200, 300, 600, 1000, 2048):
            compared.add((m, n, k), product(a[:m], b[:n].T), wanted[:m, :n].contiguous())
        compared.add((50, n, k, "column-major"), product(a[:50], b[:n].T.contiguous()), wanted[:50, :n].contiguous())

    def check_results(m: int, n: int, *what: Any) -> None:
        compared.add((m, n, k, *what), product(a[:m], b[:n].T), wanted[:m, :n].contiguous())
        bias = make(n, dtype="float32", key="bias")
        compared.add((m, n, k, "bias", *what), product(a[:m], b[:n].T, bias=bias), wanted[:m, :n] + bias)
        for narrow_bias in (None, bias):
            narrow = fusednorm.mm_dtype(a[:m], b[:n].T, bias=narrow_bias, out=empty(m, n, dtype_of(dtype)))
            sums = wanted[:m, :n] if narrow_bias is None else wanted[:m, :n] + bias
            compared.add((m, n, k, "narrow", *what), narrow, sums.to(dtype_of(dtype)))
        for first in (0, 1):  # where the copy engine can write, and where not
            frame = torch.full((m, (n + 8) // 8 * 8), 7.0, device="cuda")
            expected = frame.clone()
            expected[:, first : first + n] = wanted[:m, :n]
            fusednorm.mm_dtype(a[:m], b[:n].T, out=frame[:, first : first + n])
            compared.add((m, n, k, "frame", first, *what), frame, expected)
        with fusednorm.weights_are_constant():
            for number in range(2):  # the second may begin while the first is at work
                compared.add((m, n, k, "early", number, *what), product(a[:m], b[:n].T), wanted[:m, :n].contiguous())

    few = [(m, n) for m in (1, 2, 4, 7) for n in (31, 256, 383)]
    many = ((20, 129), (40, 256), (140, 256), (300, 256), (300, 500), (700, 1), (1000, 200), *MANY_ROWS)
    for m, n in (*few, *many):
        check_results(m, n)
    for kernel in forced_products():
        for m, n in ((1, 8), (33, 1), (77, 100), (130, 331), (130, 512), (300, 199), (1000, 330)):
            check_results(m, n, kernel)
    compared.check()


@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [*((m, 4001, 2104) for m in (1, 7, 33, 64)), *FEW_TOKENS, (1300, 1003, 520)])
def test_rows_and_what_is_beside_them(m: int, n: int, k: int, dtype: str) -> None:
    """Each kernel's rows are those that they are alone, with early weights or none, by every way out of the sums, which
    write nothing else."""
    own, compared = 24, Comparison()
    few, b = make(own, k, dtype=dtype, key="few"), make(n, k, dtype=dtype, key="weight").T
    bias = make(n, dtype="float32", key="bias")
    alone = torch.cat([product(row, b) for row in few.split(1)])
    rows = torch.arange(m, device="cuda") * 7 % own
    a, wanted = few[rows], alone[rows]
    with fusednorm.weights_are_constant():
        for number in range(3):
            compared.add(("early", number), product(a, b), wanted)
    for given, out_dtype in itertools.product((None, bias), (torch.float32, a.dtype)):
        sums = (wanted if given is None else wanted + bias).to(out_dtype)
        for first in (0, 1):  # where the copy engine can write, and where not
            frame = torch.full((m, (n + 15) // 8 * 8), 7.0, dtype=out_dtype, device="cuda")
            expected = frame.clone()
            expected[:, first : first + n] = sums
            fusednorm.mm_dtype(a, b, bias=given, out=frame[:, first : first + n])
            compared.add((given is None, out_dtype, first), frame, expected)
    compared.check()


def test_names_of_kernels() -> None:
    if not split_kernels():
        pytest.skip("needs compute capability 9.0")
    with pytest.raises(RuntimeError, match="64x17_by8") as caught:
        _core._force_cuda_product("64x17_by8")
    assert str(caught.value).split("must be one of ")[1].split(", ") == split_kernels()


@each_dtype
@pytest.mark.parametrize("k", LENGTHS)
def test_the_order_of_parts_and_chunks(k: int, dtype: str) -> None:
    """-LARGE, LARGE and SMALL in any places: what is left says what is added to what."""
    draw = helpers.seeded("places", k, dtype)
    begins = np.array([chunk.start for part in cut(1, k) for chunk in part])
    near = np.minimum(draw.choice(begins, (1500, 3)) + draw.choice([0, 16, 48, 240], (1500, 3)), k - 1)
    places = np.concatenate([near, draw.integers(0, k, (548, 3))])
    rows = np.zeros((len(places), k), np.float32)
    for column, value in enumerate((-LARGE, LARGE, SMALL)):
        np.add.at(rows, (np.arange(len(places)), places[:, column]), np.float32(value))
    steps = np.sort(places // 16, 1)
    rows[(steps[:, 1:] == steps[:, :-1]).any(1)] = 0  # what a step does with them is its own
    probes = torch.from_numpy(rows).to("cuda", dtype_of(dtype))

    def chain(chunk: slice) -> Any:
        piece = np.pad(rows[:, chunk], ((0, 0), (0, -(chunk.stop - chunk.start) % 16)))
        return np.add.accumulate(piece.reshape(len(piece), -1, 16).sum(2), 1, dtype=np.float32)[:, -1]

    for n in (1, 200, 512, 513):
        wanted = torch.from_numpy(by_the_rule(n, k, chain)).to("cuda")[:, None]
        assert wanted.unique().numel() > 1
        ones = torch.ones(n, k, dtype=probes.dtype, device="cuda")
        for m in (1, 2, 4, 8, 33, 130, 700, 2048) if k < 3000 else (1, 2, 4, 8, 33, 2048):
            count = 100 if m == 1 else len(probes)
            results = torch.cat([product(piece, ones.T) for piece in probes[:count].split(m)])
            same_numbers(results, wanted[:count].expand(count, n), (m, n, k))


def test_the_model_of_the_tensor_core() -> None:
    """tests/c/tensor_core.c predicts a gate's bits, from its operands."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("models compute capability 9.0")
    compared = Comparison()
    for dtype, (n, k) in itertools.product(DTYPES, [(256, 7168), (17, 2880), (40, 600), (520, 1000)]):
        a, b = make(40, k, dtype=dtype, key="model"), make(n, k, dtype=dtype, key="weight")
        words = [tensor.view(torch.int16).cpu().numpy().view(np.uint16) for tensor in (a[:8], b)]
        parts = cut(n, k)
        predicted = test_tensor_core.products(dtype, *words, chunk=parts[0][0].stop, part=parts[0][-1].stop)
        wanted = torch.from_numpy(predicted.view(np.float32)).to("cuda")
        for m in (1, 8, 40):
            compared.add((dtype, m, n, k), product(a[:m], b.T)[:8], wanted[:m])
    compared.check()


def probe(length: int, terms: dict[int, float], dtype: str) -> Any:
    row = torch.zeros(length, dtype=dtype_of(dtype), device="cuda")
    for k, value in terms.items():
        row[k] = value
    return row


@each_dtype
def test_order_of_steps(dtype: str) -> None:
    rows, wanted = [], []
    length = 250
    for first, second, third in [(0, 16, 32), (5, 21, 200), (15, 16, 47), (0, 224, 249)]:
        for terms, left in [
            ((LARGE, -LARGE, SMALL), SMALL),
            ((-LARGE, LARGE, SMALL), SMALL),
            ((LARGE, SMALL, -LARGE), 0.0),
            ((SMALL, LARGE, -LARGE), 0.0),
        ]:
            rows.append(probe(length, dict(zip((first, second, third), terms)), dtype))
            wanted.append(left)
    for terms, left in [
        ({0: LARGE, 15: -LARGE, 16: SMALL}, SMALL),  # within a step
        ({32: LARGE, 40: SMALL, 48: -LARGE}, 0.0),
        ({47: SMALL, 33: LARGE, length - 1: -LARGE}, 0.0),
    ]:
        rows.append(probe(length, terms, dtype))
        wanted.append(left)
    probes, column = torch.stack(rows), torch.tensor(wanted, device="cuda")[:, None]
    for n, copies in itertools.product((1, 7, 512, 513, 1030), (1, 5, 30)):
        ones = torch.ones(n, length, dtype=probes.dtype, device="cuda")
        many = probes.repeat(copies, 1)
        same_numbers(product(many, ones.T), column.repeat(copies, n), (n, len(many), "in a"))
        same_numbers(product(ones, many.T), column.repeat(copies, n).T, (n, len(many), "in b"))


# ---- inf, NaN, -0 ----


@each_dtype
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_specials_stay_in_their_row_and_column(value: float, dtype: str) -> None:
    for m, n, k in ((9, 17, 100), (40, 256, 2000), (300, 600, 1000), (200, 40, 1001)):
        a, b = make(m, k, dtype=dtype, key="special"), make(n, k, dtype=dtype, key="weight")
        for at in (0, k // 2, k - 1):
            b[:, at] = b[:, at].abs() + 1
            before = product(a, b.T)
            other = a.clone()
            other[m // 3, at] = value
            wanted = before.clone()
            wanted[m // 3] = value
            out = product(other, b.T)
            assert torch.equal(out.nan_to_num(7e37), wanted.nan_to_num(7e37)), (m, n, k, at)
            turned = product(b, other.T)
            assert torch.equal(turned.isfinite(), wanted.T.isfinite()), (m, n, k, at)


@each_dtype
def test_zeros_do_not_depend_on_the_batch(dtype: str) -> None:
    """-0 times 1, and products that underflow: their sign is the same wherever the row stands."""
    factors = [(-0.0, 1.0), (-(2.0**-100), 2.0**-100)] if dtype == "bfloat16" else [(-0.0, 1.0)]
    compared = Comparison()
    for (value, factor), k, n in itertools.product(factors, (1, 16, 300, 1041), (3, 600)):
        a = torch.full((300, k), value, dtype=dtype_of(dtype), device="cuda")
        b = torch.full((n, k), factor, dtype=a.dtype, device="cuda")
        alone = product(a[:1], b.T)
        assert bool((alone.abs() <= 2.0**-149).all())
        for m in (2, 4, 33, 129, 300):
            compared.add((value, k, n, m), product(a[:m], b.T), alone.expand(m, n))
        minus = torch.full((n,), -0.0, device="cuda")
        compared.add((value, k, n, "bias"), product(a, b.T, bias=minus), (alone + minus).expand(300, n))
    compared.check()


@pytest.mark.parametrize("k", [64, 250, 256, 320, 1088, 2880])
def test_a_sum_that_vanishes_is_plus_zero(k: int) -> None:
    """Negative sums below the least number, before any number of steps that add nothing."""
    compared = Comparison()
    tiny = 2.0**-76
    ends = sorted({min(end, k) - 1 for end in (16, 250, 256, 320, 512, 1088, 2880)})
    a = torch.zeros(300, k, dtype=torch.bfloat16, device="cuda")
    for row in range(300):
        a[row, [end for number, end in enumerate(ends) if row >> number & 1]] = -tiny
    for n in (3, 100, 512, 600):
        b = torch.full((n, k), tiny, dtype=a.dtype, device="cuda")
        zeros = torch.zeros(300, n, device="cuda")
        for m in (1, 2, 4, 20, 33, 129, 300):
            results = torch.cat([product(piece, b.T) for piece in a[: 40 if m == 1 else 300].split(m)])
            compared.add((n, k, m), results, zeros[: len(results)])
        minus = torch.full((n,), -0.0, device="cuda")
        compared.add((n, k, "bias"), product(a, b.T, bias=minus), zeros)
    compared.check()


# ---- accuracy, and the bits of others ----


@each_dtype
@pytest.mark.parametrize(("n", "k"), GATES + PROJECTIONS)
def test_accuracy(n: int, k: int, dtype: str) -> None:
    """Relative to float64, in the Frobenius norm. One chain of steps loses more than chunks do."""
    a, b = make(64, k, dtype=dtype, key="accuracy"), make(n, k, dtype=dtype, key="weight")
    exact = a.double() @ b.double().T
    error = float((product(a, b.T).double() - exact).norm() / exact.norm())
    print(f"\n{n} x {k}, {dtype}: {error:.2e}")
    assert error <= (5e-7 if n <= declared()["COLUMNS"] else 1e-5)


def test_the_bits_of_cublas() -> None:
    """Where cuBLAS does not split K, it adds the same steps in the same order."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("was seen with compute capability 9.0")
    a, b = make(128, 4096, key="cublas"), make(4096, 4096, key="weight").T
    try:
        wanted = torch.mm(a, b, out_dtype=torch.float32)
    except TypeError:
        pytest.skip("this torch.mm has no out_dtype")
    compared = Comparison()
    compared.add("cuBLAS", product(a, b), wanted)
    compared.check()


def test_fp32_output_does_not_pass_through_16_bits() -> None:
    a = torch.tensor([[1.0, 2.0**-10]], dtype=torch.float16, device="cuda")
    for n in (1, 513):
        expected = np.full((1, n), 1 + 2.0**-20, np.float32)
        same_numbers(product(a, a.repeat(n, 1).T), torch.from_numpy(expected).cuda(), n)
