"""`--peer FILE` with kernels that end their process or its CUDA context, or never answer: the audit goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_audit_command import command, without

from fusednorm.audit import measure, run, trial

FUSED, NORM = "fused_add_rmsnorm", "rms_norm"
KERNELS = """
import os, signal, sys, time
from fusednorm.audit import Absent, declared
from fusednorm.audit.peers import PlainNumpy

class Kernel(PlainNumpy):
    device = "cuda"
    risky = True
    crashes = staticmethod(lambda operation, x, weight: False)
    def __init__(self, name, **changes):
        self.name = self.label = name
        self.__dict__.update(changes)
    def rms_norm(self, x, weight, eps):
        print("a package that prints to stdout")
        if self.crashes("rms_norm", x, weight):
            self.crash()
        return super().rms_norm(x, weight, eps)
    def fused_add_rmsnorm(self, x, residual, weight, eps):
        if self.crashes("fused_add_rmsnorm", x, weight):
            self.crash()
        return super().fused_add_rmsnorm(x, residual, weight, eps)
    def crash(self):
        os.kill(os.getpid(), signal.SIGSEGV)

class Unloadable(Kernel):
    def load(self):
        os._exit(3)

class NotThere(Kernel):
    def load(self):
        raise Absent("its library is for another device")

class LosesContext(Kernel):
    lost = False
    def crash(self):
        self.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")
    def healthy(self):
        return not self.lost
    def arrays(self, operands):
        if self.lost:
            raise RuntimeError("CUDA error: the context is gone")
        return super().arrays(operands)

class Slow(Kernel):
    def crash(self):
        time.sleep(600)
"""


def write(folder: Path, peers: str) -> Path:
    path = folder / "kernels.py"
    path.write_text(KERNELS + f"PEERS = [{peers}]\n")
    return path


def audited(path: Path, names: str, *more: str) -> tuple[dict[str, Any], dict[tuple[str, str, str], Any]]:
    arguments = ("--quick", "--rows", "4", "--columns", "32", "--seed", "17", "--data", "random", "--json", "-", *more)
    told = json.loads(command("audit", "--device", "cuda", "--peer", str(path), "--peers", names, *arguments)[0])
    found = {}
    for table in told["tables"]:
        for result in table["results"]:
            found[result["peer"], table["operation"], table["dtype"]] = result
    return told, found


def test_kernels_that_end_their_process(tmp_path: Path) -> None:
    """One case, one dtype, the load: each is told of its own, and the sound kernel has all its figures."""
    pytest.importorskip("ml_dtypes")
    path = write(
        tmp_path,
        "Kernel('sound'), Kernel('mixed', crashes=lambda o, x, w: w.dtype != x.dtype), Unloadable('unloadable'), "
        "Kernel('half', crashes=lambda o, x, w: o == 'rms_norm' and x.dtype == 'float16'), NotThere('not_there'), "
        "Kernel('single', crashes=lambda o, x, w: len(x) == 1), "
        "LosesContext('context', crashes=lambda o, x, w: o == 'rms_norm' and x.dtype == 'float16')",
    )
    told, found = audited(path, "sound,mixed,half,single,unloadable,not_there,context")
    absent = {peer["name"]: peer["absent"] for peer in told["peers"]}
    assert absent["unloadable"] == "ended the calling process (exit status 3)"
    assert absent["not_there"] == "its library is for another device"
    segfault = "ended the calling process (SIGSEGV)"
    expected = {
        "sound": {},
        "mixed": {},
        "half": {(NORM, "float16"): segfault},
        "single": dict.fromkeys([(o, d) for o in (FUSED, NORM) for d in ("float16", "bfloat16")], segfault),
        "context": {(NORM, "float16"): "RuntimeError: CUDA error: an illegal memory access was encountered"},
    }
    assert {key[0] for key in found} == set(expected)
    for (name, operation, dtype), result in found.items():
        assert result["skipped"] == expected[name].get((operation, dtype)), (name, operation, dtype)
        if result["skipped"] is None:
            assert result["seconds"] > 0
        if dtype == "bfloat16" and name != "single":
            outcome, text = ("refused", segfault) if name == "mixed" else ("right", None)
            assert (result["fp32_weight"]["outcome"], result["fp32_weight"]["text"]) == (outcome, text)


def test_a_kernel_that_never_answers(tmp_path: Path) -> None:
    path = write(tmp_path, "Slow('slow', crashes=lambda o, x, w: o == 'rms_norm' and len(x) == 1024), Kernel('sound')")
    peers = [each.peer for each in run.find(("slow", "sound"), devices=("cuda",), files=(path,))]
    job = trial.Job([(p.name, p.device) for p in peers], [str(path)], ("random",), (FUSED, NORM), ("float16",), 2, 8, 1)
    ticks: list[str] = []
    trials = trial.run_trials(job, peers, ticks.append, seconds=10)
    assert trials.refused(peers[0], NORM, "random", "float16") == "no result within 10 s"
    assert trials.refused(peers[0], FUSED, "random", "float16") is None
    assert trials.refused(peers[1], NORM, "random", "float16") is None
    assert trials.absent(peers[0]) is trials.absent(peers[1]) is None
    assert ticks == [f"try {name} in a process of its own" for name in ("slow", "sound")]


def test_a_child_that_does_not_begin(tmp_path: Path) -> None:
    """The file is there for the audit and gone for the child: every kernel is absent, with the child's last words."""
    path = write(tmp_path, "Kernel('a'), Kernel('b')")
    peers = [each.peer for each in run.find(("a", "b"), devices=("cuda",), files=(path,))]
    path.unlink()
    job = trial.Job([(p.name, p.device) for p in peers], [str(path)], ("random",), (NORM,), ("float16",), 2, 8, 1)
    ticks: list[str] = []
    trials = trial.run_trials(job, peers, ticks.append)
    for peer in peers:
        assert "the process for it ended (exit status 1): " in (trials.absent(peer) or "")
        assert "kernels.py is not a Python file" in (trials.absent(peer) or "")
    assert len(ticks) == 2


def test_wrong_devices_and_files(tmp_path: Path) -> None:
    path = write(tmp_path, "3")
    assert "has no list PEERS" in command("audit", "--peer", str(path), code=2)[1]
    assert "there is no such file" in command("audit", "--peer", str(tmp_path / "none.py"), code=2)[1]
    assert "'tpu' is not one of cpu, cuda" in command("audit", "--device", "tpu", code=2)[1]
    absent = without("liger_kernel")
    _, errors = command("audit", "--device", "cuda", "--peers", "liger", before=absent, code=2)
    assert "--device cuda: nothing can run there: liger_kernel is not installed" in errors


def test_operations_of_a_unit_are_those_of_the_peer(tmp_path: Path) -> None:
    path = write(tmp_path, "Kernel('a', operations=('rms_norm',))")
    (peer,) = [each.peer for each in run.find(("a",), devices=("cuda",), files=(path,)) if each.peer.name == "a"]
    job = trial.Job([("a", "cuda")], [], ("random", "hidden"), tuple(measure.OPERATIONS), ("bfloat16",), 2, 8, 1)
    cases = [(unit.case, unit.operation) for unit in trial.units(job, [peer])]
    assert cases == [(trial.LOAD, ""), ("random", NORM), ("hidden", NORM), (trial.FP32_WEIGHT, NORM)]
