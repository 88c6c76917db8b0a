"""The caller's rounding mode, flush-to-zero and traps are neither obeyed nor disturbed, on any thread that computes."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from helpers import (
    DTYPES,
    PRELUDE,
    assert_same_bits,
    check_python,
    from_float32,
    random_rows,
    random_weight,
    run_python,
    seeded,
)

import fusednorm
from fusednorm import _reference

# C, because nothing in Python's library reads or sets the modes.
MODES_C = r"""
#include <fenv.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
enum { FLUSH = 0x8040, FLAGS = 0x3f }; /* flush to zero, denormals are zero */
uint64_t modes(void) { return _mm_getcsr() & ~(unsigned)FLAGS; }
void set_flush(int on) { _mm_setcsr(on ? _mm_getcsr() | FLUSH : _mm_getcsr() & ~(unsigned)FLUSH); }
#else
uint64_t modes(void) { uint64_t fpcr; __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr)); return fpcr; }
void set_flush(int on) {
    uint64_t fpcr = modes();
    fpcr = on ? fpcr | (1ull << 24) : fpcr & ~(1ull << 24);
    __asm__ volatile("msr fpcr, %0" : : "r"(fpcr));
}
#endif
int set_round(int mode) {
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    return fesetround(modes[mode]);
}
int get_round(void) { return fegetround(); }
volatile float one = 1, tiny = 0x1p-149f, third = 3;
float one_third(void) { return one / third; } /* differs between the rounding modes */
float subnormal(void) { return tiny * one; }  /* 0 when flushed */
#if defined(_OPENMP)
int flush_pool(int threads) { /* as a library does that wants its own threads fast; how many do it is returned */
    int flushing = 0;
#pragma omp parallel num_threads(threads) reduction(+ : flushing)
    { set_flush(1); flushing += subnormal() == 0; }
    return flushing;
}
int flushing_pool(int threads) {
    int flushing = 0;
#pragma omp parallel num_threads(threads) reduction(+ : flushing)
    flushing += subnormal() == 0;
    return flushing;
}
#endif
"""


@pytest.fixture(scope="session")
def modes_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler to build the helper that sets floating-point modes")
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        pytest.skip(f"no helper for the control register of {platform.machine()}")
    folder = tmp_path_factory.mktemp("modes")
    (folder / "modes.c").write_text(MODES_C)
    library = folder / "modes.so"
    build = [compiler, "-O1", "-fPIC", "-shared", "-o", library, folder / "modes.c", "-lm"]
    if subprocess.run([*build, "-fopenmp"], capture_output=True).returncode != 0:
        subprocess.run(build, check=True)
    return str(library)


@pytest.fixture
def modes(modes_library: str) -> Iterator[Any]:
    library = ctypes.CDLL(modes_library)
    library.modes.restype = ctypes.c_uint64
    library.one_third.restype = library.subnormal.restype = ctypes.c_float
    assert library.subnormal() != 0
    yield library
    library.set_round(0)
    library.set_flush(0)


def sensitive(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any]:
    """Values whose sums, squares and results are subnormal in many places, and inexact everywhere."""
    rng = seeded("modes", shape, dtype)
    x, residual = (random_rows(rng, shape, "float32", "normal") for _ in range(2))
    x[0], residual[0] = np.ldexp(x[0], -136), np.ldexp(residual[0], -137)
    x[1], residual[1] = np.ldexp(x[1], -70), np.ldexp(residual[1], -70)
    x[2:, ::5] = np.ldexp(x[2:, ::5], -135)
    residual[2:, ::5] = np.ldexp(residual[2:, ::5], -140)
    weight = random_weight(rng, shape[-1], "float32")
    weight[::7] = np.ldexp(weight[::7], -126)
    return from_float32(x, dtype), residual, weight


@lru_cache
def sensitive_product(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any]:
    """Arguments, keywords and results: of products, sums and outputs many are subnormal, and all others inexact."""
    x, _, _ = sensitive((shape[0], min(shape[1], 3000)), dtype)
    columns = 3 if shape[0] > 100 else 40
    b = seeded("product modes", shape).standard_normal((x.shape[1], columns), np.float32)
    b *= np.ldexp(np.float32(1), np.arange(columns) % 3 * -19)  # the second column's results are subnormal in float16
    b[:, 2::3] = np.ldexp(b[:, 2::3], -90)
    keywords = {"bias": b[0].copy(), "out_dtype": dtype}
    return (x, b), keywords, (_reference.mm_dtype(x, b, **keywords),)


MODES = [
    ("nearest", 0, 0),
    ("upward", 1, 0),
    ("downward", 2, 0),
    ("toward zero", 3, 0),
    ("flush", 0, 1),
    ("both", 2, 1),
]


@pytest.mark.parametrize("shape", [(4, 96), (600, 512), (3, 2**17)])
@pytest.mark.parametrize("name, rounding, flush", MODES, ids=[name for name, _, _ in MODES])
def test_modes_are_neither_obeyed_nor_disturbed(
    cpu_path: Any, threads: None, modes: Any, name: str, rounding: int, flush: int, shape: tuple[int, ...]
) -> None:
    for dtype in DTYPES:
        x, residual, weight = sensitive(shape, dtype)
        options = {"weight_offset": 0.1, "out_dtype": dtype}  # neither 0.1 nor eps is a float32
        calls = [
            (cpu_path.rms_norm, (x, weight, 1e-5), options, (_reference.rms_norm(x, weight, 1e-5, **options),)),
            (
                cpu_path.fused_add_rmsnorm,
                (x, residual, weight, 1e-37),
                {"inplace": False, "out_dtype": "float32"},
                _reference.fused_add_rmsnorm(x, residual, weight, 1e-37, out_dtype="float32"),
            ),
            (cpu_path.mm_dtype, *sensitive_product(shape, dtype)),
        ]
        for number in (1, 2):
            fusednorm.set_num_threads(number)
            for function, arguments, keywords, expected in calls:
                modes.set_round(rounding)
                modes.set_flush(flush)
                before = modes.modes(), modes.get_round(), modes.one_third(), modes.subnormal() == 0
                results = function(*arguments, **keywords)
                after = modes.modes(), modes.get_round(), modes.one_third(), modes.subnormal() == 0
                modes.set_round(0)
                modes.set_flush(0)
                assert before == after, f"{name}: the modes were {before}, and are {after}"
                assert before[3] == bool(flush)
                for actual, wanted in zip(results if isinstance(results, tuple) else (results,), expected):
                    assert_same_bits(actual, wanted, f"{name}, {number} threads, {dtype}")


def test_modes_of_a_call_that_fails(cpu_path: Any, modes: Any) -> None:
    x = np.ones((4, 8), np.float32)
    modes.set_round(1)
    modes.set_flush(1)
    before = modes.modes()
    for wrong in ({"eps": -1.0}, {"weight": x}, {"out": x.T}, {"out": x[::-1]}, {"out_dtype": "int8"}):
        with pytest.raises((TypeError, ValueError)):
            cpu_path.rms_norm(x, **wrong)
    for wrong in ({"bias": x}, {"out": x}, {"out": x[:, :4].T[::-1]}, {"out_dtype": "int8"}):
        with pytest.raises((TypeError, ValueError)):
            cpu_path.mm_dtype(x, x.T, **wrong)
    after = modes.modes()
    modes.set_round(0)
    modes.set_flush(0)
    assert before == after


def test_threads_born_under_flush_to_zero(modes_library: str) -> None:
    """The pool's threads inherit the modes of the call that starts them."""
    check_python(
        PRELUDE
        + f"""
library = ctypes.CDLL({modes_library!r})
library.set_flush(1); library.set_round(1)
first, product = fusednorm.rms_norm(x, eps=0.0), fusednorm.mm_dtype(x, x[:20].T)
library.set_flush(0); library.set_round(0)
assert first.tobytes() == expected
assert same()
assert product.tobytes() == fusednorm.mm_dtype(x, x[:20].T).tobytes()
assert product[:9].tobytes() == _reference.mm_dtype(x[:9], x[:20].T).tobytes()
""",
        OMP_NUM_THREADS="4",
    )


