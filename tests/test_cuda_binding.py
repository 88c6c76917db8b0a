"""torch on a GPU: streams, graphs, memory that is freed while a kernel is queued, threads, devices, changing weights.

Each result is compared bit for bit with the CPU's. `torch.cuda._sleep` delays a stream, so that a wrong order is seen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cuda_tensors
import pytest
from cuda_tensors import SLEEP, on_cpu, same, tensors

import fusednorm

torch = cuda_tensors.require()
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


# ---- torch's streams ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch(dtype: Any) -> None:
    x, weight = tensors(dtype=dtype)
    residual, _ = tensors(65, dtype=dtype)
    expected = on_cpu(x, weight)
    out = torch.empty_like(x)
    assert fusednorm.rms_norm(x, weight, out=out) is out
    result = fusednorm.rms_norm(x, weight)
    assert (result.device, result.dtype, result.is_contiguous()) == (x.device, dtype, True)
    assert same(out, expected)
    assert same(result, expected)
    assert same(fusednorm.rms_norm(x.T.contiguous().T, weight), expected)
    assert same(fusednorm.rms_norm(x, weight, out_dtype=torch.float32), on_cpu(x, weight, out_dtype=torch.float32))
    wanted = fusednorm.fused_add_rmsnorm(x.cpu(), residual[:64].cpu(), weight.cpu())
    version = x._version, residual._version
    got = fusednorm.fused_add_rmsnorm(x, residual[:64], weight)
    assert got[0] is x
    assert (x._version, residual._version) == (version[0] + 1, version[1] + 1)
    assert all(same(*pair) for pair in zip(got, wanted, strict=True))


def test_the_current_stream_is_used() -> None:
    """x is written late on the side stream: a norm on another one would read what was there before."""
    x, weight = tensors()
    expected = on_cpu(2 * x, weight)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        x.mul_(2)
        result = fusednorm.rms_norm(x, weight)
        copied = result.clone()
    side.synchronize()
    assert same(copied, expected)


@pytest.mark.parametrize("kind", ["torch", "handle", "protocol"])
def test_a_given_stream_is_used(kind: str) -> None:
    side = torch.cuda.Stream()
    given: Any = {"torch": side, "handle": side.cuda_stream}.get(kind)
    if kind == "protocol":
        given = type("Given", (), {"__cuda_stream__": lambda self: (0, side.cuda_stream)})()
    for first in (True, False):
        x, weight = tensors()
        expected = on_cpu(2 * x, weight)
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            x.mul_(2)
        result = fusednorm.rms_norm(x, weight, stream=given)
        with torch.cuda.stream(side):
            copied = result.clone()
        assert first or not side.query(), "the call has waited"  # the first may load torch's kernels, which waits
        side.synchronize()
        assert same(copied, expected)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_numbers_of_default_streams(number: int) -> None:
    x, weight = tensors()
    expected = on_cpu(x, weight)
    result = fusednorm.rms_norm(x, weight, stream=number)
    torch.cuda.synchronize()
    assert same(result, expected)


def test_memory_freed_at_once_is_not_reused_too_early() -> None:
    """With stream= the tensors' own stream does not wait for the kernel: torch must be told of it."""
    side = torch.cuda.Stream()
    for _ in range(10):
        x, weight = tensors(256, 4096)
        expected = on_cpu(x, weight)
        out = torch.empty_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP // 4)
        fusednorm.rms_norm(x, weight, out=out, stream=side)
        del x, weight
        overwritten = [torch.full((256, 4096), 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        side.synchronize()
        assert same(out, expected)
        del overwritten


def test_a_result_on_a_given_stream_does_not_take_memory_still_in_use() -> None:
    side = torch.cuda.Stream()
    x, weight = tensors(256, 4096)
    keep = torch.zeros_like(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    temporary = torch.full_like(x, 3.0)
    keep.copy_(temporary)
    del temporary  # free on the current stream, which is not done with it
    result = fusednorm.rms_norm(x, weight, stream=side)
    torch.cuda.synchronize()
    assert bool((keep == 3).all())
    assert same(result, on_cpu(x, weight))


def test_nothing_waits() -> None:
    x, weight = tensors()
    out = torch.empty_like(x)
    side, end = torch.cuda.Stream(), torch.cuda.Event()

    def calls() -> None:
        fusednorm.rms_norm(x, weight)
        fusednorm.rms_norm(x, weight, out=out)
        fusednorm.fused_add_rmsnorm(x, out, weight)
        fusednorm.rms_norm(x, weight, stream=side)

    calls()  # torch asks the driver for memory, which may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(5 * SLEEP)
    end.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(5 * SLEEP)
    calls()
    assert not end.query(), "a call has waited for the device"
    assert not side.query()


def test_errors_come_before_writes() -> None:
    x, weight = tensors()
    out = torch.full_like(x, 5.0)
    wrong: list[tuple[type[BaseException], Callable[[], Any]]] = [
        (ValueError, lambda: fusednorm.rms_norm(x, weight[:-1], out=out)),
        (ValueError, lambda: fusednorm.rms_norm(x, weight.cpu(), out=out)),
        (ValueError, lambda: fusednorm.rms_norm(x.cpu(), weight, out=out)),
        (ValueError, lambda: fusednorm.rms_norm(x, weight, out=out[:, :-1])),
        (ValueError, lambda: fusednorm.rms_norm(out[1:], weight, out=out[:-1])),
        (TypeError, lambda: fusednorm.rms_norm(x.double(), weight, out=out)),
        (TypeError, lambda: fusednorm.rms_norm(x, weight, out=out, stream="side")),
        (ValueError, lambda: fusednorm.rms_norm(x.cpu(), stream=torch.cuda.current_stream())),
    ]
    for exception, call in wrong:
        with pytest.raises(exception):
            call()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        fusednorm.rms_norm(x.requires_grad_(), weight, out=out)
    torch.cuda.synchronize()
    assert bool((out == 5).all())


def test_a_saved_tensor_that_is_overwritten_is_found() -> None:
    x, weight = tensors(dtype=torch.float32)
    with torch.enable_grad():
        leaf = torch.ones_like(x, requires_grad=True)
        loss = (leaf * x).sum()
    fusednorm.rms_norm(x, weight, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- graphs ----


def test_torch_graph() -> None:
    fusednorm.warmup()
    x, weight = tensors()
    residual = torch.randn_like(x)
    out = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fusednorm.rms_norm(x, weight, out=out)
        allocated = fusednorm.rms_norm(out, weight)
        fusednorm.fused_add_rmsnorm(x, residual, weight)
    for seed in range(5):
        torch.manual_seed(seed)
        for tensor in (x, residual, weight):
            tensor.copy_(torch.randn_like(tensor))
        first = on_cpu(x, weight)
        expected = (first, on_cpu(first, weight), *fusednorm.fused_add_rmsnorm(x.cpu(), residual.cpu(), weight.cpu()))
        graph.replay()
        assert all(same(*pair) for pair in zip((out, allocated, x, residual), expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_an_error() -> None:
    x, weight = tensors()
    out = torch.zeros_like(x)
    fusednorm.rms_norm(x, weight, out=out)
    torch.cuda.synchronize()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            fusednorm.rms_norm(x, weight, out=out)
        except RuntimeError:
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(status[1]) == 0
    fusednorm.rms_norm(x, weight, out=out)
    assert same(out, on_cpu(x, weight))


# ---- threads and devices ----


def test_a_thread_that_never_touched_cuda() -> None:
    x, weight = tensors()
    out = torch.zeros_like(x)
    thread = threading.Thread(target=lambda: fusednorm.rms_norm(x, weight, out=out))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert same(out, on_cpu(x, weight))


def test_threads_at_once() -> None:
    cases = [tensors(32 + i, 512 * (1 + i % 3)) for i in range(8)]
    expected = [on_cpu(*case) for case in cases]
    wrong = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [fusednorm.rms_norm(*cases[number]) for _ in range(200)]
        stream.synchronize()
        wrong.extend(number for result in results if not same(result, expected[number]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@two_devices
def test_another_device_than_the_current() -> None:
    x, weight = tensors(device="cuda:1")
    torch.cuda.set_device(0)
    fusednorm.warmup("cuda:1")
    for result in (fusednorm.rms_norm(x, weight), fusednorm.rms_norm(x, weight, out=torch.empty_like(x))):
        assert result.device == x.device
        assert same(result, on_cpu(x, weight))
    assert torch.cuda.current_device() == 0
    side = torch.cuda.Stream("cuda:1")
    result = fusednorm.rms_norm(x, weight, stream=side)
    side.synchronize()
    assert same(result, on_cpu(x, weight))
    with pytest.raises(ValueError, match="weight is on cuda:0, but x is on cuda:1"):
        fusednorm.rms_norm(x, weight.to("cuda:0"))


# ---- weights that change ----


@pytest.mark.parametrize("writer", ["copy", "kernel"])
@pytest.mark.parametrize("graph", [False, True])
def test_a_weight_written_just_before(graph: bool, writer: str) -> None:
    """The norm may be started before the write has finished, but must not read."""
    x, _ = tensors(8, 4096)
    weights = torch.randn(64, 4096, device="cuda").to(torch.bfloat16)
    weight, outs = torch.empty_like(weights[0]), torch.empty(64, 8, 4096, dtype=torch.bfloat16, device="cuda")
    expected = torch.stack([on_cpu(x, w) for w in weights])

    def chain() -> None:
        for w, out in zip(weights, outs, strict=True):
            if writer == "copy":
                weight.copy_(w)
            else:
                torch.mul(w, 1, out=weight)
            fusednorm.rms_norm(x, weight, out=out)

    chain()
    replay = chain
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            chain()
        replay = captured.replay
    for _ in range(50):
        outs.zero_()
        replay()
        assert same(outs, expected)


@pytest.mark.parametrize("scope", ["context", "process"])
def test_constant_weights(scope: str) -> None:
    x, weight = tensors(8, 4096)
    expected = x.cpu()
    fusednorm.set_weights_are_constant(scope == "process")
    try:
        with fusednorm.weights_are_constant():
            for _ in range(200):
                x = fusednorm.rms_norm(x, weight)
    finally:
        fusednorm.set_weights_are_constant(False)
    for _ in range(200):
        expected = fusednorm.rms_norm(expected, weight.cpu())
    assert same(x, expected)
