"""Arrays in device memory in any layout that an ndarray can have, through the CUDA driver alone.

Each has a twin: an ndarray of the same shape, strides and offset in a buffer on the host, of which the device buffer is
a copy, guards and poison included. Slicing and reshaping happen on the twin. `upload` and `download` move whole buffers
and wait. An allocation is exactly as large as its buffer, so that compute-sanitizer sees an access past it.

FUSEDNORM_TEST_CUDA_MEMORY=host puts the "device" memory into host memory, for a build whose CUDA functions are a fake.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Driver:
    """The current device's memory, in the context that the CUDA runtime uses too."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.process = os.getpid()
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'error').decode()} ({status})")

    def enter(self) -> None:
        """A thread that has not used CUDA yet has no context."""
        self.call("cuCtxSetCurrent", self.context)

    def allocate(self, nbytes: int) -> int:
        self.enter()
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        return pointer.value

    def free(self, pointer: int) -> None:
        if os.getpid() == self.process:  # a forked child has the object and no CUDA
            self.enter()
            self.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def copy_in(self, pointer: int, address: int, nbytes: int) -> None:
        self.enter()
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        self.call("cuCtxSynchronize")

    def copy_out(self, address: int, pointer: int, nbytes: int) -> None:
        self.enter()
        self.call("cuCtxSynchronize")
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(address), ctypes.c_uint64(pointer), ctypes.c_size_t(nbytes))

    def fill(self, pointer: int, byte: int, nbytes: int) -> None:
        self.enter()
        self.call("cuMemsetD8_v2", ctypes.c_uint64(pointer), ctypes.c_ubyte(byte), ctypes.c_size_t(nbytes))
        self.call("cuCtxSynchronize")

    def free_bytes(self) -> int:
        self.enter()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


class Host:
    """The same calls on host memory."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def allocate(self, nbytes: int) -> int:
        block = np.empty(nbytes, np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    def copy_in(self, pointer: int, address: int, nbytes: int) -> None:
        ctypes.memmove(pointer, address, nbytes)

    def copy_out(self, address: int, pointer: int, nbytes: int) -> None:
        ctypes.memmove(address, pointer, nbytes)

    def fill(self, pointer: int, byte: int, nbytes: int) -> None:
        ctypes.memset(pointer, byte, nbytes)

    def free_bytes(self) -> int:
        return 2**34  # of address space


@cache
def memory() -> Driver | Host:
    return Host() if os.environ.get("FUSEDNORM_TEST_CUDA_MEMORY") == "host" else Driver()


def address_of(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def root_of(array: Array) -> Array:
    """The ndarray whose memory `array` is a view of, itself if it owns its memory or somebody else does."""
    root, base = array, array.base
    while base is not None:
        if isinstance(base, np.ndarray):
            root = base
        base = getattr(base, "base", None)  # as_strided puts an object of its own between the two
    return root


class Buffer:
    """Device memory, and the bytes on the host that it is a copy of."""

    def __init__(self, root: Array) -> None:
        assert root.flags.forc, "the memory of a buffer has no gaps"
        self.root, self.nbytes = root, max(root.nbytes, 1)
        self.pointer = memory().allocate(self.nbytes)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            memory().free(self.pointer)

    def upload(self) -> None:
        memory().copy_in(self.pointer, address_of(self.root), self.root.nbytes)

    def download(self) -> None:
        assert self.root.flags.writeable
        memory().copy_out(address_of(self.root), self.pointer, self.root.nbytes)


class CudaArray:
    """What a framework with nothing but `__cuda_array_interface__` passes."""

    def __init__(self, buffer: Buffer, twin: Array, readonly: bool = False) -> None:
        self.buffer, self.twin, self.readonly = buffer, twin, readonly

    @property
    def shape(self) -> tuple[int, ...]:
        return self.twin.shape

    @property
    def dtype(self) -> Any:
        return self.twin.dtype  # tells bfloat16, whose typestr is that of two bytes of anything

    @property
    def pointer(self) -> int:
        return self.buffer.pointer + address_of(self.twin) - address_of(self.buffer.root) if self.twin.size else 0

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.twin.shape,
            "typestr": self.twin.dtype.str,
            "data": (self.pointer, self.readonly),
            "strides": self.twin.strides,
            "version": 3,
            "stream": None,
        }

    def _of(self, twin: Array) -> CudaArray:
        assert root_of(twin) is root_of(self.twin), "a view, not a copy"
        return CudaArray(self.buffer, twin, self.readonly)

    def __getitem__(self, key: Any) -> CudaArray:
        return self._of(self.twin[key])

    def __len__(self) -> int:
        return len(self.twin)

    def reshape(self, *shape: int) -> CudaArray:
        return self._of(self.twin.reshape(*shape))

    @property
    def T(self) -> CudaArray:  # noqa: N802 (NumPy's name)
        return self._of(self.twin.T)

    def view(self, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> CudaArray:
        """Of an array of bytes."""
        return self._of(np.ndarray(shape, dtype, self.twin, offset, strides))

    def download(self) -> Array:
        """The twin, after its whole buffer has been copied from the device."""
        self.buffer.download()
        return self.twin

    def write(self, values: Array) -> None:
        """Sets the elements one by one: for few of them in a buffer too large to copy."""
        self.twin[...] = values
        for index in np.ndindex(self.shape):
            element = self[(*index, np.newaxis)]
            memory().copy_in(element.pointer, address_of(element.twin), element.twin.nbytes)

    def read(self) -> Array:
        for index in np.ndindex(self.shape):
            element = self[(*index, np.newaxis)]
            memory().copy_out(address_of(element.twin), element.pointer, element.twin.nbytes)
        return np.array(self.twin, order="C")


def to_device(arrays: Mapping[Any, Array]) -> dict[Any, CudaArray]:
    """Copies of the buffers that the arrays lie in; what shares memory here shares memory there."""
    buffers: dict[int, tuple[Array, Buffer]] = {}
    placed = {}
    for name, array in arrays.items():
        root, readonly = root_of(array), not array.flags.writeable
        if id(root) not in buffers:
            held = root if root.flags.writeable else root.copy(order="K")  # so that a wrong write would be seen
            buffer = Buffer(held)
            buffer.upload()
            buffers[id(root)] = (root, buffer)
        buffer = buffers[id(root)][1]
        if buffer.root is not root:
            flat = buffer.root.reshape(-1, order="A").view(np.uint8)
            offset = address_of(array) - address_of(root) if array.size else 0
            array = np.ndarray(array.shape, array.dtype, flat, offset, array.strides)
        placed[name] = CudaArray(buffer, array, readonly)
    return placed


def empty(shape: tuple[int, ...], dtype: Any, byte: int = 0xA5) -> CudaArray:
    """A C-contiguous array of its own, every byte of it `byte`."""
    twin = np.empty(shape, dtype)
    buffer = Buffer(twin)
    memory().fill(buffer.pointer, byte, buffer.nbytes)
    return CudaArray(buffer, twin)


def room(reserved: Any) -> CudaArray:
    """As many bytes as `reserved`, an array over untouched address space, with nothing copied."""
    raw = np.frombuffer(reserved, np.uint8)
    if raw.nbytes + 2**28 > memory().free_bytes():
        raise MemoryError(f"the device has {memory().free_bytes() / 2**30:.1f} GiB free")
    return CudaArray(Buffer(raw), raw)
