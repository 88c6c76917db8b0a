"""weights_are_constant(): a promise that lets a CUDA kernel start reading its weight early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from fusednorm import _core


@contextmanager
def _promise(constant: bool) -> Iterator[None]:
    token = _core._promise_weights(constant)
    try:
        yield
    finally:
        token.var.reset(token)


def weights_are_constant(constant: bool = True) -> AbstractContextManager[None]:
    """Promises, for this thread or task and the calls within, that no CUDA kernel still running writes a weight.

    A norm on a GPU of compute capability 9.0 or newer may then read its weight before the preceding kernel has finished
    (programmatic dependent launch). Without the promise it waits first, which is always right: also when the preceding
    kernel is the one that writes the weight. A captured graph keeps the promise that it was captured with. No bit
    depends on it while it is kept.

    with fusednorm.weights_are_constant():
        y = model(x)

    weights_are_constant(False) takes it back within, whatever set_weights_are_constant() says of the whole process.
    """
    if not isinstance(constant, bool):
        raise TypeError(f"weights_are_constant: constant is a {type(constant).__name__}: it must be True or False")
    return _promise(constant)
