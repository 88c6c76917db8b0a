"""What the extension asks of frameworks on CUDA by Python code, since it is rare: memory for a stream not current."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any


def _torch_stream(torch: Any, handle: int, device: int) -> Any:
    return torch.cuda.ExternalStream(handle, device=device)


def torch_current(device: int) -> int:
    """torch's current stream, for a torch without the DLPack C exchange API."""
    return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)


def torch_empty_like(like: Any, dtype: Any, handle: int, device: int) -> Any:
    """An empty tensor whose memory is the stream's."""
    torch: Any = sys.modules["torch"]
    with torch.cuda.stream(_torch_stream(torch, handle, device)):
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def torch_new_empty(like: Any, shape: tuple[int, ...], dtype: Any, handle: int, device: int) -> Any:
    """The same, of another shape."""
    with sys.modules["torch"].cuda.stream(_torch_stream(sys.modules["torch"], handle, device)):
        return like.new_empty(shape, dtype=dtype)


def torch_record(tensors: list[Any], handle: int, device: int) -> None:
    """Their memory, once freed, is not used again before the stream is done with what is queued on it now."""
    stream = _torch_stream(sys.modules["torch"], handle, device)
    for tensor in tensors:
        tensor.record_stream(stream)


class _Stream:
    """CUDA's stream protocol for a handle."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _cupy_stream(cupy: Any, handle: int, device: int) -> AbstractContextManager[Any]:
    chosen: AbstractContextManager[Any]
    stream = cupy.cuda.Stream
    if handle == 0:
        chosen = stream.null
    elif handle == 2:
        chosen = stream.ptds
    elif hasattr(stream, "from_external"):  # CuPy 14
        chosen = stream.from_external(_Stream(handle))
    else:
        chosen = cupy.cuda.ExternalStream(handle, device)
    return chosen


def cupy_empty(shape: tuple[int, ...], dtype: Any, handle: int, device: int) -> Any:
    """An empty array on the device, whose memory is the stream's."""
    cupy: Any = sys.modules["cupy"]
    with cupy.cuda.Device(device), _cupy_stream(cupy, handle, device):
        return cupy.empty(shape, dtype)


def array_api_empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array of `like`'s library on its device; JAX fills it with zeros."""
    namespace = like.__array_namespace__()
    return namespace.empty(shape, dtype=getattr(namespace, dtype), device=like.device)
