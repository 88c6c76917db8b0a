"""The audit on CUDA: with stand-ins that compute with NumPy anywhere, and with the device where there is one."""

from __future__ import annotations

import io
import json
import types
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest

import fusednorm
from fusednorm.audit import cuda_peers, measure, peer_files, plot, products, report, run, torch_peers
from fusednorm.audit.operands import Operands, random_operands
from fusednorm.audit.peers import BASE, Ours, Peer, PlainNumpy, declared, registry

FUSED, NORM = measure.OPERATIONS["fused_add_rmsnorm"], measure.OPERATIONS["rms_norm"]
needs_bfloat16 = pytest.mark.skipif(not helpers.HAVE_BFLOAT16, reason="bf16 needs ml_dtypes")


def cuda_device() -> str | None:
    """Why the real thing can't be audited, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not fusednorm.info()["cuda"]["available"]:
        return fusednorm.info()["cuda"]["reason"]
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


class Device(Ours):
    """A preset of ours on what passes for a CUDA device, with faults in its first elements."""

    device = "cuda"

    def __init__(self, preset: str, faults: int = 0) -> None:
        super().__init__(preset)
        self.preset, self.faults = preset, faults

    def on_cpu(self) -> Peer | None:
        return Ours(self.preset)

    def describe_device(self) -> str | None:
        return "a device of paper"

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self._faulty(super().rms_norm(x, weight, eps))

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        out, total = super().fused_add_rmsnorm(x, residual, weight, eps)
        return self._faulty(out), total

    def _faulty(self, out: Any) -> Any:
        out.reshape(-1).view(f"u{out.dtype.itemsize}")[: self.faults] += 1
        return out


class Careless(PlainNumpy):
    """A kernel package: reads a weight as x's dtype, declares what it does not do, has no CPU twin."""

    name = label = "careless"
    device = "cuda"
    declares = declared(cast=True, round_sum=True)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return super().rms_norm(x, weight.astype(x.dtype), eps)


class Reinterprets(Careless):
    name = label = "reinterprets"

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        with np.errstate(all="ignore"):
            return super().rms_norm(x, weight.view(x.dtype)[: x.shape[1]], eps)


class Refuses(Careless):
    name = label = "refuses"

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        if weight.dtype != x.dtype:
            raise TypeError("weight must be bfloat16\nand a second line")
        return super().rms_norm(x, weight, eps)


class Widens(Careless):
    name = label = "widens"

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        out = self._norm(x.astype(np.float32), weight, eps)
        return out if weight.dtype == np.float32 else out.astype(x.dtype)


def audited(peers: list[Peer], **options: Any) -> run.Report:
    chosen = {
        "rows": 8,
        "columns": 64,
        "dtypes": ("bfloat16",),
        "seed": 12,
        "quick": True,
        "data": ("random",),
        **options,
    }
    steps: list[tuple[int, int]] = []
    told = run.audit(
        run.Options(**chosen), run.find(peers=peers), lambda done, total, text: steps.append((done, total))
    )
    assert steps == [(i, len(steps) - 1) for i in range(len(steps))]
    return told


def results(told: run.Report, device: str, operation: measure.Operation) -> dict[str, measure.Result]:
    (table,) = [table for table in told.tables if (table.device, table.operation) == (device, operation.name)]
    return {result.peer: result for result in table.results}


@needs_bfloat16
@pytest.mark.parametrize("with_cpu", [True, False])
def test_differences_from_the_cpu_are_counted(with_cpu: bool) -> None:
    """Against the CPU's own table where there is one, else against a twin that is called for it."""
    gemma = Device("gemma", faults=5)
    told = audited([*([Ours("hf_llama"), PlainNumpy()] if with_cpu else []), Device("hf_llama"), gemma, Careless()])
    assert [table.device for table in told.tables] == (["cpu", "cuda"] * 2 if with_cpu else ["cuda"] * 2)
    for operation in (FUSED, NORM):
        on_cuda = results(told, "cuda", operation)
        assert on_cuda[BASE].differ[measure.CPU_BITS] == 0
        assert on_cuda[BASE].largest_ulp[measure.CPU_BITS] == 0
        assert on_cuda["fusednorm:gemma"].differ[measure.CPU_BITS] == 5
        assert on_cuda["fusednorm:gemma"].largest_ulp[measure.CPU_BITS] == 1
        assert measure.CPU_BITS not in on_cuda["careless"].differ
        assert on_cuda[BASE].batch is not None
        assert on_cuda[BASE].batch.any_row_changes_at is None
        assert on_cuda[BASE].relative_time == 1.0
        if with_cpu:
            assert all(measure.CPU_BITS not in result.differ for result in results(told, "cpu", operation).values())
    assert told.devices == {"cuda": "a device of paper"}


