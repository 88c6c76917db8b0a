"""The price of the contract's order of additions on a GPU: the same kernels beside others that add in a free order."""

from __future__ import annotations

import ctypes
import runpy
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cases import EPS, OPERATIONS
from .cuda_call import nvcc
from .cuda_cases import FEW, LARGE, MIDDLE, CudaCase, Tensors
from .cuda_check import Expected
from .cuda_entries import COPY, Budget, enter, race, share
from .cuda_graphs import Gpu, quiet
from .cuda_peers import CudaPeer, Ours
from .cuda_time import each, geometric_mean, title
from .peers import BASE
from .progress import Progress
from .report import Goal, Report, Table, figure, judge

SHAPES = (
    *((1, 2048), (1, 4096), (1, 8192), (8, 7168), (32, 4096), (128, 4096), (128, 7168), (512, 7168)),
    *((2048, 4096), (16384, 4096), (8192, 8192), (1048576, 128)),
)
QUICK_SHAPES = ((1, 4096), (8, 7168), (128, 7168), (16384, 4096))
ROUNDS, QUICK_ROUNDS = 31, 11
SECONDS = 60.0  # after which no case is begun
MOST = {"every shape": 1.03, "geometric mean": 1.01}
CONTRACT, FREE = "contract's order", "free order"
ROOT = Path(__file__).parent.parent
PRICE = Path(__file__).parent / "price.cu"


class Kernels(CudaPeer):
    """price.cu, compiled."""

    ours = True

    def __init__(self, name: str, library: Path, gpu: Gpu) -> None:
        self.name, self.gpu = name, gpu
        self.queue = ctypes.CDLL(str(library)).price_norm
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.queue.argtypes = (*[pointer] * 4, number, number, ctypes.c_float, ctypes.c_int, pointer)
        self.queue.restype = ctypes.c_char_p

    def prepare(self, case: CudaCase, tensors: Tensors) -> Callable[[], Any]:
        t = tensors
        pointers = [None if a is None else a.data_ptr() for a in (t.x, t.residual, t.weight, t.out)]
        arguments = (*pointers, case.rows, case.columns, EPS, t.x.device.index or 0)
        result = t.out if t.residual is None else (t.out, t.residual)

        def call() -> Any:
            refused = self.queue(*arguments, self.gpu.stream())
            if refused:
                raise RuntimeError(refused.decode())
            return result

        return call

    def refuses(self, case: CudaCase) -> str | None:
        return None


def build(gpu: Gpu, folder: str) -> list[CudaPeer]:
    """With the flags of the library. RuntimeError with the reason if that fails."""
    compiler = nvcc()
    if not compiler:
        raise RuntimeError("no nvcc")
    flags = runpy.run_path(str(ROOT / "tools" / "build_cuda.py"))["FLAGS"]
    command = [compiler, *flags, f"-arch={gpu.architecture()}", "-DFN_CUDA_ARCHITECTURES=0", "-shared"]
    host = [ROOT / "csrc" / "cuda" / name for name in ("rms_norm.c", "schedule.c", "runtime.c")]
    sources = [PRICE, *host, ROOT / "csrc" / "status.c"]
    running: list[tuple[str, Path, subprocess.Popen[bytes]]] = []
    for name, define in ((CONTRACT, []), (FREE, ["-DFREE_ORDER"])):
        library = Path(folder) / f"libprice{len(running)}.so"
        words = [*command, *define, "-o", str(library), *map(str, sources)]
        pipe = subprocess.PIPE
        running.append((name, library, subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT)))
    said = [process.communicate()[0].decode(errors="replace").strip() for _, _, process in running]
    for (name, _, process), text in zip(running, said):
        if process.returncode:
            raise RuntimeError(f"nvcc, {name}: {text[:300]}")
    return [Kernels(name, library, gpu) for name, library, _ in running]


def cases(quick: bool) -> list[CudaCase]:
    found = []
    for operation in OPERATIONS.values():
        for rows, columns in QUICK_SHAPES if quick else SHAPES:
            regime = FEW if rows <= 128 else MIDDLE if rows <= 2048 else LARGE
            found.append(CudaCase(operation, regime, rows, columns))
    return found


def bits(call: Callable[[], Any], truth: Expected, tensors: Tensors) -> Any:
    """What it writes to out, for inputs that are the same each time."""
    import torch

    truth.restore(tensors)
    call()
    return tensors.out.view(torch.int16).clone()


