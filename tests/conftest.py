"""The path under test, fresh random numbers, and the count of elements compared bit for bit.

`path` runs a test over the NumPy reference and every CPU path that this machine has; with FUSEDNORM_CPU set, over that
path alone. A path is what it does to arrays: another device is one more class here and one more name in `make_path`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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

    def open(self) -> None:
        _core._force_cpu_path(self.name)

    def close(self) -> None:
        _core._force_cpu_path(None)

    def array(self, array: Array) -> Any:
        """The ndarray on the path's device; memory is shared where the device is the CPU."""
        return array

    def numpy(self, array: Any) -> Array:
        assert isinstance(array, np.ndarray)
        return array

    def view(self, raw: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
        """A view into `raw`, an array of bytes on the path's device; strides and offset are in bytes."""
        return np.ndarray(shape, dtype, raw, offset, strides)


class ReferencePath(CorePath):
    """The NumPy twin, given outputs to write to."""

    def __init__(self) -> None:
        self.name = "reference"
        self.rms_norm = self._rms_norm
        self.fused_add_rmsnorm = self._fused_add_rmsnorm
        self.rms_norm_batch_invariant = self._rms_norm_batch_invariant

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


def path_names() -> list[str]:
    cpu = fusednorm.info()["cpu"]
    return [cpu["path"]] if os.environ.get("FUSEDNORM_CPU") else ["reference", *cpu["available"]]


def make_path(name: str) -> CorePath:
    return ReferencePath() if name == "reference" else CorePath(name)


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
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", path_names(), indirect=True)
    if "core_path" in metafunc.fixturenames:
        metafunc.parametrize("core_path", [name for name in path_names() if name != "reference"], indirect=True)


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Iterator[CorePath]:
    yield from opened(request.param)


@pytest.fixture
def core_path(request: pytest.FixtureRequest) -> Iterator[CorePath]:
    """For what only the extension does: errors, aliasing, threads."""
    yield from opened(request.param)


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
    total = sum(counts.values()) - counts.get("reference", 0)
    reached = "at least 10^8" if total >= 10**8 else "fewer than 10^8: not the full suite"
    terminalreporter.line(f"without the reference: {total:,} ({reached}; FUSEDNORM_TEST_SEED={helpers.SEED})")