@needs_bfloat16
def test_fp32_weights() -> None:
    peers: list[Peer] = [Device("hf_llama"), Device("gemma"), Careless(), Reinterprets(), Refuses(), Widens()]
    told = audited([Ours("hf_llama"), *peers], columns=512)
    found = {name: result.fp32_weight for name, result in results(told, "cuda", NORM).items()}
    outcomes = {name: mixed and (mixed.outcome, mixed.dtype) for name, mixed in found.items()}
    assert outcomes == {
        BASE: ("right", "bfloat16"),
        "fusednorm:gemma": ("right", "bfloat16"),
        "careless": ("rounded", "bfloat16"),
        "reinterprets": ("wrong", "bfloat16"),
        "refuses": ("refused", None),
        "widens": ("right", "float32"),
    }
    assert all(result.fp32_weight is None for result in results(told, "cpu", NORM).values())
    (table,) = [table for table in told.tables if (table.device, table.operation) == ("cuda", NORM.name)]
    place = report.headings(table).index("fp32\nweight")
    shown = {line[0]: line[place] for line in report.cells(table)}
    assert (shown["fusednorm hf_llama"], shown["careless"], shown["refuses"]) == ("right", "rounded", "refused")
    assert shown["widens"] == "right, float32"
    assert shown["reinterprets"].endswith(" % wrong")
    assert "refuses, RMSNorm, refuses an fp32 weight: TypeError: weight must be bfloat16" in report.notes(told)


@needs_bfloat16
def test_a_peer_that_rounds_otherwise_than_declared_is_named() -> None:
    told = audited([Device("hf_llama"), Careless()], rows=64, columns=512, dtypes=("bfloat16", "float32"))
    for table in told.tables:
        for result in table.results:
            assert result.rounds_as_declared is (None if table.dtype == "float32" else result.peer == BASE)
    lines = [line for line in report.notes(told) if "declares" in line]
    assert "careless on CUDA declares s, y for fused add + RMSNorm, and rounds -" in lines
    assert not any("fusednorm" in line for line in lines)


def test_an_error_that_ends_the_context_is_survived() -> None:
    """Peers of the device that follow are not called, those of the CPU are, and an error alone ends nothing."""

    class Raises(Careless):
        name = label = "raises"

        def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
            raise RuntimeError("no such kernel")

    class Ends(Raises):
        name = label = "ends"

        def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        def healthy(self) -> bool:
            return False

    told = audited([Raises(), Ends(), Device("hf_llama"), Ours("hf_llama")], dtypes=("float16",))
    on_cuda = results(told, "cuda", FUSED)
    assert on_cuda["raises"].skipped == "RuntimeError: no such kernel"
    assert on_cuda["ends"].skipped == "RuntimeError: no such kernel"
    assert on_cuda[BASE].skipped == "ends has ended the cuda context: RuntimeError: no such kernel"
    assert {result.skipped for result in results(told, "cuda", NORM).values()} == {on_cuda[BASE].skipped}
    for operation in (FUSED, NORM):
        assert results(told, "cpu", operation)[BASE].skipped is None


def test_a_peer_that_fails_while_it_is_timed_has_no_time() -> None:
    class Untimely(Careless):
        name = label = "untimely"

        def seconds(self, one_call: Any) -> float:
            raise RuntimeError("event not recorded\nmore")

    told = audited([Untimely(), Device("hf_llama")], dtypes=("float16",))
    result = results(told, "cuda", FUSED)["untimely"]
    assert (result.untimed, result.seconds, result.skipped) == ("RuntimeError: event not recorded", None, None)
    assert results(told, "cuda", FUSED)[BASE].seconds is not None
    assert "untimely on CUDA, RMSNorm, float16: no time: RuntimeError: event not recorded" in report.notes(told)


