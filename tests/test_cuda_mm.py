"""Products of 16-bit operands on CUDA: exact sums, the order of steps and chunks, dtypes of results, accuracy.

What a step of the tensor core does with inexact sums is its own; so numbers here are such that any arithmetic gives the
same, or results are compared with each other. Rows and layouts: test_cuda_mm_rows.py and test_cuda_mm_layouts.py.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import build_c
import helpers
import numpy as np
import pytest
from test_cuda_mm_rows import GATES, PROJECTIONS, Comparison, dtype_of, empty, make, product, torch

import fusednorm

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
        for m in (1, 5, 31, 130, 300) if k % 3 else (2, 40, 65):
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
    for m in (1, 6, 40, 131, 520):
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


def chunk_length(n: int, k: int, m: int, dtype: str) -> int:
    """The first step, in elements, that begins a chunk; K if none does.

    -LARGE at 0, LARGE at s, SMALL at s + 16. In the chunk of 0, SMALL meets 0 and is left. If another chunk begins at
    s, SMALL meets LARGE and is lost before -LARGE arrives.
    """
    starts = torch.arange(16, k - 16, 16, device="cuda")
    probes = torch.zeros(len(starts), k, dtype=dtype_of(dtype), device="cuda")
    rows = torch.arange(len(starts), device="cuda")
    probes[:, 0] = -LARGE
    probes[rows, starts], probes[rows, starts + 16] = LARGE, SMALL
    ones = torch.ones(n, k, dtype=probes.dtype, device="cuda")
    results = torch.cat([product(part, ones.T) for part in probes.split(m)])
    assert bool((results == results[:, :1]).all()), "columns differ"
    column = results[:, 0]
    assert bool(((column == 0) | (column == SMALL)).all())
    lost = (column == 0).nonzero()
    length = k if len(lost) == 0 else int(starts[lost[0]])
    # Where SMALL begins a chunk of its own it is left.
    wanted = torch.where((starts < length) | ((starts + 16) % length == 0), SMALL, 0.0)
    assert torch.equal(column, wanted.to(column.dtype)), (n, k, m)
    return length


def declared() -> dict[str, int]:
    """What the sources say of chunks."""
    text = (build_c.ROOT / "csrc" / "cuda" / "mm_tensor.h").read_text()
    return {name: int(number) for name, number in re.findall(r"FN_MM_(GATE_CHUNK|GATE_COLUMNS) = (\d+)", text)}


@each_dtype
@pytest.mark.parametrize("m", [1, 8, 33, 130, 1000])
def test_the_chunk_rule(m: int, dtype: str) -> None:
    """A function of N and K; M decides nothing."""
    said = declared()
    columns, chunk = said["GATE_COLUMNS"], said["GATE_CHUNK"]
    for n in (1, 200, columns, columns + 1, 2 * columns + 8):
        for k in (chunk, chunk + 64, 2 * chunk, 5 * chunk + 48) if m > 1 else (2 * chunk, 2 * chunk + 48):
            assert chunk_length(n, k, m, dtype) == (chunk if n <= columns and k > chunk else k), (n, k, m)


def probe(length: int, terms: dict[int, float], dtype: str) -> Any:
    row = torch.zeros(length, dtype=dtype_of(dtype), device="cuda")
    for k, value in terms.items():
        row[k] = value
    return row


@each_dtype
def test_order_of_steps_and_chunks(dtype: str) -> None:
    chunk = declared()["GATE_CHUNK"]
    places = [(0, 16, 32), (5, 21, 200), (15, 16, 47), (0, chunk - 32, chunk - 1)]
    places += [(3, chunk + 3, 2 * chunk), (chunk - 1, chunk, 3 * chunk + 1), (7, 2 * chunk, 4 * chunk + 5)]
    rows, wanted = [], []
    length = 4 * chunk + 40
    for first, second, third in places:
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
        for m in (2, 33, 129, 300):
            compared.add((value, k, n, m), product(a[:m], b.T), alone.expand(m, n))
        minus = torch.full((n,), -0.0, device="cuda")
        compared.add((value, k, n, "bias"), product(a, b.T, bias=minus), (alone + minus).expand(300, n))
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
    assert error <= (5e-7 if n <= declared()["GATE_COLUMNS"] else 1e-5)


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
