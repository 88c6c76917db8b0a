"""A row of a product on CUDA depends on itself and on b alone: not on the batch, the place in it, layouts, other calls.

Encodings are compared where they are, on the device; every output is full of NaN before the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_tensors
import helpers
import pytest
from cuda_tensors import SLEEP

import fusednorm

torch = cuda_tensors.require()
pytestmark = pytest.mark.usefixtures("cuda")

GATES = [(256, 7168), (384, 7168), (160, 5120), (128, 2880), (8, 4096), (1, 4096), (1, 7168), (33, 1000)]
PROJECTIONS = [(513, 1048), (4096, 4096), (6144, 4096)]
FP32 = [(256, 2000), (17, 1030), (1030, 300)]
OWN_ROWS = 40
BATCHES = (*range(1, 301), 512, 700, 1000, 1024, 1777, 2048, 3001, 4096)
LONG_BATCHES = (5003, 7200, 8192, 16384)

CASES = [(n, k, dtype, dtype) for n, k in GATES + PROJECTIONS for dtype in ("bfloat16", "float16")]
CASES += [(n, k, *dtypes) for n, k in FP32 for dtypes in (("float32", "float32"), ("bfloat16", "float32"))]
each_case = pytest.mark.parametrize(("n", "k", "a_dtype", "b_dtype"), CASES)


def dtype_of(name: str) -> Any:
    return getattr(torch, name)


def make(*shape: int, dtype: str = "bfloat16", key: object = "") -> Any:
    """Normal numbers, of the session's seed."""
    seed = int(helpers.seeded(shape, dtype, key).integers(2**62))
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype_of(dtype))


def empty(m: int, n: int, dtype: Any = torch.float32) -> Any:
    return torch.full((m, n), float("nan"), dtype=dtype, device="cuda")


def product(a: Any, b: Any, **keywords: Any) -> Any:
    out = empty(len(a), b.shape[1])
    assert fusednorm.mm_dtype(a, b, out=out, **keywords) is out
    return out


def encoded(a: Any) -> Any:
    return a.view(torch.int32 if a.element_size() == 4 else torch.int16)


class Comparison:
    """Collects what differs on the device, and asks it once."""

    def __init__(self) -> None:
        self.names: list[object] = []
        self.different: list[Any] = []

    def add(self, name: object, actual: Any, expected: Any) -> None:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        helpers.count_elements(actual.numel())
        self.names.append(name)
        self.different.append((encoded(actual) != encoded(expected)).sum())

    def check(self) -> None:
        counts = torch.stack(self.different).tolist()
        wrong = [f"{name}: {count} elements" for name, count in zip(self.names, counts) if count]
        assert not wrong, f"{len(wrong)} of {len(counts)} differ: {'; '.join(wrong[:8])}; seed {helpers.SEED}"


def operands(n: int, k: int, a_dtype: str, b_dtype: str) -> tuple[Any, Any, Any]:
    """Rows of a, b as a Linear's weight gives it, and each row's own product."""
    a, b = make(OWN_ROWS, k, dtype=a_dtype, key=n), make(n, k, dtype=b_dtype, key="weight").T
    alone = torch.cat([product(row, b) for row in a.split(1)])
    assert bool(torch.isfinite(alone).all())
    return a, b, alone


@each_case
def test_batches(n: int, k: int, a_dtype: str, b_dtype: str) -> None:
    """Each batch is a draw of the rows, so that a row stands in many places of many batches."""
    a, b, alone = operands(n, k, a_dtype, b_dtype)
    compared = Comparison()
    generator = torch.Generator(device="cuda").manual_seed(helpers.SEED % 2**62)
    tensor_core = a_dtype == b_dtype != "float32"
    for m in BATCHES + (LONG_BATCHES if (n, k) in GATES else ()) if tensor_core else (*range(1, 70), 128, 257, 1024):
        rows = torch.randint(OWN_ROWS, (m,), generator=generator, device="cuda")
        if m == OWN_ROWS:
            rows = torch.randperm(OWN_ROWS, generator=generator, device="cuda")
        compared.add(f"M = {m}", product(a[rows], b), alone[rows])
    compared.check()


def layouts(a: Any) -> Iterator[tuple[str, Any]]:
    """The same values elsewhere; what lies between and around them is NaN."""
    rows, columns = a.shape

    def hole(*shape: int) -> Any:
        return torch.full(shape, float("nan"), dtype=a.dtype, device="cuda")

    yield "row-major", a.contiguous()
    yield "column-major", a.T.contiguous().T
    for gap in (1, 8):
        wide = hole(rows + 1, columns + gap)[:rows, :columns]
        yield f"{gap} elements between rows", wide.copy_(a)
    tall = hole(columns + 1, rows + 8)[:columns, :rows].T
    yield "8 elements between columns", tall.copy_(a)
    for shift in (1, 4):
        moved = hole(a.numel() + 2 * shift)[shift:-shift].view(rows, columns)
        yield f"{shift} elements on", moved.copy_(a)
    yield "every other element", hole(rows, 2 * columns)[:, ::2].copy_(a)
    yield "one element on, by columns", hole(a.numel() + 1)[1:].view(columns, rows).T.copy_(a)


