"""What surrounds a call: threads, the GIL, fork, the environment variables."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, PRELUDE, assert_same_bits, check_python, random_rows, random_weight, seeded

import fusednorm
from fusednorm import _reference

CPU = fusednorm.info()["cpu"]

# Threads


def test_number_of_threads(threads: None) -> None:
    for number in (1, 2, 3, 64):
        fusednorm.set_num_threads(number)
        assert fusednorm.get_num_threads() == number
        assert fusednorm.info()["cpu"]["num_threads"] == number
        with ThreadPoolExecutor(1) as pool:  # one number for the process, not one for each thread
            assert pool.submit(fusednorm.get_num_threads).result() == number
    for wrong, error in ((0, ValueError), (-1, ValueError), (2**40, (ValueError, OverflowError)), ("2", TypeError)):
        with pytest.raises(error, match=r"\bn\b"):
            fusednorm.set_num_threads(wrong)
    with pytest.raises(TypeError):
        fusednorm.set_num_threads(2.0)
    assert fusednorm.get_num_threads() == 64


@pytest.mark.skipif(CPU["threading"] != "openmp", reason="built without OpenMP")
@pytest.mark.parametrize("environment, number", [({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "3"}, 3)])
def test_omp_num_threads(environment: dict[str, str], number: int) -> None:
    code = PRELUDE + "assert same(); print(fusednorm.get_num_threads(), fusednorm.info()['cpu']['num_threads'])"
    assert check_python(code, **environment).split() == [str(number)] * 2
    assert int(check_python(code, OMP_NUM_THREADS=None).split()[0]) >= 1


@pytest.mark.skipif(CPU["threading"] != "openmp", reason="built without OpenMP")
@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}, {"OMP_THREAD_LIMIT": "1"}])
def test_fewer_threads_than_asked_for(environment: dict[str, str]) -> None:
    """The runtime may give a smaller team than the call asked for: no row and no part of a row may stay undone."""
    check_python(
        PRELUDE
        + """
for threads in (7, 3, 2, 1):
    fusednorm.set_num_threads(threads)
    assert same(), threads
    long = x.reshape(1, -1)
    assert fusednorm.rms_norm(long).tobytes() == _reference.rms_norm(long).tobytes(), threads
""",
        **environment,
    )


@pytest.mark.parametrize("fused", [False, True])
def test_callers_in_several_python_threads(core_path: Any, threads: None, fused: bool) -> None:
    fusednorm.set_num_threads(3)
    shapes = [(1, 8), (3, 100), (64, 768), (300, 1024), (2, 131072), (17, 4095), (1, 2**18), (1000, 64)]
    jobs = []
    for i, shape in enumerate(shapes):
        rng, dtype = seeded("several threads", shape, fused), DTYPES[i % len(DTYPES)]
        x, residual = random_rows(rng, shape, dtype), random_rows(rng, shape, "float32")
        weight = random_weight(rng, shape[-1], dtype)
        if fused:
            jobs.append(
                (map(core_path.array, (x, residual, weight)), _reference.fused_add_rmsnorm(x, residual, weight))
            )
        else:
            jobs.append((map(core_path.array, (x, weight)), (_reference.rms_norm(x, weight),)))
    jobs = [(tuple(arguments), expected) for arguments, expected in jobs]

    def work(number: int) -> list[Any]:
        results = []
        for i in range(3 * len(jobs)):
            arguments, _ = jobs[(number + i) % len(jobs)]
            if fused:
                results.append(core_path.fused_add_rmsnorm(*arguments, inplace=False))
            else:
                results.append((core_path.rms_norm(*arguments),))
        return results

    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(work, range(6)))
    for number, results in enumerate(done):
        for i, actual in enumerate(results):
            for a, e in zip(actual, jobs[(number + i) % len(jobs)][1]):
                assert_same_bits(core_path.numpy(a), e, f"thread {number}, call {i}")


def test_gil_is_released(cpu_path: Any, threads: None) -> None:
    """While one thread is in the middle half of a long call, another runs Python."""
    fusednorm.set_num_threads(1)
    row = np.ones((1, 4096), np.float16)
    out = np.empty((8192, 4096), np.float16)
    x = np.broadcast_to(row, out.shape)
    for _ in range(10):  # the other thread may not get a processor during one call; with the GIL held it never does
        begun, ticks, span = threading.Event(), [], []

        def call(begun: threading.Event = begun, span: list[float] = span) -> None:
            begun.set()
            span.append(time.perf_counter())
            cpu_path.rms_norm(x, out=out)
            span.append(time.perf_counter())

        worker = threading.Thread(target=call)
        worker.start()
        begun.wait()
        while worker.is_alive():
            ticks.append(time.perf_counter())
        begin, end = span
        if any(begin + (end - begin) / 4 < tick < begin + 3 * (end - begin) / 4 for tick in ticks):
            return
    pytest.fail(f"no Python ran during a call of {end - begin:.3f} s, ten times")


# fork

FORK = (
    PRELUDE
    + """
