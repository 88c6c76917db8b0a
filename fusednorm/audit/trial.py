"""Kernels of other packages, called in a process of their own before the audit calls them.

A kernel that is given what it was not made for may end its process, or the CUDA context of all others in it. So each
such peer (`Peer.risky`) is called here once on everything that the audit has for it; what does not come back is
reported and not called again. The fp32 weight, which some packages read as if it were bfloat16, is tried nowhere else.

The child runs units one after the other and writes a line of JSON before and after each; when it ends in between, the
unit is the culprit, and a new child goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from . import peer_files
from .measure import OPERATIONS, Mixed, Operation, result_of, with_fp32_weight
from .operands import Operands, Shape, random_factors, shape_text, sources
from .peers import DEVICES, Absent, Peer, first_line, registry
from .products import PRODUCT, QUICK_ROWS, ROWS, call_product, product_dtypes

UNIT_SECONDS = 300  # a package may compile its kernels at the first call
DEATHS = 3  # a peer that ends its process so often is not tried further
LOAD, FP32_WEIGHT = "load", "fp32 weight"  # units that are no calls on an audit's operands


@dataclass(frozen=True)
class Unit:
    """`case` is LOAD, FP32_WEIGHT, what `--data` can name, or the shape of a product's weight."""

    name: str
    device: str
    case: str
    operation: str = ""
    dtype: str = ""

    @property
    def peer(self) -> tuple[str, str]:
        return self.name, self.device


@dataclass
class Job:
    """What a child is told."""

    peers: list[tuple[str, str]]  # name, device
    files: list[str]
    data: tuple[str, ...]
    operations: tuple[str, ...]
    dtypes: tuple[str, ...]
    rows: int
    columns: int
    seed: int
    skip: list[int] = field(default_factory=list)
    products: tuple[Shape, ...] = ()
    quick: bool = False


@dataclass
class Trials:
    """What became of each unit: None, or why the peer can't be called so."""

    outcomes: dict[Unit, str | None] = field(default_factory=dict)
    mixed: dict[Unit, Mixed] = field(default_factory=dict)

    def refused(self, peer: Peer, operation: str, data: str, dtype: str) -> str | None:
        return self.outcomes.get(Unit(peer.name, peer.device, data, operation, dtype))

    def absent(self, peer: Peer) -> str | None:
        return self.outcomes.get(Unit(peer.name, peer.device, LOAD))

    def fp32_weight(self, peer: Peer, operation: str) -> Mixed | None:
        return self.mixed.get(Unit(peer.name, peer.device, FP32_WEIGHT, operation, "bfloat16"))


def units(job: Job, peers: list[Peer]) -> list[Unit]:
    """In the same order in parent and child: a unit is its index."""
    made = []
    for peer in peers:
        operations = [name for name in job.operations if name in peer.operations and name in OPERATIONS]
        made.append(Unit(peer.name, peer.device, LOAD))
        for data in job.data:
            for operation in operations:
                made += [Unit(peer.name, peer.device, data, operation, dtype) for dtype in job.dtypes]
        if "bfloat16" in job.dtypes:
            made += [Unit(peer.name, peer.device, FP32_WEIGHT, operation, "bfloat16") for operation in operations]
        if PRODUCT in job.operations and PRODUCT in peer.operations:
            for shape in map(shape_text, job.products):
                made += [Unit(peer.name, peer.device, shape, PRODUCT, dtype) for dtype in product_dtypes(job.dtypes)]
    return made


# The child


def call_once(peer: Peer, operation: Operation, operands: Operands) -> None:
    """All rows, the batches' first and last size, and the call that is timed."""
    for rows in (operands.rows, 1, 1024):
        given = operands.repeated(rows)
        arrays = peer.arrays(given)
        result_of(peer, operation, given, arrays)
    peer.call_to_time(operation.name, {name: arrays[name] for name in operation.inputs}, operands.eps)()
    peer.synchronise()


