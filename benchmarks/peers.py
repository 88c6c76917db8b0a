"""Who takes part. A peer turns a case into a call; the benchmarks do the rest.

`--peer FILE` adds the list PEERS of a Python file, for example:

    from benchmarks.peers import TorchPeer
    from benchmarks.timing import Call

    class Mine(TorchPeer):
        name = "mine"

        def rms_norm(self, case, operands):
            t = operands.tensors
            return Call(my_norm, (t["x"], t["weight"], EPS))

    PEERS = [Mine()]
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import fusednorm
from fusednorm.audit.peers import PlainNumpy, absent_package
from fusednorm.audit.torch_peers import hf_fused, hf_norm

from .cases import EPS, Case, Operands
from .native import native
from .timing import Call, Contestant

BASE = "fusednorm"
MEMCPY = "memcpy"
STREAMING = "streaming copy"
TORCH = "F.rms_norm"
COPY_ALONE = 512 << 10


class Peer:
    """A method per operation, named as the operation; None where it does not take the case."""

    name = ""  # what tables show
    device = "cpu"

    def absent(self) -> str | None:
        """Why it can't run here, or None."""
        return None

    def set_threads(self, threads: int) -> None:
        """Called before the cases of a number of threads."""

    def prepare(self, case: Case, operands: Operands) -> Call | None:
        method: Callable[[Case, Operands], Call | None] | None = getattr(self, case.operation.name, None)
        return method(case, operands) if method else None

    def contestant(self, case: Case, operands: Operands) -> Contestant | None:
        """To override where a clock other than the host's must be read."""
        call = self.prepare(case, operands)
        return Contestant(self.name, call.nanoseconds) if call else None


class Copy(Peer):
    """The roofline: a copy of as many bytes as the case must move, of the same memory, by as many threads.

    Below COPY_ALONE a second thread only slows it down, so that it has one: a roofline is the fastest copy there is.
    """

    def __init__(self, name: str, streaming: bool) -> None:
        self.name, self.streaming = name, streaming

    def absent(self) -> str | None:
        if self.streaming and not native().features()["streaming"]:
            return "only written for x86-64"
        return None

    def call(self, case: Case, operands: Operands, other: str, both_ways: bool) -> Call | None:
        bytes_copied = case.moved_bytes // case.operation.passes
        threads = case.threads if bytes_copied >= COPY_ALONE else 1
        if threads > 1 and not native().features()["threads"]:
            return None
        addresses = (operands[other].ctypes.data, operands["x"].ctypes.data)
        return Call(native().copy, (*addresses, bytes_copied, threads, int(self.streaming), int(both_ways)))

    def rms_norm(self, case: Case, operands: Operands) -> Call | None:
        return self.call(case, operands, "out", both_ways=False)

    def fused_add_rmsnorm(self, case: Case, operands: Operands) -> Call | None:
        return self.call(case, operands, "residual", both_ways=True)


class Ours(Peer):
    """On ndarrays, into memory that is there."""

    name = BASE

    def set_threads(self, threads: int) -> None:
        fusednorm.set_num_threads(threads)

    def rms_norm(self, case: Case, operands: Operands) -> Call:
        a = operands.arrays
        return Call(fusednorm.rms_norm, (a["x"], a["weight"], EPS, a["out"]), ("out",))

    def fused_add_rmsnorm(self, case: Case, operands: Operands) -> Call:
        a = operands.arrays
        return Call(fusednorm.fused_add_rmsnorm, (a["x"], a["residual"], a["weight"], EPS))


class NumPy(Peer):
    name = "NumPy"

    def rms_norm(self, case: Case, operands: Operands) -> Call:
        return Call(PlainNumpy().rms_norm, (operands["x"], operands["weight"], EPS))

    def fused_add_rmsnorm(self, case: Case, operands: Operands) -> Call:
        return Call(PlainNumpy().fused_add_rmsnorm, (operands["x"], operands["residual"], operands["weight"], EPS))


class TorchPeer(Peer):
    def absent(self) -> str | None:
        return absent_package("torch")

    def set_threads(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)


class OursOnTensors(TorchPeer):
    name = f"{BASE}, tensors"

    def rms_norm(self, case: Case, operands: Operands) -> Call:
        t = operands.tensors
        return Call(fusednorm.rms_norm, (t["x"], t["weight"], EPS, t["out"]), ("out",))

    def fused_add_rmsnorm(self, case: Case, operands: Operands) -> Call:
        t = operands.tensors
        return Call(fusednorm.fused_add_rmsnorm, (t["x"], t["residual"], t["weight"], EPS))


class OursAllocating(TorchPeer):
    """Without out=, as F.rms_norm has it."""

    name = f"{BASE}, new tensors"

    def rms_norm(self, case: Case, operands: Operands) -> Call:
        t = operands.tensors
        return Call(fusednorm.rms_norm, (t["x"], t["weight"], EPS))

    def fused_add_rmsnorm(self, case: Case, operands: Operands) -> Call:
        t = operands.tensors
        arguments = (t["x"], t["residual"], t["weight"], EPS, t["residual"], False)
        return Call(fusednorm.fused_add_rmsnorm, arguments, ("residual_out", "inplace"))


class Functional(TorchPeer):
    """F.rms_norm; the fused operation adds into residual first, so that only the result is new."""

    name = TORCH

    def rms_norm(self, case: Case, operands: Operands) -> Call:
        import torch

        t = operands.tensors
        return Call(torch.nn.functional.rms_norm, (t["x"], (case.columns,), t["weight"], EPS))

    def fused_add_rmsnorm(self, case: Case, operands: Operands) -> Call:
        import torch

        t = operands.tensors
        norm, shape = torch.nn.functional.rms_norm, (case.columns,)

        def add_then_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return norm(residual.add_(x), shape, weight, EPS)

        return Call(add_then_norm, (t["x"], t["residual"], t["weight"]))


class Eager(TorchPeer):
    name = "HF eager"

    def rms_norm(self, case: Case, operands: Operands) -> Call:
        t = operands.tensors
        return Call(hf_norm, (t["x"], t["weight"], EPS))

    def fused_add_rmsnorm(self, case: Case, operands: Operands) -> Call:
        t = operands.tensors
        return Call(hf_fused, (t["x"], t["residual"], t["weight"], EPS))


def registry(files: list[Path]) -> list[Peer]:
    """Every peer, in the order of the tables."""
    peers: list[Peer] = [
        Copy(MEMCPY, streaming=False),
        Copy(STREAMING, streaming=True),
        Ours(),
        OursOnTensors(),
        OursAllocating(),
        Functional(),
        Eager(),
        NumPy(),
    ]
    for file in files:
        added = runpy.run_path(str(file)).get("PEERS")
        if not added:
            raise SystemExit(f"{file}: it must have a list PEERS of benchmarks.peers.Peer")
        peers += [peer for peer in added if peer.device == "cpu"]
    names = [peer.name for peer in peers]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SystemExit(f"several peers have the name {', '.join(repeated)}")
    return peers
