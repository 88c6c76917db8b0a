"""The RMSNorms that the audit compares, and the registry that holds them.

A peer is a small class. To add one (a package's norm, a CUDA kernel, a product), write a subclass in a module that
imports its package inside `load` alone, put an instance in that module's list and the list in `registry`.
"""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

import numpy as np
import numpy.typing as npt

import fusednorm

from .operands import Operands

Array = npt.NDArray[Any]
BASE = "fusednorm:hf_llama"  # times are relative to it
EAGER = "torch:hf"  # "from HF eager" is counted against it


class Absent(Exception):
    """A peer can't run here; the text is the reason."""


def absent_package(package: str) -> str | None:
    """A reason if the package is not installed. Imports nothing."""
    try:
        found = util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: None stands for it in sys.modules
        found = False
    return None if found else f"{package} is not installed"


class Peer:
    """One RMSNorm, on the operations that it names."""

    name = ""  # what --peers matches
    label = ""  # what tables show
    package = ""
    device = "cpu"
    slow = False  # left out by --quick
    operations: tuple[str, ...] = ("rms_norm", "fused_add_rmsnorm")

    def available(self) -> str | None:
        """A reason why not, or None. Cheap: it may look for packages and programs, and import nothing."""
        return absent_package(self.package)

    def version(self) -> str:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return ""

    def load(self) -> None:
        """What must happen once before the first call; raises Absent with the reason if it can't."""

    def refuses(self, operands: Operands) -> str | None:
        """Why it can't be given these operands, or None."""
        return None

    def arrays(self, operands: Operands) -> dict[str, Any]:
        """The operands as this peer's own arrays; a slice of a leading dimension must be a view."""
        return dict(operands.arrays)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        raise NotImplementedError

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        """(norm of the sum, the sum), in new arrays."""
        raise NotImplementedError

    def to_numpy(self, array: Any, dtype: np.dtype[Any]) -> Array:
        return np.asarray(array)

    def synchronise(self) -> None:
        """Returns when the work of all calls is done."""

    def threads(self) -> int | None:
        """How many a call may use, where the package says so."""
        return None

    def set_threads(self, threads: int) -> None:
        """Called after `load`, where a number is asked for."""


class Ours(Peer):
    package = "fusednorm"

    def __init__(self, preset: str, round_sum: bool | str | None = None) -> None:
        """A preset as it is, or with another `round_sum`, which concerns the fused operation alone."""
        semantics = fusednorm.SEMANTICS[preset]
        self.norm, self.fused = dict(semantics.rms_norm), dict(semantics.fused_add_rmsnorm)
        self.name, self.label = f"fusednorm:{preset}", f"fusednorm {preset}"
        if round_sum is not None:
            self.fused["round_sum"] = round_sum
            change = {False: "fp32 sum", True: "rounded sum", "after_variance": "fp32 variance"}[round_sum]
            self.name, self.label = f"{self.name}+{change.replace(' ', '_')}", f"{self.label}, {change}"
            self.operations = ("fused_add_rmsnorm",)

    def available(self) -> str | None:
        return None

    def version(self) -> str:
        return fusednorm.__version__

    def refuses(self, operands: Operands) -> str | None:
        weight = operands.arrays["weight"].astype(np.float32)
        offset = np.float32(self.norm.get("weight_offset", 0.0))
        if ((weight - offset) + offset != weight).any():
            return f"a weight w does not survive (w - {offset:g}) + {offset:g} in fp32"
        return None

    def arrays(self, operands: Operands) -> dict[str, Any]:
        """With an offset the weight is given less the offset, in fp32: every peer computes the same function."""
        offset = np.float32(self.norm.get("weight_offset", 0.0))
        if not offset:
            return dict(operands.arrays)
        return {**operands.arrays, "weight": operands.arrays["weight"].astype(np.float32) - offset}

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return fusednorm.rms_norm(x, weight, eps, **self.norm)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        return fusednorm.fused_add_rmsnorm(x, residual, weight, eps, inplace=False, **self.fused)

    def threads(self) -> int | None:
        return fusednorm.get_num_threads()

    def set_threads(self, threads: int) -> None:
        fusednorm.set_num_threads(threads)


class PlainNumpy(Peer):
    """What one writes first: everything in fp32, one rounding at the end."""

    name = "numpy"
    label = "NumPy, all in fp32"
    package = "numpy"

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self._norm(x.astype(np.float32), weight, eps).astype(x.dtype)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        s = x.astype(np.float32) + residual.astype(np.float32)
        return self._norm(s, weight, eps).astype(x.dtype), s.astype(x.dtype)

    @staticmethod
    def _norm(s: Any, weight: Any, eps: float) -> Any:
        return s / np.sqrt(np.mean(s * s, axis=-1, keepdims=True) + np.float32(eps)) * weight.astype(np.float32)


def registry() -> list[Peer]:
    """Every norm that the audit knows, in the order of its tables."""
    from . import torch_peers

    ours: list[Peer] = []
    for preset in fusednorm.SEMANTICS:
        ours.append(Ours(preset))
        if preset == "hf_llama":
            ours.append(Ours(preset, round_sum=False))
        if preset == "sglang":
            ours.append(Ours(preset, round_sum="after_variance"))  # its own JIT kernel: Semantics.source
    return [*ours, PlainNumpy(), *torch_peers.PEERS]
