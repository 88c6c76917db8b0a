"""Results compared where they are: on the device, by torch, or by copies to the host where there is no torch with CUDA.

A `Result` is an output between two guards, and what it has to hold, guards included, in device memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import cuda_arrays
import helpers
import numpy as np
from helpers import GUARD_BYTES, INFINITY_BITS, POISON

Array = np.ndarray[Any, Any]


def guarded(expected: Array) -> Array:
    """The bytes of `expected` between two guards."""
    raw = np.full(expected.nbytes + 2 * GUARD_BYTES, POISON, np.uint8)
    raw[GUARD_BYTES:-GUARD_BYTES] = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
    return raw


class Result:
    """Of the shape and dtype of `expected`; `array` is what a norm gets as its output."""

    def __init__(self, expected: Array) -> None:
        self.expected = expected

    def fail_or_count(self, raw: Array, context: object) -> None:
        helpers.assert_guards(raw, context)
        actual = raw[GUARD_BYTES:-GUARD_BYTES].view(self.expected.dtype).reshape(self.expected.shape)
        helpers.assert_same_bits(actual, self.expected, context)


class PlainResult(Result):
    def __init__(self, expected: Array) -> None:
        super().__init__(expected)
        self.raw = cuda_arrays.empty((expected.nbytes + 2 * GUARD_BYTES,), np.uint8, POISON)
        strides = np.ndarray(expected.shape, expected.dtype, self.raw.twin, GUARD_BYTES).strides
        self.array = self.raw.view(expected.dtype.name, expected.shape, strides, GUARD_BYTES)

    def clear(self) -> None:
        cuda_arrays.memory().fill(self.raw.buffer.pointer, POISON, self.raw.twin.nbytes)

    def hold(self, values: Array) -> None:
        """For a call in place: the output is the input."""
        self.clear()
        self.raw.twin[...] = guarded(values)
        self.raw.buffer.upload()

    def check(self, context: object) -> None:
        self.fail_or_count(self.raw.download(), context)


class Plain:
    """Without torch."""

    result = PlainResult

    @staticmethod
    def put(array: Array) -> Any:
        return cuda_arrays.to_device({"": array})[""]


@cache
def torch_dtypes() -> dict[str, Any]:
    import torch

    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchResult(Result):
    def __init__(self, expected: Array) -> None:
        import torch

        super().__init__(expected)
        self.wanted = torch.from_numpy(guarded(expected)).cuda()
        self.raw = torch.empty_like(self.wanted)
        self.array = self._typed(self.raw).view(torch_dtypes()[expected.dtype.name]).reshape(expected.shape)

    @staticmethod
    def _typed(raw: Any) -> Any:
        return raw[GUARD_BYTES:-GUARD_BYTES]

    def clear(self) -> None:
        self.raw.fill_(POISON)

    def hold(self, values: Any) -> None:
        self.clear()
        self.array.copy_(values)

    def check(self, context: object) -> None:
        import torch

        if not torch.equal(self.raw, self.wanted) and not self._same_but_for_nans():
            self.fail_or_count(self.raw.cpu().numpy(), context)
            raise AssertionError(f"{context}: torch sees a difference that NumPy does not")
        helpers.count_elements(self.expected.size)

    def _same_but_for_nans(self) -> bool:
        """Any NaN equals any NaN; the guards are to be untouched."""
        import torch

        for ends in (slice(None, GUARD_BYTES), slice(-GUARD_BYTES, None)):
            if not torch.equal(self.raw[ends], self.wanted[ends]):
                return False
        itemsize, name = self.expected.dtype.itemsize, self.expected.dtype.name
        integer = torch.int32 if itemsize == 4 else torch.int16
        a, e = (self._typed(raw).view(integer) for raw in (self.raw, self.wanted))
        magnitude = (1 << (8 * itemsize - 1)) - 1
        both_nan = ((a & magnitude) > INFINITY_BITS[name]) & ((e & magnitude) > INFINITY_BITS[name])
        return not bool(((a != e) & ~both_nan).any())


class Torch:
    """Through tensors on the current device and torch's current stream."""

    result = TorchResult

    @staticmethod
    def put(array: Array) -> Any:
        import torch

        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).cuda()
        return flat.view(torch_dtypes()[array.dtype.name]).reshape(array.shape)


def have_torch() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


@cache
def device() -> Any:
    return Torch if have_torch() else Plain
