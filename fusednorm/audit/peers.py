"""The RMSNorms and products that the audit compares, and the registry that holds them.

A peer is a small class. To add one (a package's norm, a CUDA kernel, a product), write a subclass in a module that
imports its package inside `load` alone, put an instance in that module's list and the list in `registry`; or leave the
package as it is and name the module in `--peer FILE`: its list PEERS then joins the registry (peer_files.py).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from importlib import metadata, util
from typing import Any

import numpy as np
import numpy.typing as npt

import fusednorm

from .operands import Operands

Array = npt.NDArray[Any]
# What is rounded to the dtype before the result: "s" (x + residual), "s after variance" (the variance is taken from the
# fp32 sum), "y" (s / rms, before the weight).
Points = tuple[str, ...]
BASE = "fusednorm:hf_llama"  # times are relative to it
EAGER = "torch:hf"  # "from HF eager" is counted against it
DEVICES = ("cpu", "cuda")


class Absent(Exception):
    """A peer can't run here; the text is the reason."""


def absent_package(package: str) -> str | None:
    """A reason if the package is not installed. Imports nothing."""
    try:
        found = util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: None stands for it in sys.modules
        found = False
    return None if found else f"{package} is not installed"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def cuda_reason() -> str | None:
    """Why no CUDA device can be used here, or None. Asks the driver; imports nothing."""
    if fusednorm.info()["cuda"]["available"]:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver (libcuda.so.1) was found"
    count = ctypes.c_int(0)
    for name, arguments in (("cuInit", (0,)), ("cuDeviceGetCount", (ctypes.byref(count),))):
        status = getattr(driver, name)(*arguments)
        if status:
            return f"{name} of the CUDA driver failed with error {status}"
    return None if count.value else "the CUDA driver sees no device"


class Peer:
    """An RMSNorm or a product on one device, for the operations that it names; name and device are its identity."""

    name = ""  # what --peers matches
    label = ""  # what tables show
    package = ""  # the distribution, as pip names it
    imports = ""  # its module, where that has another name
    device = "cpu"
    slow = False  # left out by --quick
    risky = False  # tried in a process of its own first, for it may end the process that calls it (trial.py)
    operations: tuple[str, ...] = ("rms_norm", "fused_add_rmsnorm")
    declares: Mapping[str, Points] = {}  # for an operation: where its code or documentation says that it rounds

    def available(self) -> str | None:
        """A reason why not, or None. Cheap: it may look for packages and programs, and import nothing."""
        return absent_package(self.imports or self.package)

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

    def mm_dtype(self, a: Any, b: Any) -> Any:
        """a @ b in float32, by the shortest way that the package has to it."""
        raise NotImplementedError

    def to_numpy(self, array: Any, dtype: np.dtype[Any]) -> Array:
        return np.asarray(array)

    def synchronise(self) -> None:
        """Returns when the work of all calls is done."""

    def healthy(self) -> bool:
        """Can the device still compute? A CUDA error may end the context, and with it every peer of this process."""
        return True

    def describe_device(self) -> str | None:
        """The device and its software in words, once loaded."""
        return None

    def on_cpu(self) -> Peer | None:
        """The same norm on the CPU, for a peer of another device: what its bits are counted against."""
        return None

    def call_to_time(self, operation: str, arrays: Mapping[str, Any], eps: float) -> Callable[[], Any]:
        """A call of the operation as its users make it; `arrays` holds that operation's arguments."""
        method = getattr(self, operation)
        return lambda: method(**arrays, eps=eps)

    def seconds(self, one_call: Callable[[], Any]) -> float:
        """Of the second of two calls, so that every peer finds in the caches what it left there itself."""
        one_call()
        self.synchronise()
        start = time.perf_counter()
        result = one_call()
        self.synchronise()
        took = time.perf_counter() - start
        del result  # its memory goes back outside of the time
        return took

    def threads(self) -> int | None:
        """How many a call may use, where the package says so."""
        return None

    def set_threads(self, threads: int) -> None:
        """Called after `load`, where a number is asked for."""


def declared(cast: bool, round_sum: bool | str = False) -> dict[str, Points]:
    """`Peer.declares` by the two keywords that place our own roundings."""
    s: dict[bool | str, Points] = {False: (), True: ("s",), "after_variance": ("s after variance",)}
    y: Points = ("y",) if cast else ()
    return {"rms_norm": y, "fused_add_rmsnorm": (*s[round_sum], *y)}


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
        self.declares = declared(self.fused["cast_x_before_out_mul"], self.fused["round_sum"])

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
    declares = declared(cast=False)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self._norm(x.astype(np.float32), weight, eps).astype(x.dtype)

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        s = x.astype(np.float32) + residual.astype(np.float32)
        return self._norm(s, weight, eps).astype(x.dtype), s.astype(x.dtype)

    @staticmethod
    def _norm(s: Any, weight: Any, eps: float) -> Any:
        return s / np.sqrt(np.mean(s * s, axis=-1, keepdims=True) + np.float32(eps)) * weight.astype(np.float32)


def ours() -> list[Ours]:
    """Every preset, and the presets' variants that other stacks compute."""
    found: list[Ours] = []
    for preset in fusednorm.SEMANTICS:
        found.append(Ours(preset))
        if preset == "hf_llama":
            found.append(Ours(preset, round_sum=False))
        if preset == "sglang":
            found.append(Ours(preset, round_sum="after_variance"))  # its own JIT kernel: Semantics.source
    return found


def registry(devices: tuple[str, ...] = ("cpu",)) -> list[Peer]:
    """Every norm and product that the audit knows on these devices, in the order of its tables."""
    from . import cuda_peers, product_peers, torch_peers

    known: list[Peer] = [*ours(), PlainNumpy(), *torch_peers.peers("cpu"), *cuda_peers.peers(), *product_peers.peers()]
    return [peer for device in devices for peer in known if peer.device == device]
