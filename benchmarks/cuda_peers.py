"""Who takes part on a GPU: each peer by its own package.

`--peer FILE` adds the list PEERS of a Python file; one with the name of a peer here takes its place. A method gives
a set of tensors, what queues the operation once: a `Call`, or any function without arguments. That returns the result,
or (out, x + residual) of the fused operation. It is called and timed on torch's current stream, in CUDA graphs too:

    from benchmarks.cases import EPS
    from benchmarks.cuda_peers import CudaPeer
    from benchmarks.timing import Call
    import mine

    class Mine(CudaPeer):
        name = "mine"

        def supports(self, case):                # True, or False, or the reason why not; case: cuda_cases.CudaCase
            return case.dtype == case.weight_dtype == "bfloat16"

        def rms_norm(self, case, tensors):       # tensors: x, weight, out, residual of cuda_cases.Tensors
            return Call(mine.norm, (tensors.x, tensors.weight, EPS, tensors.out))

        def fused_add_rmsnorm(self, case, tensors):
            t = tensors
            return lambda: (mine.fused(t.x, t.residual, t.weight, EPS), t.residual)

    PEERS = [Mine()]

Left out, an operation is not measured. `load` imports what the peer needs and may raise; `mode` gives a context manager
around its calls; `compiles_each_shape = True` keeps it to a few shapes, since each takes it a second.
"""

from __future__ import annotations

import contextlib
import importlib
import runpy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import fusednorm
from fusednorm.audit.peers import absent_package
from fusednorm.audit.torch_peers import hf_fused, hf_norm

from .cases import EPS
from .cuda_cases import CudaCase, Tensors
from .peers import BASE, TORCH
from .report import reason_of
from .timing import Call

CONSTANT = f"{BASE}, constant weights"
COMPILED = "torch.compile"


