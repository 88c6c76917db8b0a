"""Products as a Hopper tensor core adds them: the model of tests/c/tensor_core.c against outputs recorded on an H200.

tests/data/tensor_core_h200.npz has encodings: `a_NAME` (m, k), `b_NAME` (n, k) and the fp32 `c_NAME` (m, n) = a @ b.T,
one ascending chain of steps of 16 from +0. NAME is the dtype, how the operands were drawn, and k. "normal" is a normal
distribution, "wide" one times 2^-12 to 2^12, "tiny" one times 2^-14 to 2^-7, so partly subnormal in fp16; "cancel" is
2^-12, 2^-6, 1, 2^6 or 2^12 with three random bits behind the point, of either sign. "zeros" and "negative_zeros" have
half and 90 % zeros, "infinite" infinities and NaNs; "subnormal" is subnormal, "low" has subnormal results (in fp16:
operands of about 2^-12), "high" overflows in bf16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import build_c
import numpy as np
import pytest
from helpers import seeded
from numpy.typing import NDArray

from fusednorm import _reference

RECORDED = Path(__file__).resolve().parent / "data" / "tensor_core_h200.npz"
FORMATS = ("bfloat16", "float16")  # numbered as `formats` of tensor_core.c
KINDS = ("normal", "wide", "cancel", "tiny", "zeros", "negative_zeros", "infinite", "subnormal", "low", "high")

pytestmark = pytest.mark.skipif(not build_c.have_compiler(), reason="no C compiler: set CC or install one")


@cache
def library(*macros: str) -> ctypes.CDLL:
    flags = ["-shared", "-fPIC", *(f"-D{macro}" for macro in macros)]
    loaded = ctypes.CDLL(str(build_c.build_program("tensor_core.so", ["tensor_core.c"], flags)))
    words = np.ctypeslib.ndpointer(np.uint16, 2, flags="C")
    out = np.ctypeslib.ndpointer(np.uint32, 2, flags=("C", "W"))
    loaded.tensor_core_products.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 5, words, words, out]
    loaded.tensor_core_products.restype = None
    return loaded


def products(
    dtype: str,
    a: NDArray[np.uint16],
    b: NDArray[np.uint16],
    chunk: int | None = None,
    part: int | None = None,
    macros: Sequence[str] = (),
) -> NDArray[np.uint32]:
    """Encodings of a @ b.T in fp32, by parts and chunks of K or, for None, as one; a and b are encodings too."""
    (m, k), n = a.shape, len(b)
    out = np.empty((m, n), np.uint32)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    library(*macros).tensor_core_products(
        FORMATS.index(dtype), m, n, k, part or max(k, 1), chunk or max(k, 1), a, b, out
    )
    return out


@cache
def recording() -> dict[str, NDArray[Any]]:
    with np.load(RECORDED) as arrays:
        return dict(arrays)


def differences(prefix: str, macros: Sequence[str] = ()) -> Iterator[str]:
    """The outputs that the model and the H200 do not agree on, of all cases whose names start so."""
    arrays = recording()
    cases = [name[2:] for name in arrays if name.startswith(f"c_{prefix}")]
    assert cases
    for case in cases:
        expected = arrays[f"c_{case}"]
        actual = products(case.split("_")[0], arrays[f"a_{case}"], arrays[f"b_{case}"], macros=macros)
        for row, column in np.argwhere(actual != expected):
            words = f"0x{actual[row, column]:08x}, the H200 0x{expected[row, column]:08x}"
            yield f"{case}[{row}, {column}]: the model gives {words}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_model_gives_the_bits_of_the_h200(dtype: str, kind: str) -> None:
    found = list(differences(f"{dtype}_{kind}_"))
    assert not found, f"{found[0]}; {len(found)} outputs differ"


@pytest.mark.parametrize("fault", ["EXTRA_BITS=1", "EXTRA_BITS=3", "STEP=8", "STEP=32"])
def test_the_recorded_outputs_tell_other_models_apart(fault: str) -> None:
    outputs = sum(array.size for name, array in recording().items() if name.startswith("c_"))
    assert sum(1 for _ in differences("", [fault])) > outputs / 8


@pytest.mark.parametrize("lowest", [-126, -131, -300])
def test_the_recorded_outputs_show_the_lowest_alignment(lowest: int) -> None:
    assert any(differences("bfloat16_", [f"LOWEST_EXPONENT=({lowest})"]))


@pytest.mark.parametrize(
    "k, chunk, part, error",
    [
        (4096, None, None, 4.4e-6),
        (7168, None, None, 7.8e-6),
        (8192, None, None, 9.1e-6),
        (7168, 512, None, 4.8e-7),
        (7168, 256, None, 2.6e-7),
        (7168, 256, 896, 2.3e-7),
    ],
)
def test_the_error_stated_in_the_documentation(k: int, chunk: int | None, part: int | None, error: float) -> None:
    random = seeded("tensor core", k)
    a, b = (_reference.narrow(random.standard_normal((n, k)).astype(np.float32), "bfloat16") for n in (16, 32))
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    result = products("bfloat16", a.view(np.uint16), b.view(np.uint16), chunk, part).view(np.float32)
    measured = np.linalg.norm(result - exact) / np.linalg.norm(exact)
    assert 0.8 * error < measured < 1.2 * error
