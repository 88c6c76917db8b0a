"""The path under test, fresh random numbers, and the count of elements compared bit for bit.

`path` runs a test over the NumPy reference, every CPU path that this machine has, and CUDA where there is a device;
with FUSEDNORM_CPU set, over that path alone. FUSEDNORM_TEST_PATHS=cuda,avx2 leaves only the paths it names. A path is
what it does to arrays: a device is one more class here and one more name in `make_path`. A test never assumes that an
array of a path shares memory with the ndarray it was made of: `path.numpy` tells what it holds.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import cuda_arrays
import helpers
import hypothesis
import numpy as np
import pytest

import fusednorm
from fusednorm import _core, _reference

Array = np.ndarray[Any, Any]

# These tests make their JAX arrays in CPU memory, also where there is a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

hypothesis.settings.register_profile(
    "fusednorm",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fusednorm")


class CorePath:
    """One path of the extension: the public functions, with the dispatch forced while the path is open."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rms_norm = fusednorm.rms_norm
        self.fused_add_rmsnorm = fusednorm.fused_add_rmsnorm
        self.rms_norm_batch_invariant = fusednorm.rms_norm_batch_invariant
        self.mm_dtype = fusednorm.mm_dtype

    def open(self) -> None:
        _core._force_cpu_path(self.name)

    def close(self) -> None:
        _core._force_cpu_path(None)

    def array(self, array: Array) -> Any:
        """The ndarray on the path's device, with its strides, alignment and all bytes around it."""
        return array

    def together(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Several at once: those that share memory share it on the device too. What is no ndarray stays as it is."""
        return dict(arrays)

    def numpy(self, array: Any) -> Array:
        """What the array holds now. The ndarray that it was made of, and all bytes around that, are up to date too."""
        assert isinstance(array, np.ndarray)
        return array

    def shares_memory(self, a: Any, b: Any) -> bool:
        return np.shares_memory(a, b)

    def view(self, raw: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
        """A view into `raw`, an array of bytes on the path's device; strides and offset are in bytes."""
        return np.ndarray(shape, dtype, raw, offset, strides)

    def room(self, nbytes: int) -> Any:
        """Bytes for views with huge strides, too many to copy: use `write` and `read` on those views."""
        no_reserve = 0x4000 if sys.platform == "linux" else 0  # only pages that are touched cost memory
        try:
            return self._room(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve))
        except (OSError, MemoryError) as error:
            pytest.skip(f"no room of {nbytes / 2**30:.1f} GiB: {error}")

    def _room(self, reserved: mmap.mmap) -> Any:
        return np.frombuffer(reserved, np.uint8)

    def write(self, view: Any, values: Array) -> None:
        view[...] = values

    def read(self, view: Any) -> Array:
        return np.array(view)


class ReferencePath(CorePath):
    """The NumPy twin, given outputs to write to."""

    def __init__(self) -> None:
        self.name = "reference"
        self.rms_norm = self._rms_norm
        self.fused_add_rmsnorm = self._fused_add_rmsnorm
        self.rms_norm_batch_invariant = self._rms_norm_batch_invariant
        self.mm_dtype = self._mm_dtype

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def _deliver(result: Array, out: Array | None) -> Array:
        if out is None:
            return result
        out[...] = result
        return out

    def _rms_norm(self, *args: Any, out: Array | None = None, **keywords: Any) -> Array:
        if out is not None:
            keywords["out_dtype"] = out.dtype
        return self._deliver(_reference.rms_norm(*args, **keywords), out)

    def _rms_norm_batch_invariant(self, *args: Any, out: Array | None = None, **keywords: Any) -> Array:
        return self._deliver(_reference.rms_norm_batch_invariant(*args, **keywords), out)

    def _mm_dtype(
        self, a: Array, b: Array, out_dtype: Any = None, *, bias: Array | None = None, out: Array | None = None
    ) -> Array:
        if out is not None:
            out_dtype = out.dtype
        return self._deliver(_reference.mm_dtype(a, b, out_dtype, bias=bias), out)

    def _fused_add_rmsnorm(
        self,
        x: Array,
        residual: Array,
        *args: Any,
        out: Array | None = None,
        residual_out: Array | None = None,
        inplace: bool = True,
        **keywords: Any,
    ) -> tuple[Array, Array]:
        if inplace:
            out, residual_out = x if out is None else out, residual if residual_out is None else residual_out
        if out is not None:
            keywords["out_dtype"] = out.dtype
        if residual_out is not None:
            keywords["residual_out_dtype"] = residual_out.dtype
        results = _reference.fused_add_rmsnorm(x, residual, *args, **keywords)
        return self._deliver(results[0], out), self._deliver(results[1], residual_out)


