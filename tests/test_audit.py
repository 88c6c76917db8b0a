"""The audit: its counts, what it finds out about a norm, its report, plot and command line."""

from __future__ import annotations

import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest

import fusednorm
from fusednorm.audit import measure, plot, progress, report, run
from fusednorm.audit.operands import Operands, hidden_operands, random_operands
from fusednorm.audit.peers import BASE, Absent, Ours, Peer, PlainNumpy

FUSED, NORM = measure.OPERATIONS["fused_add_rmsnorm"], measure.OPERATIONS["rms_norm"]
SIXTEEN_BIT = [dtype for dtype in helpers.DTYPES if dtype != "float32"]
HF = ("s", "y")  # transformers' rounding points


# What is counted


class Planted(Peer):
    """Transformers' result with faults: `ulps` at elements, and other bits of a row from a batch size on."""

    package = "numpy"

    def __init__(self, name: str, ulps: dict[tuple[int, int], int], row: int = 0, batch: int | None = None) -> None:
        self.name = self.label = name
        self.ulps, self.row, self.batch = ulps, row, batch

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self._faulty(NORM.exact(Operands("", x.dtype.name, {"x": x, "weight": weight}, eps), ("y",)))

    def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        operands = Operands("", x.dtype.name, {"x": x, "residual": residual, "weight": weight}, eps)
        return self._faulty(FUSED.exact(operands, HF)), x + residual

    def _faulty(self, out: Any) -> Any:
        encodings = out.view(f"i{out.dtype.itemsize}")
        for (row, column), ulp in self.ulps.items():
            if row < len(out):
                encodings[row, column] += ulp  # away from zero
        if self.batch is not None and len(out) >= self.batch and self.row < len(out):
            encodings[self.row, 3] += 1
        return out


def audit_one(peers: list[Peer], operands: Operands, operation: measure.Operation = FUSED) -> dict[str, measure.Result]:
    (table,) = measure.audit_operation(peers, operation, operands, seed=1, quick=True, tick=lambda text: None)
    return {result.peer: result for result in table.results}


@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_planted_differences_are_counted(dtype: str) -> None:
    ulps = {(0, 0): 1, (1, 5): 3, (7, 31): -2, (19, 2): 1}
    operands = random_operands(dtype, 20, 32, seed=5)
    for operation, key in ((FUSED, "exact_rounded_sum"), (NORM, "exact")):
        results = audit_one([Planted("clean", {}), Planted("faulty", ulps)], operands, operation)
        assert results["clean"].differ[key] == 0
        assert results["clean"].largest_ulp[key] == 0
        assert results["faulty"].differ[key] == len(ulps)
        assert results["faulty"].largest_ulp[key] == 3


def test_ulp_across_zero_and_nan() -> None:
    a = np.array([0.0, -0.0, 1.0, np.nan], np.float16)
    assert measure.differing(a, a.copy()) == 0
    assert measure.largest_ulp(a, np.array([-0.0, 2.0**-24, 1.0, np.nan], np.float16)) == 1
    assert measure.differing(a, np.array([-0.0, -(2.0**-24), 1.0, -np.nan], np.float16)) == 2
    tiny = np.array([2.0**-24], np.float16)
    assert measure.largest_ulp(tiny, -tiny) == 2
    assert measure.largest_ulp(np.array([np.nan], np.float16), tiny) is None


def test_planted_change_of_bits_with_the_batch() -> None:
    peers: list[Peer] = [
        Planted("steady", {}),
        Planted("row 0 at 7", {}, row=0, batch=7),
        Planted("row 4 at 9", {}, row=4, batch=9),
    ]
    for rows in (3, 300):  # with 3 rows the batches repeat them
        results = audit_one(peers, random_operands("float16", rows, 16, seed=6), NORM)
        batches = {name: result.batch for name, result in results.items()}
        assert all(batch is not None and batch.largest == 1024 for batch in batches.values())
        changes = {name: (b.row_0_changes_at, b.any_row_changes_at) for name, b in batches.items() if b is not None}
        assert changes == {"steady": (None, None), "row 0 at 7": (7, 7), "row 4 at 9": (None, 9)}
    assert report.batch_text(batches["steady"]) == "same bits"
    assert report.batch_text(batches["row 0 at 7"]) == "from 7"
    assert report.batch_text(batches["row 4 at 9"]) == "from 9, row 0 kept"


