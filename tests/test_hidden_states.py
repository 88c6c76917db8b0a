"""The hidden states of a real model, shipped with the package: every path gives the contract's bits on them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import helpers
import numpy as np
import pytest

import fusednorm
from fusednorm.audit.operands import HIDDEN_STATES

EPS = 1e-6


@lru_cache(maxsize=1)
def stored() -> dict[str, Any]:
    with np.load(HIDDEN_STATES) as arrays:
        return dict(arrays)


@lru_cache(maxsize=64)
def expected(dtype: str, residual_dtype: str | None, preset: str) -> tuple[Any, Any]:
    """The contract as the tests state it, which shares no code with any path."""
    x, weight = (stored()[name].astype(dtype) for name in ("x", "weight"))
    semantics = fusednorm.SEMANTICS[preset]
    keywords = semantics.rms_norm if residual_dtype is None else semantics.fused_add_rmsnorm
    residual = None if residual_dtype is None else stored()["residual"].astype(residual_dtype)
    return helpers.contract(
        x,
        residual,
        None,
        weight,
        float(np.float32(EPS)),
        keywords["weight_offset"],
        keywords["cast_x_before_out_mul"],
        keywords.get("round_sum", False),
        dtype,
        residual_dtype,
    )


@pytest.mark.parametrize("preset", list(fusednorm.SEMANTICS))
@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_rms_norm(path: Any, dtype: str, preset: str) -> None:
    x, weight = (stored()[name].astype(dtype) for name in ("x", "weight"))
    out = path.rms_norm(path.array(x), path.array(weight), EPS, **fusednorm.SEMANTICS[preset].rms_norm)
    helpers.assert_same_bits(path.numpy(out), expected(dtype, None, preset)[0], (path.name, dtype, preset))


@pytest.mark.parametrize("preset", list(fusednorm.SEMANTICS))
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(dtype, residual) for dtype in helpers.DTYPES for residual in dict.fromkeys((dtype, "float32"))],
)
def test_fused_add_rmsnorm(path: Any, dtype: str, residual_dtype: str, preset: str) -> None:
    x, weight = (stored()[name].astype(dtype) for name in ("x", "weight"))
    residual = stored()["residual"].astype(residual_dtype)
    keywords = fusednorm.SEMANTICS[preset].fused_add_rmsnorm
    arrays = [path.array(a) for a in (x, residual, weight)]
    out, total = path.fused_add_rmsnorm(*arrays, EPS, inplace=False, **keywords)
    expected_out, expected_total = expected(dtype, residual_dtype, preset)
    helpers.assert_same_bits(path.numpy(out), expected_out, (path.name, dtype, residual_dtype, preset, "out"))
    helpers.assert_same_bits(path.numpy(total), expected_total, (path.name, dtype, residual_dtype, preset, "residual"))


def test_file() -> None:
    assert HIDDEN_STATES.stat().st_size <= 1 << 20
    arrays = stored()
    about = json.loads(str(arrays["about"]))
    assert about["script"] == "tools/make_hidden_states.py"
    assert "all-MiniLM-L6-v2" in about["model"]
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items() if name != "about"} == {
        "x": ((256, 384), "float32"),
        "residual": ((256, 384), "float32"),
        "weight": ((384,), "float32"),
    }
    # Real numbers, not noise: some columns are far larger than the rest, as in trained models.
    rms = np.sqrt(np.mean(arrays["x"].astype(np.float64) ** 2, axis=0))
    assert np.isfinite(arrays["x"]).all()
    assert np.isfinite(arrays["residual"]).all()
    assert rms.max() > 5 * np.median(rms)
