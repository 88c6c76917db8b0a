"""native.c, compiled at first use with the same tools as the tests' C, and the stub array types of the tests."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import build_c

SOURCE = "benchmarks/native.c"


@cache
def native() -> ModuleType:
    """The module of native.c, with threads where the compiler has OpenMP."""
    try:
        return build_c.build_extension("benchmarks_native", [SOURCE], ["-fopenmp"])
    except build_c.BuildError:
        return build_c.build_extension("benchmarks_native", [SOURCE])


def stubs() -> ModuleType:
    return build_c.stub_producer()
