"""The policy of the CUDA schedules, asked without a GPU by tests/c/schedule_policy.c, and what can force a schedule."""

from __future__ import annotations

import re
import subprocess

import build_c
import helpers
import pytest
from cuda_cases import SCHEDULES


@pytest.fixture(scope="module")
def report() -> str:
    """What the program prints, having found no counterexample."""
    if not build_c.have_compiler():
        pytest.skip("no C compiler: set CC or install one")
    program = build_c.build_program("schedule_policy", ["schedule_policy.c"])
    command = [str(program), "--seed", str(helpers.SEED % 2**32)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_what_the_policy_asks_for_exists(report: str) -> None:
    asked = re.search(r"(\d+) questions, (\d+) rules reached", report)
    assert asked is not None
    assert int(asked[1]) > 10**7
    assert int(asked[2]) > 0


def test_longest_rows(report: str) -> None:
    """Those that need not be read twice."""
    assert "rows up to 131072 elements with clusters, 28672 without" in report


def test_every_forced_schedule_has_kernels(report: str) -> None:
    forced = re.findall(r"forced (\w+)(?: up to (\d+) elements, up to (\d+) elements fused)?$", report, re.MULTILINE)
    assert [name for name, _, _ in forced] == list(SCHEDULES)
    without = [name for name, plain, fused in forced if not plain or not fused]
    assert without == ["strided"]
