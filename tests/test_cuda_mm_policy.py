"""Which kernel a product on CUDA takes, asked without a GPU by tests/c/mm_policy.c."""

from __future__ import annotations

import re
import subprocess

import build_c
import helpers
import test_codegen_cuda


def ask(name: str, *sources: str) -> None:
    csrc = build_c.ROOT / "csrc" / "cuda"
    flags = ["-DFN_MM_HOPPER", *(f"-I{folder}" for folder in test_codegen_cuda.toolkit().includes)]
    program = build_c.build_program(name, [f"{name}.c", *(csrc / source for source in sources)], flags)
    command = [str(program), "--seed", str(helpers.SEED % 2**32)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    asked = re.search(r"(\d+) questions", result.stdout)
    assert asked is not None
    assert int(asked[1]) > 10**5


def test_two_operands_of_16_bits() -> None:
    """The kernels that were the fastest on an H200; nothing that a device lacks; launches within limits."""
    ask("mm_policy", "mm_split.c", "mm_hopper.c", "mm_chain.c", "mm_tensor.c")


def test_an_operand_of_32_bits() -> None:
    """The same."""
    ask("mm_fma_policy", "mm_fma.c", "mm_fma_few.c", "mm_fma_many.c")