@each_case
def test_layouts(n: int, k: int, a_dtype: str, b_dtype: str) -> None:
    a, b, alone = operands(n, k, a_dtype, b_dtype)
    compared = Comparison()
    bs = list(layouts(b))
    for m in (1, 7, OWN_ROWS):
        for number, (name, x) in enumerate(layouts(a[:m])):
            for where, y in [("as it was", b), bs[number], bs[(number + m) % len(bs)]]:
                compared.add(f"M = {m}, a {name}, b {where}", product(x, y), alone[:m])
        for name, out in layouts(empty(m, n)):
            fusednorm.mm_dtype(a[:m], b, out=out)
            compared.add(f"M = {m}, out {name}", out.contiguous(), alone[:m])
    big = a.repeat(5, 1)
    for name, x in layouts(big):
        compared.add(f"M = {len(big)}, a {name}", product(x, b), alone.repeat(5, 1))
    compared.check()


@pytest.mark.parametrize(("n", "k"), [(1, 7168), (8, 4096), (256, 7168), (513, 1048), (4096, 4096)])
def test_graph(n: int, k: int) -> None:
    a, b, alone = operands(n, k, "bfloat16", "bfloat16")
    batches = [a[:1], a[:5], a, a.repeat(4, 1), a.repeat(20, 1)]
    outs = [empty(len(x), n) for x in batches]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, out in zip(batches, outs, strict=True):
            fusednorm.mm_dtype(x, b, out=out)
    for _ in range(2):
        compared = Comparison()
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for x, out in zip(batches, outs, strict=True):
            compared.add(f"M = {len(x)}", out, alone.repeat(20, 1)[: len(x)])
        compared.check()


@pytest.mark.parametrize(("n", "k"), [(8, 4096), (256, 7168), (4096, 4096)])
def test_beside_another_stream(n: int, k: int) -> None:
    """Other products and copies take the multiprocessors and the memory meanwhile."""
    a, b, alone = operands(n, k, "bfloat16", "bfloat16")
    other, other_b = make(700, k, key="other"), make(1000, k, key="other").T
    noise = product(other, other_b)
    side, compared = torch.cuda.Stream(), Comparison()
    torch.cuda.synchronize()
    for m in (1, 2, 9, OWN_ROWS):
        with torch.cuda.stream(side):
            loud = [product(other, other_b) for _ in range(4)]
        results = [product(a[:m], b) for _ in range(8)]
        torch.cuda.synchronize()
        for name, made, expected in (("own", results, alone[:m]), ("other", loud, noise)):
            for result in made:
                compared.add(f"M = {m}, {name}", result, expected)
    compared.check()


def test_operands_that_come_late() -> None:
    """Each operand and the bias, written on the stream after a pause: nothing is read before."""
    shapes = [(m, n, "bfloat16") for m, n in ((1, 256), (4, 256), (40, 256), (300, 256), (40, 1024), (300, 1024))]
    for m, n, weights in (
        *shapes,
        (1, 256, "float32"),
        (8, 256, "float32"),
        (2, 4096, "float32"),
        (300, 256, "float32"),
    ):
        for late in range(3):
            held = [make(m, 4096, key=m), make(n, 4096, dtype=weights, key=n), make(n, key="bias")]
            values = held[late].clone()
            expected = product(held[0], held[1].T, bias=held[2])
            held[late].fill_(float("nan"))
            out = empty(m, n)
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP // 20)
            held[late].copy_(values)
            fusednorm.mm_dtype(held[0], held[1].T, bias=held[2], out=out)
            compared = Comparison()
            compared.add((m, n, weights, late), out, expected)
            compared.check()


def test_chains() -> None:
    """Each call reads what the one ahead of it writes, with nothing between the two, as b, as a and as bias."""
    for m in (1, 40, 300):
        x, weights = make(m, 512, key="chain"), [make(512, 512, key=i) for i in range(6)]
        scaled = [(w.float() / 20).to(w.dtype) for w in weights]

        def chain(x: Any, step: Any, scaled: Any = scaled) -> Any:
            for w in scaled:
                x = fusednorm.mm_dtype(x, w.T, bias=x[0])
                step()
            return fusednorm.mm_dtype(scaled[0], x.T, "float32")  # (512, m): x is b

        one_by_one = chain(x, torch.cuda.synchronize)
        compared = Comparison()
        for number in range(10):
            compared.add((m, number), chain(x, lambda: None), one_by_one)
        compared.check()
