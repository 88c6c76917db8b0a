"""Shows that an installed fusednorm is whole and computes the right bits. Needs NumPy only; run outside the checkout.

python smoke.py --version 0.1.0 [--threading none] [--cuda 90,90-ptx]
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

import numpy as np

import fusednorm
from fusednorm import _reference


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", required=True, help="the version that the package must have")
    parser.add_argument("--threading", choices=("openmp", "none"), help="how the module must have been built")
    parser.add_argument("--cuda", help="the architectures it must have been built for; an empty word: none")
    options = parser.parse_args()
    info = fusednorm.info()

    folder = Path(fusednorm.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not an installed package"
    for name in ("py.typed", "*.pyi", "data/hidden_states.npz"):
        assert list(folder.glob(name)), f"the installed package lacks {name}"
    sources = [name for suffix in ("c", "h", "cu", "cuh") for name in folder.rglob(f"*.{suffix}")]
    assert not sources, f"the installed package holds sources: {sources}"
    metadata = importlib.metadata.metadata("fusednorm")
    versions = {fusednorm.__version__, info["version"], metadata["Version"]}
    assert versions == {options.version}, f"versions {versions}, expected {options.version}"
    assert "Apache-2.0" in (metadata["License-Expression"] or ""), "the metadata names no license"
    if options.threading:
        assert info["cpu"]["threading"] == options.threading, info["cpu"]
    if options.cuda is not None:
        cuda = info["cuda"]
        assert cuda["built"] is bool(options.cuda), cuda
        assert cuda["available"] or cuda["reason"], "no CUDA, and no reason"
        if options.cuda:
            assert list(cuda["architectures"]) == options.cuda.split(","), cuda

    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        x, residual = (rng.standard_normal((37, 1000)).astype(dtype) for _ in range(2))
        weight = rng.standard_normal(1000).astype(np.float32)
        assert same_bits(fusednorm.rms_norm(x, weight, 1e-5), _reference.rms_norm(x, weight, 1e-5))
        expected = _reference.fused_add_rmsnorm(x, residual, weight, 1e-5)
        out, residual_out = fusednorm.fused_add_rmsnorm(x, residual, weight, 1e-5)
        assert out is x, "not in place"
        assert residual_out is residual, "not in place"
        assert same_bits(out, expected[0])
        assert same_bits(residual_out, expected[1])
    print(f"fusednorm {options.version} in {folder}: {info['compiler']}, NumPy {np.__version__}")
    print(f"cpu: {info['cpu']}\ncuda: {info['cuda']}")


if __name__ == "__main__":
    main()