class CudaPeer:
    name = ""  # what tables show
    device = "cuda"
    package = ""  # that must be importable
    distribution = ""  # its name where it is installed from, if another one
    ours = False
    compiles_each_shape = False

    def load(self) -> None:
        """Imports; raises whatever it raises."""

    def absent(self) -> str | None:
        """Why it can't run here, or None."""
        reason = absent_package(self.package) if self.package else None
        if reason:
            return reason
        try:
            self.load()
        except (Exception, SystemExit) as error:  # an installation that is broken in whatever way
            return reason_of(error)
        return None

    def version(self) -> str:
        try:
            return metadata.version(self.distribution or self.package.replace("_", "-"))
        except (metadata.PackageNotFoundError, ValueError):
            return ""

    def mode(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def supports(self, case: CudaCase) -> bool | str:
        return True

    def prepare(self, case: CudaCase, tensors: Tensors) -> Callable[[], Any] | None:
        method = getattr(self, case.operation.name, None)
        return method(case, tensors) if method else None

    def refuses(self, case: CudaCase) -> str | None:
        """Why it takes no part in a case."""
        if not getattr(self, case.operation.name, None):
            return "has no such operation"
        if self.compiles_each_shape and not case.for_compilers:
            return "compiles for each shape: measured at a few"
        answer = self.supports(case)
        return None if answer is True else answer or "does not take it"


class Ours(CudaPeer):
    """Safe whatever the kernel before it writes."""

    name, ours = BASE, True

    def version(self) -> str:
        return str(fusednorm.__version__)

    def rms_norm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(fusednorm.rms_norm, (t.x, t.weight, EPS, t.out), ("out",))

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(fusednorm.fused_add_rmsnorm, (t.x, t.residual, t.weight, EPS))


class OursConstant(Ours):
    """With the promise that no kernel still at work writes a weight."""

    name = CONSTANT

    def load(self) -> None:
        self.promise = fusednorm.weights_are_constant

    def mode(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.promise()
        return context


class Functional(CudaPeer):
    name, package = TORCH, "torch"

    def rms_norm(self, case: CudaCase, t: Tensors) -> Call:
        import torch

        return Call(torch.nn.functional.rms_norm, (t.x, (case.columns,), t.weight, EPS))


class Compiled(CudaPeer):
    """The Hugging Face arithmetic, out of place."""

    name, package, compiles_each_shape = COMPILED, "torch", True

    def load(self) -> None:
        import torch

        for limit in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit"):
            if hasattr(torch._dynamo.config, limit):  # else it gives up after eight shapes
                setattr(torch._dynamo.config, limit, 4096)

        def norm(x: Any, weight: Any, eps: float) -> Any:
            return hf_norm(x, weight, eps).to(x.dtype)

        def fused(x: Any, residual: Any, weight: Any, eps: float) -> Any:
            out, total = hf_fused(x, residual, weight, eps)
            return out.to(x.dtype), total

        self.norm, self.fused = torch.compile(norm, dynamic=False), torch.compile(fused, dynamic=False)

    def rms_norm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(self.norm, (t.x, t.weight, EPS))

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(self.fused, (t.x, t.residual, t.weight, EPS))


def in_place(function: Callable[..., Any], t: Tensors, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """For a function that returns nothing: its result is in x and residual."""
    result = (t.x, t.residual)

    def call() -> Any:
        function(*arguments)
        return result

    return call


def into_out(function: Callable[..., Any], t: Tensors, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    out = t.out

    def call() -> Any:
        function(*arguments)
        return out

    return call


def one_dtype(case: CudaCase, *allowed: str) -> bool | str:
    if case.dtype != case.weight_dtype:
        return "x and weight of one dtype only"
    return case.dtype in allowed or f"{' or '.join(allowed)} only"


class FlashInfer(CudaPeer):
    """One package, two backends: a global of flashinfer.norm, read at each call, chooses."""

    package, distribution = "flashinfer", "flashinfer-python"

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.name = cuda, "FlashInfer CUDA" if cuda else "FlashInfer CuTe"

    def load(self) -> None:
        self.norm: Any = importlib.import_module("flashinfer.norm")
        needed = "get_norm_module" if self.cuda else "rmsnorm_cute"
        if not hasattr(self.norm, needed):
            # Without the CuTe DSL the package takes its CUDA kernels and says nothing.
            raise ImportError("FLASHINFER_USE_CUDA_NORM=1 is needed" if self.cuda else "nvidia-cutlass-dsl is missing")

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        before, self.norm._USE_CUDA_NORM = self.norm._USE_CUDA_NORM, self.cuda
        try:
            yield
        finally:
            self.norm._USE_CUDA_NORM = before

    def supports(self, case: CudaCase) -> bool | str:
        return one_dtype(case, "bfloat16", "float16")

    def rms_norm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(self.norm.rmsnorm, (t.x, t.weight, EPS, t.out))

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return in_place(self.norm.fused_add_rmsnorm, t, (t.x, t.residual, t.weight, EPS))


class Quack(CudaPeer):
    name, package, distribution = "QuACK", "quack", "quack-kernels"

    def load(self) -> None:
        self.forward = importlib.import_module("quack.rmsnorm").rmsnorm_fwd

    def supports(self, case: CudaCase) -> bool | str:
        return case.columns % 2 == 0 or "even row lengths only"

    def rms_norm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return lambda: self.forward(t.x, t.weight, eps=EPS)[0]

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return lambda: self.forward(t.x, t.weight, residual=t.residual, eps=EPS)[:2]


class Liger(CudaPeer):
    name, package = "Liger", "liger_kernel"

    def load(self) -> None:
        self.norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        self.fused = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction

    def supports(self, case: CudaCase) -> bool | str:
        return one_dtype(case, "bfloat16", "float16", "float32")

    def rms_norm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(self.norm.apply, (t.x, t.weight, EPS, 0.0, "llama", False))

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(self.fused.apply, (t.x, t.residual, t.weight, EPS, 0.0, "llama", False))


class Vllm(CudaPeer):
    name, package = "vLLM", "vllm"

    def load(self) -> None:
        self.ops = importlib.import_module("vllm._custom_ops")

    def supports(self, case: CudaCase) -> bool | str:
        return one_dtype(case, "bfloat16", "float16", "float32")

    def rms_norm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return into_out(self.ops.rms_norm, t, (t.out, t.x, t.weight, EPS))

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return in_place(self.ops.fused_add_rms_norm, t, (t.x, t.residual, t.weight, EPS))


class SglKernel(CudaPeer):
    name, package = "sgl-kernel", "sgl_kernel"

    def load(self) -> None:
        self.ops = importlib.import_module("sgl_kernel")

    def supports(self, case: CudaCase) -> bool | str:
        return one_dtype(case, "bfloat16", "float16")

    def rms_norm(self, case: CudaCase, t: Tensors) -> Call:
        return Call(self.ops.rmsnorm, (t.x, t.weight, EPS, t.out))

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return in_place(self.ops.fused_add_rmsnorm, t, (t.x, t.residual, t.weight, EPS))


class SglangJit(CudaPeer):
    """What SGLang compiles at run time, a row length at a time."""

    name, package = "SGLang JIT", "sglang"

    def load(self) -> None:
        self.ops = importlib.import_module("sglang.jit_kernel.norm")

    def supports(self, case: CudaCase) -> bool | str:
        h = case.columns
        if case.operation.name == "rms_norm":
            whole = h in (64, 128, 256) or (h % 256 == 0 and h <= 8192) or (h % 512 == 0 and h <= 16384)
        else:
            whole = h % 16 == 0 and h <= 8192
        return one_dtype(case, "bfloat16", "float16") if whole else "not with this row length"

    def rms_norm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return into_out(self.ops.rmsnorm, t, (t.x, t.weight, t.out, EPS))

    def fused_add_rmsnorm(self, case: CudaCase, t: Tensors) -> Callable[[], Any]:
        return in_place(self.ops.fused_add_rmsnorm, t, (t.x, t.residual, t.weight, EPS))


def registry(files: list[Path]) -> list[CudaPeer]:
    """Every peer, in the order of the tables. Those of files come last, or in place of one with their name."""
    peers: list[CudaPeer] = [
        Ours(),
        OursConstant(),
        SglangJit(),
        FlashInfer(cuda=False),
        FlashInfer(cuda=True),
        Quack(),
        Liger(),
        Vllm(),
        SglKernel(),
        Compiled(),
        Functional(),
    ]
    for file in files:
        added = runpy.run_path(str(file)).get("PEERS")
        if not added:
            raise SystemExit(f"{file}: it must have a list PEERS of benchmarks.cuda_peers.CudaPeer")
        for peer in added:
            if peer.device != "cuda":
                continue  # it is measured with --device cpu
            names = [known.name for known in peers]
            if peer.name in names:
                peers[names.index(peer.name)] = peer
            else:
                peers.append(peer)
    return peers