@pytest.mark.skipif(fusednorm.info()["cpu"]["threading"] != "openmp", reason="built without OpenMP")
def test_modes_of_pool_threads(modes_library: str) -> None:
    """OpenMP's threads are shared with other libraries, which may have set their modes, and keep them."""
    if not hasattr(ctypes.CDLL(modes_library), "flush_pool"):
        pytest.skip("the helper was built without OpenMP")
    check_python(
        PRELUDE
        + f"""
library = ctypes.CDLL({modes_library!r})
fusednorm.set_num_threads(4)
for a in (x, x[:1].repeat(160, axis=1)[:, ::1], x.reshape(3, -1)):
    wanted = _reference.rms_norm(a, eps=0.0).tobytes()
    assert library.flush_pool(4) == 4
    library.set_flush(0)
    assert fusednorm.rms_norm(a, eps=0.0).tobytes() == wanted, a.shape
    assert library.flushing_pool(4) == 3, "a pool thread's modes were changed"
b = np.ascontiguousarray(x[:5].T)
wanted = _reference.mm_dtype(x, b).tobytes()
assert library.flush_pool(4) == 4
library.set_flush(0)
assert fusednorm.mm_dtype(x, b).tobytes() == wanted
assert library.flushing_pool(4) == 3, "a pool thread's modes were changed"
"""
    )


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="aarch64 cores need not trap")
def test_trapping_callers() -> None:
    """After feenableexcept a caller's own invalid operation is a SIGFPE; what overflows inside a call is none."""
    done = run_python(
        PRELUDE
        + """
libm = ctypes.CDLL("libm.so.6")
hostile = np.array([[np.inf, -np.inf, np.nan, 3e38, 1e-45, 0.1, 1, 1]], np.float32).repeat(9, axis=0)
libm.feenableexcept(0x1d) # all but inexact, which Python itself does not survive
for a in (hostile, x):
    fusednorm.fused_add_rmsnorm(a, a, a[0], 1e-5, inplace=False, out_dtype="float16")
    fusednorm.mm_dtype(a, a[:20].T, "float16", bias=a[:20, 0])
libm.fedisableexcept(0x1d)
print("survived")
"""
    )
    if "libm.so.6" in done.stderr:
        pytest.skip("not the GNU C library")
    assert (done.returncode, done.stdout.strip()) == (0, "survived"), done.stderr


def test_torch_flush_denormal(cpu_path: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, _, weight = sensitive((5, 64), "float32")
    expected = _reference.rms_norm(x, weight)
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this processor")
    actual = cpu_path.rms_norm(x, weight)
    flushed = torch.tensor([1e-40]).mul(1.0).eq(0).item()
    torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)
    assert flushed, "the call switched flush-to-zero off"
