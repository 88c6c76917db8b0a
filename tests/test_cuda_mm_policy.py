"""Which kernel a product on CUDA takes, asked without a GPU by tests/c/mm_policy.c."""

from __future__ import annotations

import re
import subprocess

import build_c
import helpers
import test_codegen_cuda


def test_the_policy() -> None:
    """The kernels that were the fastest on an H200; nothing that a device lacks; launches within limits."""
    csrc = build_c.ROOT / "csrc" / "cuda"
    flags = ["-DFN_MM_HOPPER", *(f"-I{folder}" for folder in test_codegen_cuda.toolkit().includes)]
    program = build_c.build_program(
        "mm_policy",
        ["mm_policy.c", csrc / "mm_split.c", csrc / "mm_hopper.c", csrc / "mm_chain.c", csrc / "mm_tensor.c"],
        flags,
    )
    command = [str(program), "--seed", str(helpers.SEED % 2**32)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    asked = re.search(r"(\d+) questions", result.stdout)
    assert asked is not None
    assert int(asked[1]) > 10**5