class CudaPath(CorePath):
    """Arrays with nothing but `__cuda_array_interface__`. The library cannot allocate those, so this class does."""

    def __init__(self) -> None:
        self.name = "cuda"
        self.rms_norm = self._rms_norm
        self.fused_add_rmsnorm = self._fused_add_rmsnorm
        self.rms_norm_batch_invariant = self._rms_norm_batch_invariant

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def array(self, array: Array) -> Any:
        return cuda_arrays.to_device({"": array})[""]

    def together(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {**arrays, **cuda_arrays.to_device({k: a for k, a in arrays.items() if isinstance(a, np.ndarray)})}

    def numpy(self, array: Any) -> Array:
        assert isinstance(array, cuda_arrays.CudaArray)
        return array.download()

    def shares_memory(self, a: Any, b: Any) -> bool:
        return a.buffer is b.buffer and np.shares_memory(a.twin, b.twin)

    def view(self, raw: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
        return raw.view(dtype, shape, strides, offset)

    def _room(self, reserved: mmap.mmap) -> Any:
        return cuda_arrays.room(reserved)

    def write(self, view: Any, values: Array) -> None:
        view.write(values)

    def read(self, view: Any) -> Array:
        return view.read()

    def _rms_norm(self, x: Any, *args: Any, out: Any = None, out_dtype: Any = None, **keywords: Any) -> Any:
        if out is None:
            out = cuda_arrays.empty(x.shape, x.dtype if out_dtype is None else out_dtype)
        return fusednorm.rms_norm(x, *args, out=out, out_dtype=out_dtype, **keywords)

    def _rms_norm_batch_invariant(self, input: Any, *args: Any, out: Any = None, **keywords: Any) -> Any:
        if out is None:
            out = cuda_arrays.empty(input.shape, input.dtype)
        return fusednorm.rms_norm_batch_invariant(input, *args, out=out, **keywords)

    def _fused_add_rmsnorm(
        self,
        x: Any,
        residual: Any,
        *args: Any,
        out: Any = None,
        residual_out: Any = None,
        out_dtype: Any = None,
        inplace: bool = True,
        **keywords: Any,
    ) -> Any:
        if not inplace and out is None:
            out = cuda_arrays.empty(x.shape, x.dtype if out_dtype is None else out_dtype)
        if not inplace and residual_out is None:
            residual_out = cuda_arrays.empty(residual.shape, residual.dtype)
        keywords |= {"out": out, "residual_out": residual_out, "out_dtype": out_dtype, "inplace": inplace}
        return fusednorm.fused_add_rmsnorm(x, residual, *args, **keywords)


def path_names() -> list[str]:
    info = fusednorm.info()
    forced = os.environ.get("FUSEDNORM_CPU")
    names = [info["cpu"]["path"]] if forced else ["reference", *info["cpu"]["available"]]
    if info["cuda"]["available"] and not forced:
        names.append("cuda")
    wanted = os.environ.get("FUSEDNORM_TEST_PATHS")
    if not wanted:
        return names
    chosen = [name.strip() for name in wanted.split(",")]
    if not set(chosen) <= set(names):
        raise pytest.UsageError(f"FUSEDNORM_TEST_PATHS={wanted}, but the paths here are {', '.join(names)}")
    return chosen


NORMS_OF = {"avx512_bf16": "avx512"}  # paths that differ from another in products alone


def make_path(name: str) -> CorePath:
    return {"reference": ReferencePath, "cuda": CudaPath}[name]() if name in ("reference", "cuda") else CorePath(name)


def opened(name: str) -> Iterator[CorePath]:
    chosen = make_path(name)
    chosen.open()
    helpers.current_path = name
    yield chosen
    helpers.current_path = "no path"
    chosen.close()


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """After the test's own parameters, so that a case runs over all paths before the next case is made."""
    cpu = {"reference", "cuda"}
    without = {"path": set(), "core_path": {"reference"}, "cpu_path": cpu, "mm_path": {"cuda"}}
    everywhere = path_names()
    if "mm" not in metafunc.module.__name__.split("_"):
        everywhere = [name for name in everywhere if NORMS_OF.get(name) not in everywhere]
    for fixture, names in without.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, [name for name in everywhere if name not in names], indirect=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs tens of GiB of device memory")
    config.addinivalue_line("markers", "sanitizer: a short tour of every kernel, to be run under compute-sanitizer")


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[CorePath]:
    yield from opened(request.param)


@pytest.fixture
def core_path(request: pytest.FixtureRequest) -> Iterator[CorePath]:
    """For what only the extension does: errors, aliasing, memory."""
    yield from opened(request.param)


@pytest.fixture
def mm_path(request: pytest.FixtureRequest) -> Iterator[CorePath]:
    """Products on the CPU. On CUDA, those of 16-bit operands have bits of their own: test_cuda_mm*.py."""
    yield from opened(request.param)


@pytest.fixture
def cpu_path(request: pytest.FixtureRequest) -> Iterator[CorePath]:
    """For what only the CPU has: ndarrays, frameworks' arrays in its memory, threads, the caller's rounding mode."""
    yield from opened(request.param)


@pytest.fixture
def cuda() -> Iterator[None]:
    """What is compared counts for CUDA, and no schedule or kernel stays forced."""
    with helpers.counting("cuda"):
        yield
    _core._force_cuda_schedule(None)
    _core._force_cuda_product(None)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads may be set: it comes back afterwards."""
    before = fusednorm.get_num_threads()
    yield
    fusednorm.set_num_threads(before)


@pytest.fixture(scope="session")
def seed() -> int:
    return helpers.SEED


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return helpers.seeded(request.node.nodeid)


def pytest_report_header(config: pytest.Config) -> list[str]:
    info = fusednorm.info()
    lines = [
        f"fusednorm {fusednorm.__version__}, {info['compiler']}; paths: {', '.join(path_names())}; "
        f"threads: {info['cpu']['num_threads']} ({info['cpu']['threading']}); NumPy {np.__version__}",
        f"FUSEDNORM_TEST_SEED={helpers.SEED}",
    ]
    if not helpers.HAVE_BFLOAT16:
        lines.append("bfloat16 is not tested: ml_dtypes is not installed")
    return lines


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"FUSEDNORM_TEST_SEED={helpers.SEED}"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker_output = getattr(session.config, "workeroutput", None)
    if worker_output is not None:  # under pytest-xdist each worker sends its count to the process that reports
        worker_output["compared"] = dict(helpers.compared)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    helpers.compared.update(node.workeroutput.get("compared", {}) if hasattr(node, "workeroutput") else {})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = dict(helpers.compared)
    if not counts:
        return
    terminalreporter.section("elements compared bit for bit")
    for name, count in counts.items():
        terminalreporter.line(f"{name:>12}: {count:>15,}")
    cuda = counts.pop("cuda", 0)
    total = sum(counts.values()) - counts.pop("reference", 0)
    if total:
        reached = "at least 10^8" if total >= 10**8 else "fewer than 10^8: not the full suite"
        terminalreporter.line(f"CPU paths together: {total:,} ({reached}; FUSEDNORM_TEST_SEED={helpers.SEED})")
    if cuda:
        reached = "at least 10^9" if cuda >= 10**9 else "fewer than 10^9: not the full suite"
        terminalreporter.line(f"CUDA: {cuda:,} ({reached}; FUSEDNORM_TEST_SEED={helpers.SEED})")