@needs_bfloat16
def test_report_json_and_plot(tmp_path: Path) -> None:
    class Missing(Careless):
        name = label = "missing"

        def available(self) -> str | None:
            return "missing is not installed"

    peers: list[Peer] = [Ours("hf_llama"), Device("hf_llama"), Device("gemma", faults=3), Missing(), Refuses()]
    told = audited(peers, dtypes=("float16", "bfloat16"))
    stream = io.StringIO()
    report.write(told, stream)
    text = stream.getvalue()
    assert "CUDA, bfloat16, random, 8 x 64: of 512 elements" in text
    assert "\nbfloat16, random, 8 x 64: of 512 elements" in text
    assert "a device of paper" in text
    assert "absent on CUDA: missing (missing is not installed)" in text
    for part in text.split("\n\n"):
        if "elements, differ from" in part.splitlines()[0]:
            assert ("CPU's" in part) == part.startswith("CUDA")
            assert ("fp32\n" in part or "weight" in part.split("---")[0]) == part.startswith("CUDA, bfloat16")
    stream = io.StringIO()
    report.write_json(told, stream)
    table = json.loads(stream.getvalue())["tables"][-1]
    assert (table["device"], table["dtype"]) == ("cuda", "bfloat16")
    assert table["results"][1]["differ"][measure.CPU_BITS] == 3
    assert table["results"][0]["fp32_weight"]["outcome"] == "right"
    listed = report.describe(run.find(peers=peers))
    assert any(line.split()[:2] == [BASE, "cuda"] for line in listed)
    pytest.importorskip("matplotlib")
    on_cuda = [table for table in told.tables if (table.device, table.operation) == ("cuda", NORM.name)]
    on_cuda[0].results[0].skipped = "not for float16"  # its line is kept, in its place: bfloat16 has figures
    for table in on_cuda:
        table.results[2].skipped = "not at all"
    assert list(plot._lines(on_cuda)) == [BASE, "fusednorm:gemma"]
    plot.draw(told, tmp_path / "audit.svg")
    assert len((tmp_path / "audit.svg").read_bytes()) > 10_000


def test_registry_on_cuda() -> None:
    """What runs on CUDA is known without importing any of it, and has the CPU's names where it is the same norm."""
    on_cpu, on_cuda = registry(("cpu",)), registry(("cuda",))
    assert {peer.device for peer in on_cuda} == {"cuda"}
    assert {peer.name for peer in on_cpu} - {peer.name for peer in on_cuda} == {"numpy", "numpy:matmul"}
    packages = {peer.name for peer in on_cuda} - {peer.name for peer in on_cpu}
    assert packages == {
        *("flashinfer:cute", "flashinfer:cuda", "quack", "liger", "vllm", "sglang:jit", "sglang:kernel"),
        *("triton:tml", "triton:vllm", "triton:sglang", "deepgemm"),
    }
    assert {peer.name for peer in on_cuda if peer.risky} == packages
    assert registry(("cpu", "cuda"))[0].device == "cpu"
    for peer in on_cuda:
        assert set(peer.declares) >= set(peer.operations) - {products.PRODUCT}
        for operation, points in peer.declares.items():
            assert points in measure.OPERATIONS[operation].points
        twin = peer.on_cpu()
        assert (twin is None) == (peer.risky or peer.name == "torch:compile")
        assert twin is None or (twin.name, twin.device) == (peer.name, "cpu")


def test_device_time_waits_until_the_calls_are_queued() -> None:
    """With events that say the device was faster than the host until the sleep is long enough."""
    slept: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def query(self) -> bool:
            return slept[-1] < 1 << 24

        def elapsed_time(self, other: Any) -> float:
            return 3.0  # milliseconds, of all calls

    peer = torch_peers.Eager("cuda")
    cuda = types.SimpleNamespace(Event=Event, synchronize=lambda: None, _sleep=slept.append)
    peer.torch = types.SimpleNamespace(cuda=cuda)
    calls: list[int] = []
    assert peer.seconds(lambda: calls.append(1)) == pytest.approx(3e-3 / torch_peers.QUEUED_CALLS)
    assert slept == [1 << 21, 1 << 23, 1 << 25]
    assert len(calls) == 1 + 3 * torch_peers.QUEUED_CALLS
    peer.seconds(lambda: None)
    assert slept[3:] == [1 << 25]  # what it needs is remembered


