"""The extension over tests/c/fake_cuda.c, and arrays in "device" memory that is the host's, for test_cuda_fake*.py."""

from __future__ import annotations

import ctypes
import gc
import importlib.machinery
import importlib.util
import sysconfig
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import build_c
import numpy as np
import pytest
from array_makers import f32, stub_module

import fusednorm


class Fake:
    """The extension, and the hands and eyes of its CUDA."""

    def __init__(self, core: ModuleType, library: ctypes.CDLL) -> None:
        self.core, self.library = core, library
        library.fake_log.restype = ctypes.c_char_p

    def log(self) -> list[str]:
        """What CUDA was asked for since the last time."""
        lines: list[str] = self.library.fake_log().decode().splitlines()
        return [line for line in lines if line not in ("describe", "device_of")]

    def work(self) -> list[str]:
        """The operations, and the orders between streams."""
        return [line for line in self.log() if line.startswith(("norm", "mm", "order"))]

    def fresh(self) -> ModuleType:
        """The same extension with nothing seen or remembered."""
        spec = self.core.__spec__
        assert spec is not None
        assert spec.loader is not None
        core = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(core)
        return core

    def set(self, name: str, value: int) -> None:
        self.library.fake_set(name.encode(), value)


@cache
def load() -> Fake:
    if not build_c.have_compiler() or not build_c.have_python_headers():
        pytest.skip("the fake needs a C compiler and Python.h")
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("the extension is built with the headers of NumPy 2, whatever it runs with")
    csrc = build_c.ROOT / "csrc"
    sources = [path for folder in ("", "cpu", "python") for path in sorted((csrc / folder).glob("*.c"))]
    sources = [*(path for path in sources if path.name != "no_cuda.c"), build_c.TESTS_C / "fake_cuda.c"]
    includes = [f"-I{folder}" for folder in (sysconfig.get_path("include"), np.get_include())]
    flags = ["-fPIC", "-shared", "-pthread", "-fvisibility=hidden", '-DFN_VERSION="0"', "-w", *includes]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = build_c._build("fake_core", sources, flags, build_c.compiler_command(), suffix)
    loader = importlib.machinery.ExtensionFileLoader("fake_fusednorm._core", str(built))
    spec = importlib.util.spec_from_file_location("fake_fusednorm._core", built, loader=loader)
    assert spec is not None
    core = importlib.util.module_from_spec(spec)
    loader.exec_module(core)
    return Fake(core, ctypes.CDLL(str(built)))


def opened() -> Iterator[Fake]:
    """What the fixture `fake` is."""
    fake = load()
    fake.log()
    yield fake
    for name in ("current_device", "busy", "capturing", "fails", "reason"):
        fake.set(name, 0)
    fake.core.set_weights_are_constant(False)
    fake.core.rms_norm(f32(1, 8))  # releases what is pending
    gc.collect()


class Interface:
    """An array with nothing but `__cuda_array_interface__`."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array, self.dtype, self.changes = array, array.dtype, changes

    @property
    def __cuda_array_interface__(self) -> Any:
        interface = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, not self.array.flags.writeable),
            "strides": None if self.array.flags.c_contiguous else self.array.strides,
            "version": 3,
        }
        return {**interface, **self.changes}


def capsule(array: Any, **attributes: Any) -> Any:
    """An array with `__dlpack__` on "CUDA" over the ndarray's memory; `seen` gets the keywords it is asked with."""
    names = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16"}
    made = stub_module().Capsule(array.data, names[array.dtype], array.shape)
    made.device_type = 2
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def expected(x: Any, weight: Any = None) -> bytes:
    result: bytes = fusednorm.rms_norm(x, weight).tobytes()
    return result


def case() -> tuple[Any, Any, Any]:
    return f32(4, 8), f32(8), np.zeros((4, 8), np.float32)


class Tensor(ctypes.Structure):
    """The beginning of a DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))