import multiprocessing, signal, threading, time
assert same()
def forked(function, seconds=60):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "deadlock"
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(
    "what",
    [
        "assert forked(same) == 0",
        "assert forked(lambda: (fusednorm.set_num_threads(4), same())[1]) == 0",
        "assert forked(lambda: forked(same) == 0 and same()) == 0",
        "assert forked(same) == 0 and same() and forked(same) == 0 and same()",
        "assert forked(lambda: fusednorm.rms_norm(x.reshape(1, -1)).tobytes() == "
        "_reference.rms_norm(x.reshape(1, -1)).tobytes()) == 0",
        "with multiprocessing.get_context('fork').Pool(2) as pool: "
        "assert pool.starmap_async(same, [()] * 4).get(60) == [True] * 4",
    ],
    ids=["child", "child sets threads", "grandchild", "parent goes on", "a shared row", "multiprocessing"],
)
def test_fork_after_threads(what: str) -> None:
    check_python(FORK + what, timeout=200, OMP_NUM_THREADS="4")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_another_thread_is_inside() -> None:
    check_python(
        FORK
        + """
stop = threading.Event()
def busy():
    while not stop.is_set():
        assert same()
workers = [threading.Thread(target=busy) for _ in range(2)]
[worker.start() for worker in workers]
codes = []
for _ in range(5):
    time.sleep(0.003)
    codes.append(forked(same, 30))
stop.set()
[worker.join() for worker in workers]
assert codes == [0] * 5, codes
""",
        timeout=250,
        OMP_NUM_THREADS="3",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_before_the_first_call() -> None:
    check_python(FORK.replace("assert same()", "", 1) + "assert forked(same) == 0 and same()", OMP_NUM_THREADS="4")


# FUSEDNORM_CPU

SHOW = PRELUDE + "assert same(); print(fusednorm.info()['cpu']['path'])"


@pytest.mark.parametrize("name", CPU["available"])
def test_forced_path(name: str) -> None:
    assert check_python(SHOW, FUSEDNORM_CPU=name).strip() == name


def test_automatic_path() -> None:
    best = [name for name in ("avx512_bf16", "avx512", "avx2", "neon", "scalar") if name in CPU["available"]][0]  # noqa: RUF015
    for environment in ({"FUSEDNORM_CPU": None}, {"FUSEDNORM_CPU": ""}):
        assert check_python(SHOW, **environment).strip() == best


WRONG_PATHS = {name: name for name in ("sse9", "AVX2", " scalar", "reference", "neon", "avx2")}
WRONG_PATHS |= {"long": "x" * 300, "long UTF-8": "x" + "é" * 99, "not UTF-8": "\udcff"}


@pytest.mark.parametrize("name", WRONG_PATHS.values(), ids=WRONG_PATHS.keys())
def test_wrong_path(name: str) -> None:
    """The import works; the first operation says what there is, and so does every later one."""
    if name in CPU["available"]:
        pytest.skip(f"{name} is available here")
    code = """
import numpy as np, fusednorm
x = np.ones((2, 8), np.float32)
for _ in range(2):
    for call in (lambda: fusednorm.rms_norm(x, out=x), lambda: fusednorm.fused_add_rmsnorm(x, x.copy())):
        try:
            call()
        except RuntimeError as error:
            print(ascii(str(error)))
        else:
            raise SystemExit("no error")
assert (x == 1).all()
"""
    lines = check_python(code, FUSEDNORM_CPU=name).splitlines()
    assert len(lines) == 4
    for line in lines:
        assert "FUSEDNORM_CPU" in line
        assert name[:19].isascii() <= (name[:19] in line)
        for available in CPU["available"]:
            assert available in line


def test_hook_forces_and_frees(cpu_path: Any) -> None:
    from fusednorm import _core

    assert fusednorm.info()["cpu"]["path"] == cpu_path.name
    with pytest.raises(RuntimeError, match=r"sse9.*available"):
        _core._force_cpu_path("sse9")
    assert fusednorm.info()["cpu"]["path"] == cpu_path.name
    assert set(CPU["available"]) <= set(CPU["built"])