def run_units(job: Job, told: TextIO) -> int:
    known = peer_files.joined(registry(DEVICES), tuple(map(Path, job.files)), DEVICES)
    by_name = {(peer.name, peer.device): peer for peer in known}
    every = units(job, [by_name[name, device] for name, device in job.peers])
    wanted = {unit.peer for i, unit in enumerate(every) if i not in job.skip}  # also to be loaded again
    make = sources(job.rows, job.columns, job.seed)
    shapes = {shape_text((n, k)): (n, k) for n, k in job.products}
    loaded: set[tuple[str, str]] = set()

    def say(**line: Any) -> None:
        told.write(json.dumps(line) + "\n")
        told.flush()

    for index, unit in enumerate(every):
        if unit.peer not in wanted or (unit.case != LOAD and (index in job.skip or unit.peer not in loaded)):
            continue
        peer, error, mixed = by_name[unit.peer], None, None
        say(begin=index)
        try:
            if unit.case == LOAD:
                peer.load()
                loaded.add(unit.peer)
            elif unit.case == FP32_WEIGHT:
                mixed = with_fp32_weight(peer, OPERATIONS[unit.operation], job.columns, job.seed)
            elif unit.operation == PRODUCT:
                factors = random_factors(unit.dtype, QUICK_ROWS if job.quick else ROWS, shapes[unit.case], job.seed)
                if peer.refuses(factors) is None:
                    call_product(peer, factors, job.quick)
            else:
                operands = make[unit.case](unit.dtype)
                if peer.refuses(operands) is None:
                    call_once(peer, OPERATIONS[unit.operation], operands)
        except Absent as reason:
            error = str(reason)
        except Exception as raised:
            error = f"{type(raised).__name__}: {first_line(raised)}"
        say(end=index, error=error, mixed=None if mixed is None else asdict(mixed))
        if (error or mixed) and unit.peer in loaded and not peer.healthy():
            return 1  # the context is gone: a new process goes on
    return 0


def main() -> int:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no dump of a process whose end is expected
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print does not belong to the lines
    return run_units(Job(**json.loads(sys.stdin.readline())), told)


# The parent


def describe_end(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def lines_of(child: subprocess.Popen[str], seconds: float) -> Iterator[dict[str, Any]]:
    """What the child writes; TimeoutError if it writes nothing for so long."""
    assert child.stdout is not None
    stream = child.stdout
    waiting: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            waiting.put(line)
        waiting.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = waiting.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if not line:
            return
        if line.endswith("\n"):  # else the child ended within it
            yield json.loads(line)


def start(job: Job, errors: BinaryIO) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; from fusednorm.audit import trial; sys.exit(trial.main())"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already, which is noticed where its lines are read
        child.stdin.write(json.dumps(asdict(job)) + "\n")
        child.stdin.close()
    return child


def run_trials(job: Job, peers: list[Peer], tick: Callable[[str], None], seconds: float = UNIT_SECONDS) -> Trials:
    """Tries all units of these peers, and ticks once for each peer."""
    trials, every = Trials(), units(job, peers)
    labels = {(peer.name, peer.device): peer.label for peer in peers}
    deaths: dict[tuple[str, str], int] = {}
    job.skip = []

    def settle(index: int, error: str | None) -> None:
        unit = every[index]
        if index not in job.skip:
            trials.outcomes[unit] = error
            job.skip.append(index)
        if error is None or (unit.case != LOAD and deaths.get(unit.peer, 0) < DEATHS):
            return
        for i, other in enumerate(every):  # what need not be tried any more
            if other.peer == unit.peer and i not in job.skip:
                trials.outcomes[other] = error
                job.skip.append(i)

    while len(job.skip) < len(every):
        before, running, late = len(job.skip), None, False
        with tempfile.TemporaryFile() as errors:
            child = start(job, errors)
            try:
                for line in lines_of(child, seconds):
                    if "begin" in line:
                        running = int(line["begin"])
                        if every[running].peer in labels:
                            tick(f"try {labels.pop(every[running].peer)} in a process of its own")
                        continue
                    index, running = int(line["end"]), None
                    if line["mixed"] is not None:
                        trials.mixed[every[index]] = Mixed(**line["mixed"])
                    settle(index, line["error"])
            except TimeoutError:
                late = True
            finally:
                if late or sys.exc_info()[0] is not None:
                    child.kill()
                code = child.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
        if running is not None:
            unit = every[running]
            deaths[unit.peer] = deaths.get(unit.peer, 0) + 1
            why = f"no result within {seconds:g} s" if late else f"ended the calling process ({describe_end(code)})"
            if unit.case == FP32_WEIGHT:
                trials.mixed[unit] = Mixed("refused", text=why)
            settle(running, why)
        elif len(job.skip) == before:  # it did not even begin
            why = f"can't be tried: the process for it ended ({describe_end(code)}): {(said or [''])[-1]}"
            for index in range(len(every)):
                settle(index, why)
    for label in labels.values():
        tick(f"try {label} in a process of its own")
    return trials