def test_batch_sizes() -> None:
    sizes = measure.batch_sizes(1024, seed=3, quick=False)
    assert sizes == sorted(set(sizes))
    assert {*range(1, 18), 255, 256, 257, 512, 1024} <= set(sizes)
    assert len([size for size in sizes if 16 < size <= 300]) >= 32
    assert max(measure.batch_sizes(100, seed=3, quick=True)) <= 100


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_rounding_points_are_found_out(rng: np.random.Generator, dtype: str) -> None:
    """For every preset the audit finds, from results alone, what the preset's keywords say."""
    peers = [each.peer for each in run.find(("fusednorm",)) if isinstance(each.peer, Ours)]
    assert {peer.name for peer in peers} >= {f"fusednorm:{preset}" for preset in fusednorm.SEMANTICS}
    operands = random_operands(dtype, 128, 512, int(rng.integers(2**32)))
    for operation in (FUSED, NORM):
        results = audit_one(peers, operands, operation)
        for peer in peers:
            if operation.name not in peer.operations:
                assert peer.name not in results
                continue
            keywords = peer.fused if operation is FUSED else peer.norm
            s = {False: [], True: ["s"], "after_variance": ["s after variance"]}[keywords.get("round_sum", False)]
            expected = (*s, *(["y"] if keywords["cast_x_before_out_mul"] else []))
            result = results[peer.name]
            assert result.skipped is None
            assert result.nearest_points == expected
            assert result.differ[measure.NEAREST] < 1e-3 * operands.arrays["x"].size
            assert result.batch is not None
            assert result.batch.any_row_changes_at is None
            assert result.relative_time is not None
            assert result.relative_time > 0


def test_a_peer_that_fails_is_one_line() -> None:
    class Raises(Planted):
        def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
            raise RuntimeError("no kernel for this row length\nand more lines")

    class Widens(Planted):
        def fused_add_rmsnorm(self, x: Any, residual: Any, weight: Any, eps: float) -> tuple[Any, Any]:
            return x.astype(np.float32), x

    operands = random_operands("float16", 5, 16, seed=7)
    results = audit_one([Raises("raises", {}), Widens("widens", {}), Planted("clean", {})], operands)
    assert results["raises"].skipped == "RuntimeError: no kernel for this row length"
    assert results["widens"].skipped == "TypeError: the result is float32 of shape (5, 16)"
    assert results["clean"].differ["exact_rounded_sum"] == 0
    table = measure.Table("cpu", "random", FUSED.name, "float16", 5, 16, list(results.values()))
    assert "not run: RuntimeError: no kernel" in report.aligned(report.headings(table), report.cells(table))


def test_a_weight_that_1_plus_w_cannot_hold_is_refused() -> None:
    arrays = {"x": np.ones((1, 1), np.float32), "weight": np.full(1, 1e-9, np.float32)}
    assert "does not survive" in (Ours("gemma").refuses(Operands("", "float32", arrays)) or "")
    for dtype in SIXTEEN_BIT:
        assert Ours("gemma").refuses(hidden_operands(dtype)) is None
        assert Ours("gemma").refuses(random_operands(dtype, 1, 5000, seed=8)) is None


