"""The audit of products: its report, plot, JSON and command line, and kernels that end their process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from test_audit_command import command, without
from test_audit_products import SHAPE, Planted, to_bits

from fusednorm.audit import plot, report, run
from fusednorm.audit.peers import Peer, registry

# The report


def small_report(*, norms: bool = True) -> run.Report:
    class OnPaper(Planted):
        device = "cuda"

        def describe_device(self) -> str | None:
            return "a device of paper"

    peers: list[Peer] = [Planted("steady"), Planted("late", size=8), Planted("tf32", read=to_bits(10)),
                         OnPaper("paper", result=to_bits(7))]  # fmt: skip
    if norms:
        peers += [peer for peer in registry() if peer.name in ("fusednorm:hf_llama", "numpy")]
    steps: list[tuple[int, int]] = []
    shapes = (SHAPE, (7, 33))
    options = run.Options(rows=4, columns=32, dtypes=("float16",), data=("random",), products=shapes, quick=True)
    told = run.audit(options, run.find(peers=peers), lambda done, total, text: steps.append((done, total)))
    assert steps == [(i, len(steps) - 1) for i in range(len(steps))]
    return told


@pytest.mark.parametrize("norms", [True, False])
def test_text_json_and_plot(tmp_path: Path, norms: bool) -> None:
    told = small_report(norms=norms)
    assert len(told.tables) == (2 if norms else 0)
    assert [(table.device, table.dtype, table.n) for table in told.products] == [
        (device, dtype, n) for n in (40, 7) for dtype in ("float16", "float32") for device in ("cpu", "cuda")
    ]
    stream = io.StringIO()
    report.write(told, stream)
    text = stream.getvalue()
    assert "\nfloat32 product, N x K = 40 x 70, fp32 result\n" in text
    assert "\nCUDA, float16 product, N x K = 7 x 33, fp32 result\n" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.split("float32 product")[1].splitlines()[3:6]}
    assert lines["steady"][-2:] == ["-", "fp32"]
    assert lines["late"][:2] == ["from", "8"]
    assert lines["tf32"][-1] == "TF32"
    paper = [line.split() for line in text.splitlines() if line.startswith("paper ")]
    assert [line[1:3] + line[4:] for line in paper] == [
        ["same", "bits", "bfloat16", *read] for _ in range(2) for read in ([], ["fp32"])
    ]
    assert "read as: what is left of fp32 operands" in text
    assert ("exact, fp32 sum" in text) == norms
    assert ('"from HF eager" is empty' in text) == norms
    stream = io.StringIO()
    report.write_json(told, stream)
    first = json.loads(stream.getvalue())["products"][0]
    assert {key: first[key] for key in ("device", "dtype", "n", "k")} == {
        "device": "cpu",
        "dtype": "float16",
        "n": 40,
        "k": 70,
    }
    assert first["results"][1]["batch"]["row_0_changes_at"] == 8
    pytest.importorskip("matplotlib")
    plot.draw(told, tmp_path / "audit.svg")
    assert len((tmp_path / "audit.svg").read_bytes()) > 10_000


def test_terminal_report() -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    report.write(small_report(norms=False), stream)
    assert "N x K = 40 x 70" in stream.getvalue()
    assert "TF32" in stream.getvalue()


# The command


def test_command() -> None:
    absent = without("torch", "ml_dtypes", "rich", "matplotlib")
    arguments = ("--operation", "mm_dtype", "--device", "cpu", "--quick", "--products", "8x32,3x17", "--seed", "4")
    told = json.loads(command("audit", *arguments, "--json", "-", before=absent)[0])
    assert told["tables"] == []
    assert [(table["dtype"], table["n"], table["k"]) for table in told["products"]] == [
        (dtype, n, k) for n, k in ((8, 32), (3, 17)) for dtype in ("float16", "float32")
    ]
    for table in told["products"]:
        names = [result["peer"] for result in table["results"]]
        assert names == ["fusednorm:mm_dtype", "numpy:matmul"]
        assert table["results"][0]["batch"]["any_row_changes_at"] is None
        assert table["results"][0]["relative_error"] < 3e-7
    text, _ = command("audit", *arguments, before=absent)
    assert "float16 product, N x K = 3 x 17, fp32 result" in text
    for wrong in ("8", "8x32x2", "0x4", "4x1", "8x-3", "axb"):
        assert "is not like 256x7168" in command("audit", "--products", wrong, code=2)[1]


KERNELS = """
import os, signal
from fusednorm.audit.product_peers import NumpyProduct

class Kernel(NumpyProduct):
    device = "cuda"
    risky = True
    def __init__(self, name, crashes=lambda a: False):
        self.name = self.label = name
        self.crashes = crashes
    def mm_dtype(self, a, b):
        if self.crashes(a):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().mm_dtype(a, b)

PEERS = [Kernel("sound"), Kernel("half", lambda a: a.dtype == "float16"), Kernel("single", lambda a: len(a) == 1)]
"""


def test_kernels_that_end_their_process(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(KERNELS)
    arguments = ("--quick", "--seed", "1", "--dtype", "fp16", "--products", "8x32", "--json", "-")
    names = ("--device", "cuda", "--peer", str(path), "--peers", "sound,half,single")
    told = json.loads(command("audit", *names, *arguments)[0])
    skipped = {
        (result["peer"], table["dtype"]): result["skipped"] for table in told["products"] for result in table["results"]
    }
    segfault = "ended the calling process (SIGSEGV)"
    assert skipped == {
        ("sound", "float16"): None,
        ("sound", "float32"): None,
        ("half", "float16"): segfault,
        ("half", "float32"): None,
        ("single", "float16"): segfault,
        ("single", "float32"): segfault,
    }