# Files


def test_peer_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from fusednorm.audit import Peer\nclass Mine(Peer):\n    package = 'numpy'\n"
        "    def __init__(self, name, device):\n        self.name, self.device = name, device\n"
        "PEERS = [Mine('mine', 'cuda'), Mine('quack', 'cuda'), Mine('quack', 'cpu')]\n"
    )
    found = run.find(devices=("cuda",), files=(path,))
    assert [each.peer.name for each in found].count("quack") == 1
    by_name = {each.peer.name: each for each in found}
    assert type(by_name["mine"].peer).__name__ == type(by_name["quack"].peer).__name__ == "Mine"
    assert (by_name["mine"].peer.label, by_name["mine"].absent) == ("mine", None)
    assert [each.peer.device for each in run.find(("mine", "quack"), devices=("cpu",), files=(path,))] == ["cpu"]
    for text, message in (
        ("PEERS = [3]", "has no list PEERS"),
        ("x = 1", "has no list PEERS"),
        ("import no_such_module", "raises ModuleNotFoundError: No module named 'no_such_module'"),
        ("from fusednorm.audit import Peer\nPEERS = [Peer()]", "Peer needs a name"),
    ):
        path.write_text(text)
        with pytest.raises(peer_files.WrongFile, match=message):
            peer_files.read(path)


# The device itself


@pytest.mark.skipif(cuda_device() is not None, reason=f"no CUDA device to audit: {cuda_device()}")
def test_on_the_device() -> None:
    peers = ("fusednorm", "torch:hf", "torch:F.rms_norm")
    found = run.find(peers, devices=("cuda",))
    options = run.Options(
        rows=96, columns=1024, dtypes=("float16", "bfloat16"), products=((256, 1024),), seed=15, quick=True
    )
    told = run.audit(options, found, lambda done, total, text: None)
    assert [each.absent for each in found] == [None] * len(found)
    assert "compute capability" in told.devices["cuda"]
    assert len(told.tables) == 8
    for table in told.tables:
        for result in table.results:
            assert result.skipped is None, (result.peer, result.skipped)
            assert result.untimed is None
            assert result.seconds is not None
            assert 0 < result.seconds < 0.1
            assert result.rounds_as_declared is True, (result.peer, result.nearest_points)
            assert measure.CPU_BITS in result.differ
            if result.peer.startswith("fusednorm"):
                assert result.differ[measure.CPU_BITS] == 0
                assert result.batch is not None
                assert result.batch.any_row_changes_at is None
                assert result.fp32_weight is None or result.fp32_weight.outcome == "right"
            assert (result.fp32_weight is not None) == (table.dtype == "bfloat16")
    assert [table.dtype for table in told.products] == ["float16", "bfloat16", "float32"]
    for product in told.products:
        (ours,) = product.results
        assert ours.skipped is None, ours.skipped
        assert ours.batch is not None
        assert ours.batch.any_row_changes_at is None
        assert ours.relative_error is not None
        assert ours.relative_error < 1.5e-6
        assert ours.through is None
        assert ours.read_as == ("fp32" if product.dtype == "float32" else None)


def test_operands_are_not_shared_with_the_twin() -> None:
    """The presets on CUDA are given the CPU's operands: the same weight less the offset."""
    twin = Ours("gemma")
    peer = cuda_peers.OursOnCuda(twin)
    operands = Operands("", "float16", random_operands("float16", 2, 8, seed=16).arrays)
    peer.tensor = lambda a: ("on the device", a)  # type: ignore[method-assign]
    arrays = peer.arrays(operands)
    assert all(place == "on the device" for place, _ in arrays.values())
    assert (arrays["weight"][1] == twin.arrays(operands)["weight"]).all()
    assert arrays["weight"][1].dtype == np.float32
    assert (peer.name, peer.device, peer.on_cpu()) == (twin.name, "cuda", twin)
