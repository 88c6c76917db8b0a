"""Device time, by CUDA graphs. What needs a GPU is behind the methods of `Gpu`."""

from __future__ import annotations

import contextlib
import gc
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

CALLS = 400  # of a short kernel in one graph
GRAPH_US = 600.0  # of a longer one
FEWEST_CALLS = 8
BYTES_A_US = 3e6  # a guess, to choose the number of calls
SHORTEST_US = 1.2
PIECE_BYTES = 256 << 20  # one memcpy node of 512 MiB is slower than two of half as much
WARM_S, FIRST_WARM_S = 0.05, 2.0  # an idle GPU runs at lower clocks


@dataclass(frozen=True)
class Chain:
    """`count` calls, one after the other, the sets of tensors in turn; `between` is queued after each call."""

    name: str
    calls: Sequence[Callable[[], Any]]
    count: int
    mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    between: Callable[[], Any] | None = None

    def queue(self) -> None:
        # The last results live on: the next call of a contestant that allocates must not get memory that is in L2.
        results: deque[Any] = deque(maxlen=len(self.calls))
        for number in range(self.count):
            results.append(self.calls[number % len(self.calls)]())
            if self.between:
                self.between()


@dataclass
class Timed:
    """Microseconds a call, one for each turn."""

    name: str
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def count_of_calls(moved_bytes: int, sets: int) -> int:
    """A multiple of the number of sets, so that every replay does the same."""
    guess = max(SHORTEST_US, moved_bytes / BYTES_A_US)
    wanted = min(CALLS, max(FEWEST_CALLS, round(GRAPH_US / guess)))
    return max(1, round(wanted / sets)) * sets


def copy_calls(source: Any, target: Any) -> Callable[[], Any]:
    """cudaMemcpyAsync from one tensor to the other, in pieces."""
    elements = PIECE_BYTES // source.element_size()
    pieces = list(zip(target.view(-1).split(elements), source.view(-1).split(elements)))

    def copy() -> Any:
        for to, what in pieces:
            to.copy_(what)
        return target

    return copy


class Gpu:
    """The current CUDA device."""

    device = "cuda"
    dispatch_key = "CUDA"  # of operators of torch

    def __init__(self) -> None:
        self.warm = False

    def absent(self) -> str | None:
        try:
            import torch
        except ImportError:
            return "torch is not installed"
        return None if torch.cuda.is_available() else "torch finds no CUDA device"

    def l2_bytes(self) -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def describe(self) -> dict[str, str]:
        import torch

        p = torch.cuda.get_device_properties(0)
        memory = f"{p.total_memory / (1 << 30):.0f} GiB, L2 {p.L2_cache_size / (1 << 20):.0f} MiB"
        what = f"{p.name}, {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, {memory}"
        asked = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
        query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
            state = ", ".join(f"{name} {value.strip()}" for name, value in zip(asked, answer.split(",")))
        except (OSError, subprocess.SubprocessError):
            state = "no nvidia-smi"
        return {"gpu": what, "cuda": f"torch's CUDA {torch.version.cuda}, {state} (before the run)"}

    def architecture(self) -> str:
        """As nvcc calls it."""
        import torch

        return "sm_{}{}".format(*torch.cuda.get_device_capability())

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def stream(self) -> int:
        """The handle of the stream that calls go to."""
        import torch

        return int(torch.cuda.current_stream().cuda_stream)

    def capture(self, chain: Chain) -> Any:
        import torch

        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of another library may do as they like meanwhile.
        with chain.mode(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            chain.queue()
        return graph

    def replay(self, graph: Any) -> None:
        graph.replay()

    def race(self, chains: Sequence[tuple[Chain, Any]], rounds: int) -> dict[str, Timed]:
        """Times captured chains in turns, each turn beginning with another one.

        A sample is two replays; the one before them is not timed: while it runs, the host queues the others.
        """
        import torch

        until = time.perf_counter() + (WARM_S if self.warm else FIRST_WARM_S)
        while True:
            for _, graph in chains:
                graph.replay()
            torch.cuda.synchronize()
            if time.perf_counter() >= until:
                break
        self.warm = True
        results = {chain.name: Timed(chain.name) for chain, _ in chains}
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for turn in range(rounds):
            start = turn % len(chains)
            for chain, graph in [*chains[start:], *chains[:start]]:
                graph.replay()
                begin.record()
                graph.replay()
                graph.replay()
                end.record()
                end.synchronize()
                results[chain.name].times.append(begin.elapsed_time(end) * 1e3 / (2 * chain.count))
        return results


@contextlib.contextmanager
def quiet() -> Any:
    """No gradients, no garbage collection: torch's capture may collect garbage, which takes long in a large process."""
    import torch

    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