def test_torch_peers(request: pytest.FixtureRequest, threads: None) -> None:
    torch = pytest.importorskip("torch")
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    names = ["torch:hf", "torch:hf-fp32-sum", "torch:F.rms_norm"]
    if not any(each.absent for each in run.find(("transformers",))):
        names.append("transformers")
    found = run.find((BASE, *names))
    options = run.Options(rows=64, columns=256, dtypes=tuple(SIXTEEN_BIT), seed=9, quick=True, threads=1)
    told = run.audit(options, found, lambda done, total, text: None)
    assert told.threads == dict.fromkeys(told.threads, 1)
    tables = told.tables
    assert len(tables) == 2 * 2 * len(SIXTEEN_BIT)
    for table in tables:
        results = {result.peer: result for result in table.results}
        assert [name for name in names if name not in results] == (
            ["torch:hf-fp32-sum"] if table.operation == NORM.name else []
        )
        key = "exact" if table.operation == NORM.name else "exact_rounded_sum"
        assert results["torch:hf"].differ["hf_eager"] == 0
        for name in {"torch:hf", "transformers", BASE} & set(results):
            assert results[name].differ[key] < 2e-3 * table.elements, name
            assert results[name].differ["hf_eager"] < 2e-3 * table.elements, name
        if "transformers" in results:
            assert results["transformers"].differ["hf_eager"] == 0
        if "torch:hf-fp32-sum" in results:
            assert results["torch:hf-fp32-sum"].nearest_points == ("y",)
        expected = () if table.operation == NORM.name else ("s",)
        assert results["torch:F.rms_norm"].nearest_points == expected


# The report


@pytest.fixture(scope="module")
def small_report() -> run.Report:
    peers: list[Peer] = [Ours("hf_llama"), PlainNumpy(), Planted("late", {}, batch=7)]

    class Missing(Planted):
        def load(self) -> None:
            raise Absent("its library does not load")

    found = run.find(peers=[*peers, Missing("missing", {})])
    options = run.Options(rows=8, columns=64, dtypes=("float16",), seed=10, quick=True)
    return run.audit(options, found, lambda done, total, text: None)


def test_progress_counts_every_step() -> None:
    steps: list[tuple[int, int]] = []
    options = run.Options(rows=2, columns=8, dtypes=("float16", "float32"), seed=1, quick=True)
    found = run.find(peers=[PlainNumpy(), Planted("clean", {})])
    run.audit(options, found, lambda done, total, text: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(len(steps)))
    assert {total for _, total in steps} == {len(steps) - 1}


def test_text_report(small_report: run.Report) -> None:
    stream = io.StringIO()
    report.write(small_report, stream)
    text = stream.getvalue()
    assert "--seed 10" in text
    assert "float16, random, 8 x 64: of 512 elements" in text
    assert "float16, hidden states, 256 x 384: of 98,304 elements" in text
    assert "absent: missing (its library does not load)" in text
    assert '"from HF eager" is empty' in text
    tables = [part for part in text.split("\n\n") if part.startswith("float16, ")]
    assert len(tables) == 4
    for part in tables:
        lines = part.splitlines()
        rule = next(line for line in lines if line.startswith("---"))
        for line in lines[lines.index(rule) + 1 :]:  # aligned: no text between two columns
            assert all(line[i : i + 1] in ("", " ") for i, mark in enumerate(rule) if mark == " ")
        assert "from 7" in part
        assert "same bits" in part
    assert "\x1b" not in text


def test_terminal_report(small_report: run.Report) -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    report.write(small_report, stream)
    assert "hf_llama" in stream.getvalue()
    assert "─" in stream.getvalue()
    plain = io.StringIO()
    report.write(small_report, plain)
    assert "─" not in plain.getvalue()


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    silent = io.StringIO()
    with progress.progress_bar(silent) as bar:
        bar(1, 4, "a norm")
    assert silent.getvalue() == ""
    monkeypatch.setitem(sys.modules, "rich", None)
    shown = Terminal()
    with progress.progress_bar(shown) as bar:
        bar(1, 4, "a norm")
    assert f"[{'#' * 6}{'.' * 18}] 1/4 a norm" in shown.getvalue()
    assert shown.getvalue().endswith("\r")
    monkeypatch.undo()
    pytest.importorskip("rich")
    rich_shown = Terminal()
    with progress.progress_bar(rich_shown) as bar:
        bar(1, 4, "a norm")
    assert "1/4" in rich_shown.getvalue()


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(small_report: run.Report, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"audit.{ending}"
    plot.draw(small_report, path)
    content = path.read_bytes()
    assert len(content) > 10_000
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
