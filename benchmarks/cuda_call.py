"""Host time of a call on CUDA tensors, 1 x 4096, beside the bare launch of an empty kernel; and of a first call."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusednorm

from .cases import EPS, OPERATIONS
from .cuda_cases import FEW, CudaCase, Tensors, weight_of
from .cuda_graphs import Gpu, quiet
from .cuda_peers import CudaPeer
from .peers import BASE
from .progress import Progress
from .report import Goal, Report, Table, figure, judge, reason_of
from .timing import Call, Contestant, race

ROWS, COLUMNS = 1, 4096
NEW_COLUMNS = (3328, 3840)  # that no other benchmark uses
SAMPLE_NS = 3e5  # fewer launches than the queue holds (1024), so that none waits for the device
ROUNDS, QUICK_ROUNDS = 200, 30
BARE, BARE_PLAIN = "bare launch, dependent (PDL)", "bare launch"
ALLOCATION = "torch.empty_like(x)"
OVER_LAUNCH_US = 0.3
SOURCE = Path(__file__).parent / "bare_launch.cu"


@dataclass
class HostCall:
    """`sample(n)` makes n calls and gives the nanoseconds; nothing in it waits for the device."""

    name: str
    group: str
    sample: Callable[[int], float]
    ours: bool = False
    allocates: bool = False


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = Path(home, "bin", "nvcc") if home else None
    if inside and inside.exists():
        return str(inside)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def bare_launch(gpu: Gpu, folder: str) -> Callable[[int, bool], float]:
    """RuntimeError with the reason if there is none."""
    compiler, library = nvcc(), Path(folder) / "libbare_launch.so"
    if not compiler:
        raise RuntimeError("no nvcc")
    command = [compiler, "-O2", f"-arch={gpu.architecture()}", "-shared", "-Xcompiler", "-fPIC"]
    done = subprocess.run([*command, "-o", str(library), str(SOURCE)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {(done.stderr or done.stdout).strip()[:200]}")
    function = ctypes.CDLL(str(library)).bare_launch
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_double))
    function.restype = ctypes.c_int

    def sample(calls: int, dependent: bool) -> float:
        nanoseconds = ctypes.c_double()
        status = function(gpu.stream(), calls, dependent, ctypes.byref(nanoseconds))
        if status:
            raise RuntimeError(f"CUDA error {status}")
        return nanoseconds.value

    sample(1, True)
    gpu.synchronize()
    return sample


@contextlib.contextmanager
def empty_operator(gpu: Gpu) -> Iterator[Any]:
    """An operator of torch.library that does nothing: what its dispatcher and a Python kernel cost."""
    import torch

    library = torch.library.Library("fusednorm_benchmarks", "DEF")
    try:
        library.define("nothing(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()")
        library.impl("nothing", lambda x, weight, eps, out: None, gpu.dispatch_key)
        yield torch.ops.fusednorm_benchmarks.nothing.default
    finally:
        library._destroy()


def calls(peers: Sequence[CudaPeer], gpu: Gpu, operator: Any, absent: dict[str, str]) -> list[HostCall]:
    import torch

    found: list[HostCall] = []
    case_of = {name: CudaCase(operation, FEW, ROWS, COLUMNS) for name, operation in OPERATIONS.items()}
    tensors = {name: Tensors(case, weight_of(case, gpu.device), gpu.device) for name, case in case_of.items()}
    t, fused = tensors["rms_norm"], tensors["fused_add_rmsnorm"]

    def add(
        name: str,
        group: str,
        call: Callable[[], Any],
        mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        **flags: bool,
    ) -> None:
        looped = call if isinstance(call, Call) else Call(call, ())

        def sample(number: int) -> float:
            gpu.synchronize()  # an empty queue
            with mode():
                return looped.nanoseconds(number)

        try:
            sample(1)
            gpu.synchronize()
        except Exception as error:
            absent[f"{name} ({group})"] = reason_of(error)
        else:
            found.append(HostCall(name, group, sample, **flags))

    add(ALLOCATION, "torch", Call(torch.empty_like, (t.x,)))
    add("out.copy_(x)", "torch", Call(t.out.copy_, (t.x,)))
    add("an empty torch.library operator", "torch", Call(operator, (t.x, t.weight, EPS, t.out)))
    for peer in peers:
        for name, case in case_of.items():
            reason = peer.refuses(case)
            call = None if reason else peer.prepare(case, tensors[name])
            if call:
                add(peer.name, name, call, peer.mode, ours=peer.ours)
        if peer.name == BASE:
            new = Call(fusednorm.rms_norm, (t.x, t.weight, EPS))
            add(f"{BASE}, a new result", "rms_norm", new, ours=True, allocates=True)
            new = Call(fusednorm.fused_add_rmsnorm, (fused.x, fused.residual, fused.weight, EPS, False), ("inplace",))
            add(f"{BASE}, new results", "fused_add_rmsnorm", new, ours=True, allocates=True)
    return found


def first_calls(peers: Sequence[CudaPeer], gpu: Gpu, absent: dict[str, str]) -> list[dict[str, Any]]:
    """Milliseconds of the first call at a row length, with the wait for its result."""
    records = []
    for peer in peers:
        milliseconds = []
        for columns in NEW_COLUMNS:
            case = CudaCase(OPERATIONS["rms_norm"], FEW, ROWS, columns)
            if not getattr(peer, "rms_norm", None) or peer.supports(case) is not True:
                continue
            tensors = Tensors(case, weight_of(case, gpu.device), gpu.device)
            gpu.synchronize()
            try:
                with peer.mode():
                    started = time.perf_counter()
                    call = peer.prepare(case, tensors)
                    if call:
                        call()
                    gpu.synchronize()
                    milliseconds.append((time.perf_counter() - started) * 1e3)
            except Exception as error:
                absent[f"{peer.name} (first call)"] = reason_of(error)
        if milliseconds:
            records.append({"contestant": peer.name, "ours": peer.ours, "first_call_ms": milliseconds})
    return records


def run(peers: Sequence[CudaPeer], quick: bool, gpu: Gpu, head: dict[str, str], progress: Progress) -> Report:
    method = (
        f"{ROWS} x {COLUMNS}, bfloat16, no_grad; a C loop of calls on an empty queue, never waiting for the device "
        "within a sample; calls in turns, medians and least over turns"
    )
    report = Report("cuda_call", {**head, "method": method})
    absent: dict[str, str] = {}
    with quiet(), tempfile.TemporaryDirectory() as folder, empty_operator(gpu) as operator:
        progress(0, 3, "host time: preparing")
        found = []
        try:
            bare = bare_launch(gpu, folder)
        except (RuntimeError, OSError) as error:
            absent[BARE] = str(error)
        else:
            for name, dependent in ((BARE, True), (BARE_PLAIN, False)):
                found.append(HostCall(name, "no Python", _drained(gpu, bare, dependent)))
        found += calls(peers, gpu, operator, absent)
        progress(1, 3, "host time: calls")
        contestants = [Contestant(f"{call.group} {call.name}", call.sample) for call in found]
        race(contestants, QUICK_ROUNDS if quick else ROUNDS, SAMPLE_NS)
        progress(2, 3, "host time: first calls")
        first = first_calls(peers, gpu, absent)
    progress(3, 3, "")
    report.records = [record(call, contestant, contestants[0]) for call, contestant in zip(found, contestants)]
    has_bare = bool(found) and found[0].name == BARE
    if not has_bare:
        for r in report.records:
            r["over_launch_us"] = r["over_launch_best_us"] = float("nan")
    if absent:
        report.head["not run"] = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
    report.notes = [
        "Microseconds a call. over launch: what it takes longer than the bare launch, the difference within a turn.",
        f"{BARE}: cudaLaunchKernelExC of an empty kernel with 128 bytes of arguments, in C.",
        "A contestant whose call is a Python function is timed with it.",
    ]
    report.tables, report.goals = tables(report.records, first), goals(report.records)
    report.records += first
    return report


def _drained(gpu: Gpu, bare: Callable[[int, bool], float], dependent: bool) -> Callable[[int], float]:
    def sample(number: int) -> float:
        gpu.synchronize()
        return bare(number, dependent)

    return sample


def record(call: HostCall, contestant: Contestant, launch: Contestant) -> dict[str, Any]:
    over = statistics.median(a - b for a, b in zip(contestant.times, launch.times))
    return {
        "contestant": call.name,
        "group": call.group,
        "ours": call.ours,
        "allocates": call.allocates,
        "median_us": contestant.median / 1e3,
        "best_us": contestant.best / 1e3,
        "over_launch_us": over / 1e3,
        "over_launch_best_us": (contestant.best - launch.best) / 1e3,
    }


def tables(records: list[dict[str, Any]], first: list[dict[str, Any]]) -> list[Table]:
    columns = ["", "call", "median us", "least us", "over launch", "over launch, least"]
    host = Table(f"{ROWS} x {COLUMNS}", columns, text_columns=2)
    keys = ("median_us", "best_us", "over_launch_us", "over_launch_best_us")
    for r in records:
        host.rows.append([r["group"], r["contestant"], *[figure(r[key], 2) for key in keys]])
    table = Table("First rms_norm at a new row length", ["", *[f"ms, H {columns}" for columns in NEW_COLUMNS]])
    for r in first:
        cells = [figure(value, 2) for value in r["first_call_ms"]]
        table.rows.append([r["contestant"], *cells, *["-"] * (len(NEW_COLUMNS) - len(cells))])
    return [host, table] if first else [host]


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    """On the medians."""
    allocation = next((r["median_us"] for r in records if r["contestant"] == ALLOCATION), float("nan"))

    def over(allocates: bool) -> dict[str, float]:
        ours = [r for r in records if r["ours"] and r["allocates"] is allocates]
        return {f"{r['group']}, {r['contestant']}": r["over_launch_us"] for r in ours}

    with_allocation = {name: value for name, value in over(True).items() if name.startswith("rms_norm")}
    return [
        judge(f"<= {OVER_LAUNCH_US} us over the bare launch, out= or in place", over(False), OVER_LAUNCH_US, False),
        judge(
            f"<= {OVER_LAUNCH_US} us and one {ALLOCATION} ({allocation:.2f} us) over it, with a new result",
            with_allocation,
            OVER_LAUNCH_US + allocation,
            False,
        ),
    ]
