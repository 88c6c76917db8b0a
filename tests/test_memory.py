"""No call keeps a reference, a capsule or a byte, whether it succeeds or fails.

Every bound comes from the smallest thing that a leak per call could be, and lies at a third of it: CALLS leaking calls
keep CALLS references, objects or blocks of Python's allocator, and 16 bytes of the C heap each, its smallest chunk. A
cache that fills or a buffer that doubles once shows in one round of calls, a leak in every round: the smallest counts.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import array_makers as make
import numpy as np
import pytest
from array_makers import f32, j32, stub, t32
from test_mm_errors import ROWS as PRODUCT_ROWS
from wrong_calls import ROWS, Row

import fusednorm

CALLS = 300
ROUNDS = 3
SMALLEST_CHUNK_BYTES = 16
LIMIT = CALLS // 3


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    """Each test freezes what there is (see Usage), so that no collection and no count goes through it again."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _dual_level() -> Iterator[None]:
    yield
    make.leave_dual_level()


class Mallinfo2(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def _find_mallinfo2() -> Callable[[], Mallinfo2] | None:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33
    if mallinfo2 is not None:
        mallinfo2.restype = Mallinfo2
    return mallinfo2


_mallinfo2 = _find_mallinfo2()


def heap_bytes() -> int:
    """The bytes in use on the C heap of this thread's arena and in large blocks; 0 where the C library does not say."""
    if _mallinfo2 is None:
        return 0
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_private(value: Any) -> bool:
    """An array or a list that was made for this test: nobody but the test has references to it."""
    return not isinstance(value, (str, bytes, int, float, complex, tuple, type, np.dtype, type(None)))


class Usage:
    """What the process holds now, beside the references to `watched`."""

    def __init__(self, watched: list[Any]) -> None:
        gc.collect()
        self.references = [sys.getrefcount(each) for each in watched]
        self.objects = len(gc.get_objects())
        self.blocks = sys.getallocatedblocks()
        self.heap = heap_bytes()

    def kept_since(self, before: Usage) -> set[str]:
        """What a round of calls kept beyond its limit."""
        kept = set()
        for i, (old, new) in enumerate(zip(before.references, self.references, strict=True)):
            if abs(new - old) >= LIMIT:
                kept.add(f"references to watched object {i}")
        for what, limit in (("objects", LIMIT), ("blocks", LIMIT), ("heap", LIMIT * SMALLEST_CHUNK_BYTES)):
            if getattr(self, what) - getattr(before, what) >= limit:
                kept.add(what)
        return kept


def assert_nothing_kept(call: Callable[[], Any], arguments: list[Any]) -> None:
    """Not one reference more to an array argument; no leak per call of anything else."""
    arrays = [each for each in arguments if is_private(each)]
    watched = [*arrays, *(type(each) for each in arguments), *(getattr(each, "dtype", None) for each in arguments)]
    watched += [sys.modules[name] for name in ("fusednorm", "numpy", "torch", "jax.numpy") if name in sys.modules]
    watched += [np.dtype(np.float32), np.dtype(np.float16), np.ndarray, None, True, False, ()]
    references = [sys.getrefcount(each) for each in arrays]
    repeat(call, 20)  # per-type and per-thread caches are filled now
    assert [sys.getrefcount(each) for each in arrays] == references
    gc.collect()
    gc.freeze()
    every_round: set[str] | None = None
    for _ in range(ROUNDS):
        before = Usage(watched)
        repeat(call, CALLS)
        kept = Usage(watched).kept_since(before)
        every_round = kept if every_round is None else every_round & kept
        if not every_round:
            return
    pytest.fail(f"kept by {CALLS} calls, in each of {ROUNDS} rounds: {every_round}; watched: {watched}")


def assert_stubs_balanced() -> None:
    """Every managed tensor was released, none twice, and every capsule was taken or left whole."""
    if "stub_producer" not in sys.modules:
        return
    gc.collect()
    counters = sys.modules["stub_producer"].counters()
    assert counters["outstanding"] == 0, counters
    assert counters["deleted_twice"] == 0, counters
    assert counters["capsules"] == counters["capsules_used"] + counters["capsules_unused"], counters
    assert counters["allocated"] == counters["freed"], counters


def repeat(call: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        call()


@pytest.mark.parametrize("row", [*ROWS, *PRODUCT_ROWS], ids=lambda row: row.id)
def test_an_error_keeps_nothing(row: Row) -> None:
    function, positional, named = row.make()

    def call() -> None:
        try:
            function(*positional, **named)
        except row.exception:
            return
        pytest.fail("the call succeeded")

    assert_nothing_kept(call, [*positional, *named.values()])
    assert_stubs_balanced()


# What succeeds: for each kind of array the calls that give it an output, allocate one, and change it in place.

COLUMNS = 64


def numpy_array() -> Any:
    return f32(4, COLUMNS)


def bfloat16_array() -> Any:
    return f32(4, COLUMNS).astype(make.bf16())


def torch_tensor() -> Any:
    return t32(4, COLUMNS)


def torch_parameter() -> Any:
    return make.torch().nn.Parameter(t32(4, COLUMNS), requires_grad=False)


def jax_array() -> Any:
    return j32(4, COLUMNS)


def stub_array() -> Any:
    return stub("Stub", 4, COLUMNS)


def stub_managed() -> Any:
    return stub("StubWithoutBorrow", 4, COLUMNS)


def capsule_array() -> Any:
    return stub("Capsule", 4, COLUMNS)


def legacy_capsule() -> Any:
    return stub("Capsule", 4, COLUMNS, legacy=True, refuses_max_version=True)


MAKERS = [numpy_array, bfloat16_array, torch_tensor, torch_parameter, jax_array, stub_array, stub_managed]
MAKERS += [capsule_array, legacy_capsule]
FORMS = ["out", "allocated", "in place", "out of place", "batch invariant", "product", "product out", "logits"]


def make_call(maker: Callable[[], Any], form: str) -> tuple[Callable[[], Any], list[Any]]:
    x, residual, out, weight = maker(), maker(), maker(), f32(COLUMNS)
    if maker is jax_array and form in ("out", "in place", "product out"):
        pytest.skip("jax arrays are immutable: no output can be one")
    given = {"allocated": "out", "out of place": "in place", "batch invariant": "batch out", "product": "product out"}
    if maker in (capsule_array, legacy_capsule) and form == "logits":
        pytest.skip("a capsule's library makes no results")
    if maker in (capsule_array, legacy_capsule) and form in given:
        form, out = given[form], numpy_array()
    square, gate = f32(COLUMNS, COLUMNS), f32(3, COLUMNS)
    x_and_weight = {
        "out": lambda: fusednorm.rms_norm(x, weight, 1e-6, out=out),
        "allocated": lambda: fusednorm.rms_norm(x, weight),
        "in place": lambda: fusednorm.fused_add_rmsnorm(x, residual, weight, eps=1e-6),
        "out of place": lambda: fusednorm.fused_add_rmsnorm(x, residual, weight, inplace=False),
        "batch invariant": lambda: fusednorm.rms_norm_batch_invariant(x, (COLUMNS,), weight),
        "batch out": lambda: fusednorm.rms_norm_batch_invariant(x, (COLUMNS,), weight, out=out),
        "product": lambda: fusednorm.mm_dtype(x, square, bias=weight),
        "product out": lambda: fusednorm.mm_dtype(x, square, out=out),
        "logits": lambda: fusednorm.router_logits(x, gate, 2),
    }
    return x_and_weight[form], [x, residual, weight, out]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_a_success_keeps_nothing(maker: Callable[[], Any], form: str) -> None:
    call, arguments = make_call(maker, form)
    assert_nothing_kept(call, arguments)
    assert_stubs_balanced()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_resident_memory_does_not_grow(maker: Callable[[], Any], form: str) -> None:
    """Beyond what any allocator counts: an array's bytes, at least 512 of them, kept by each call would show."""
    call, _ = make_call(maker, form)
    calls, leak_bytes = (2_000, 512) if maker is jax_array else (20_000, 512)
    repeat(call, calls // 4)
    growth = []
    for _ in range(ROUNDS):
        before = resident_bytes()
        repeat(call, calls)
        growth.append(resident_bytes() - before)
    assert min(growth) < calls * leak_bytes // 3, f"{growth} bytes in rounds of {calls} calls"