def measure(case: CudaCase, peers: Sequence[CudaPeer], gpu: Gpu, budget: Budget, rounds: int) -> dict[str, Any]:
    found = enter(case, peers, gpu, budget)
    by_name = {entry.name: entry for entry in found.entries}
    missing = [f"{name}: {found.absent.get(name)}" for name in (BASE, CONTRACT, FREE) if name not in by_name]
    if missing:
        raise RuntimeError("; ".join(missing))
    out = {name: bits(by_name[name].calls[0], found.truth, found.sets[0]) for name in (BASE, CONTRACT, FREE)}
    moved = float((out[CONTRACT] != out[FREE]).double().mean())
    same = bool((out[CONTRACT] == out[BASE]).all())
    del out
    found.truth.restore(found.sets[0])
    times = race(found, [(entry, entry.chain(found.count)) for entry in found.entries], gpu, rounds)
    return {
        "operation": case.operation.name,
        "dtypes": case.dtypes,
        "rows": case.rows,
        "columns": case.columns,
        "calls": found.count,
        "median_us": {name: times[name].median for name in (COPY, BASE, CONTRACT, FREE)},
        "price": share(times[CONTRACT], times[FREE]),
        "control": share(times[CONTRACT], times[BASE]),
        "changed": moved,
        "same_as_library": same,
        "wrong": [entry.name for entry in found.entries if found.wrong(entry)],
    }


def run(quick: bool, gpu: Gpu, head: dict[str, str], progress: Progress) -> Report:
    method = (
        "bfloat16; as in cuda_time: chains of calls in CUDA graphs, replayed in turns; both kinds of kernel are "
        "compiled when it runs, with one launcher; ratios are taken within a turn, shown are their medians"
    )
    report = Report("cuda_price", {**head, "method": method})
    wanted, budget = cases(quick), Budget(SECONDS)
    progress(0, len(wanted), "nvcc: the kernels with both orders")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            peers = [*build(gpu, folder), Ours()]
        except (RuntimeError, OSError) as error:
            report.head["not run"] = str(error).replace("\n", " ")
            wanted = []
        rounds = QUICK_ROUNDS if quick else ROUNDS
        stopped = each(
            wanted, lambda case: report.records.append(measure(case, peers, gpu, budget, rounds)), budget, progress
        )
    if stopped:
        report.head["stopped"] = stopped
    report.head["took"] = f"{budget.elapsed():.0f} s"
    report.notes = [
        f"Microseconds a call. price: the time with the {CONTRACT} over that with the {FREE}.",
        f"control: the time with the {CONTRACT} over that of {BASE}'s own call, the same kernel once more: noise.",
        "changed: the share of out's elements to which the free order gives other bits.",
        "The free order: a warp by shuffles, one sum a warp through shared memory, one sum a block within a cluster. A",
        "thread adds its own squares alike in both, and a row that one warp holds is folded by shuffles in both.",
    ]
    report.tables, report.goals = tables(report.records), goals(report.records)
    return report


def tables(records: list[dict[str, Any]]) -> list[Table]:
    found = []
    for operation in OPERATIONS.values():
        columns = ["rows", "H", CONTRACT, FREE, "price", "control", "changed", COPY]
        table = Table(f"{operation.title}; bfloat16", columns, text_columns=0)
        of = [r for r in records if r["operation"] == operation.name]
        for r in of:
            contract, free, copy = (figure(r["median_us"][name], 3) for name in (CONTRACT, FREE, COPY))
            ratios = [figure(r[key], 3) for key in ("price", "control")]
            table.rows.append([str(r["rows"]), str(r["columns"]), contract, free, *ratios, f"{r['changed']:.1e}", copy])
        if of:
            means = [mean_of(of, key) for key in ("price", "control")]
            table.rows.append(["mean", "", "", "", *[figure(value, 3) for value in means], "", ""])
            found.append(table)
    return found


def mean_of(records: list[dict[str, Any]], key: str) -> float:
    return next(iter(geometric_mean({title(r): r[key] for r in records}).values()), float("nan"))


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    prices = {title(r): r["price"] for r in records}
    each_shape, mean = MOST["every shape"], MOST["geometric mean"]
    failing = [f"{title(r)}: other bits than {BASE}'s" for r in records if not r["same_as_library"]]
    failing += [f"{title(r)}: {', '.join(r['wrong'])}: not the norm" for r in records if r["wrong"]]
    return [
        judge(f"price, geometric mean: <= {mean}", geometric_mean(prices), mean, at_least=False, digits=4),
        judge(f"price, every shape: <= {each_shape}", prices, each_shape, at_least=False, digits=3),
        Goal(f"the {CONTRACT} gives {BASE}'s bits, and all the norm", not failing if records else None, failing[:4]),
    ]
