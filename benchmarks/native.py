"""native.c, compiled at first use with the same tools as the tests' C, and the stub array types of the tests."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

build_c = importlib.import_module("build_c")


@cache
def native() -> ModuleType:
    """The module of native.c, with threads where the compiler has OpenMP."""
    try:
        return _build("-fopenmp")
    except build_c.BuildError:
        return _build()


def _build(*flags: str) -> ModuleType:
    module: ModuleType = build_c.build_extension("benchmarks_native", ["benchmarks/native.c"], list(flags))
    return module


def stubs() -> ModuleType:
    """Arrays that have the C exchange API, and the empty function `nothing`."""
    module: ModuleType = build_c.stub_producer()
    return module
