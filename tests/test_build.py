"""What the build decides: with CUDA or without, from which toolkit, for which GPUs, and what is compiled anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import build_c
import pytest

sys.path.insert(0, str(build_c.ROOT / "tools"))
import build_cuda

KNOWN = ["75", "80", "86", "90", "100", "103", "120"]
VARIABLES = ["FUSEDNORM_CUDA", *build_cuda.LISTS, "CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "NVCC_THREADS"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"]:
        monkeypatch.delenv(name, raising=False)


def make_nvcc(folder: Path, script: str) -> Path:
    """A program named nvcc in folder/bin."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# ---- which GPUs ----------------------------------------------------------------------------------------------------

LISTS = {
    "80": "80 80-ptx",
    "80;90": "80 90 90-ptx",
    "90,80": "80 90 90-ptx",
    " 8.0  9.0 ": "80 90 90-ptx",
    "10.0": "100 100-ptx",
    "100;90;80": "80 90 100 100-ptx",
    "90;90;9.0": "90 90-ptx",
    "8.0 9.0+PTX": "80 90 90-ptx",
    "8.0+PTX;9.0": "80 90 80-ptx",
    "80-real;90-real": "80 90",
    "80-real;90": "80 90",
    "80-real;90-virtual": "80 90-ptx",
    "120-ptx": "120-ptx",
    "90a": "90a",
    "80;90a": "80 90a 80-ptx",
    "90 90a": "90 90a 90-ptx",
    "100f;103a": "100f 103a",
}


@pytest.mark.parametrize("text", LISTS)
def test_list_of_architectures(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDNORM_CUDA_ARCHS", text)
    assert " ".join(build_cuda.architectures(KNOWN)) == LISTS[text]


def test_the_first_list_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in zip(reversed(build_cuda.LISTS), ("80", "86", "90")):
        monkeypatch.setenv(name, number)
        assert build_cuda.architectures(KNOWN)[0] == number
    monkeypatch.setenv("FUSEDNORM_CUDA_ARCHS", "")  # as if it were unset
    assert build_cuda.architectures(KNOWN)[0] == "86"


@pytest.mark.parametrize(
    "word", ["sm_90", "Hopper", "native", "9.0+", "9.0.0", "-1", "90b", "8.0+ptx", "90-real-virtual"]
)
def test_what_is_not_an_architecture(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDAARCHS", f"80;{word}")
    with pytest.raises(
        SystemExit, match=rf"CUDAARCHS is '80;{re.escape(word)}': '{re.escape(word)}' is not an arch.*80;90"
    ):
        build_cuda.architectures(KNOWN)


@pytest.mark.parametrize("word", ["70", "7.0", "130", "9", "101a"])
def test_an_architecture_that_nvcc_does_not_know(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"{word} 9.0")
    with pytest.raises(SystemExit, match=rf"TORCH_CUDA_ARCH_LIST: nvcc does not know '{word}': must be among 75, 80"):
        build_cuda.architectures(KNOWN)


def test_the_default_is_cut_to_what_nvcc_knows(capsys: pytest.CaptureFixture[str]) -> None:
    known = build_cuda.DEFAULT_ARCHITECTURES.split()
    assert build_cuda.architectures(known) == [*known, f"{known[-1]}-ptx"]
    assert capsys.readouterr().err == ""
    assert build_cuda.architectures(["50", "80", "86", "90"]) == ["80", "86", "90", "90-ptx"]
    assert "does not know 89, 100, 120: left out" in capsys.readouterr().err


def test_flags_of_architectures() -> None:
    assert build_cuda.generate_code(["80", "90a", "120", "120-ptx"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_sources_for_one_gpu_alone() -> None:
    """With machine code for compute capability 9.0, whatever else there is."""
    assert build_cuda.with_90a(["80", "90", "100", "100-ptx"]) == ["80", "90", "90a", "100", "100-ptx"]
    assert build_cuda.with_90a(["80", "90a", "80-ptx"]) == ["80", "90a", "80-ptx"]
    assert build_cuda.with_90a(["90", "90a", "90-ptx"]) == ["90", "90a", "90-ptx"]
    for names, wanted in ((["80", "90"], True), (["90a"], True), (["80", "90-ptx"], False), (["100"], False)):
        assert build_cuda.runs_90a(names) == wanted


# ---- which toolkit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value", [("FUSEDNORM_CUDA", "2"), ("FUSEDNORM_CUDA", "on"), ("FUSEDNORM_OPENMP", "yes")]
)
def test_wrong_switch(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=rf"{name} is '{value}': must be 0 \(off\), 1 \(required\) or unset"):
        build_cuda.switch(name)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_wrong_count(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(SystemExit, match=rf"MAX_JOBS is '{value}': must be a number"):
        build_cuda.count("MAX_JOBS", 2)
    monkeypatch.setenv("MAX_JOBS", "")
    assert build_cuda.count("MAX_JOBS", 2) == 2


def test_cuda_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FUSEDNORM_CUDA", "0")
    monkeypatch.setattr(build_cuda, "nvcc_candidates", lambda: pytest.fail("it looked for nvcc"))
    assert build_cuda.find_toolkit(["cc"]) is None
    assert "CUDA: off, because FUSEDNORM_CUDA=0" in capsys.readouterr().err


UNUSABLE = {
    "absent": (None, "no nvcc"),
    "too old": ("echo 'Cuda compilation tools, release 12.3, V12.3.107'", r"nvcc is 12\.3: must be 12\.4 or newer"),
    "broken": ("echo 'cannot execute cicc'; exit 1", "nvcc --version: cannot execute cicc"),
    "silent": ("true", "nvcc --version: no answer"),
    "alone": ("echo 'release 13.0, V13.0.88'", r"nvcc finds no libcudart_static\.a in .*lib64"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_toolkit(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, reason = UNUSABLE[what]
    nvcc = None if script is None else str(make_nvcc(tmp_path, script))
    monkeypatch.setattr(build_cuda, "nvcc_candidates", lambda: [("the place", nvcc)])
    assert build_cuda.find_toolkit(["cc"]) is None
    line = rf"no toolkit found that can be used: arrays on the CPU only\. Looked for:\n  the place: .*{reason}"
    assert re.search(line, capsys.readouterr().err)
    monkeypatch.setenv("FUSEDNORM_CUDA", "1")
    with pytest.raises(SystemExit, match=rf"FUSEDNORM_CUDA=1, but no CUDA toolkit.*\n  the place: .*{reason}"):
        build_cuda.find_toolkit(["cc"])


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    expected = [make_nvcc(tmp_path / name, "true") for name in ("home", "path", "bin")]
    expected.append(make_nvcc(site / "nvidia" / "cu13", "true"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin" / "bin"))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    found = [path for words, path in build_cuda.nvcc_candidates() if path and words != "/usr/local/cuda"]
    assert found[: len(expected)] == list(map(str, expected))


def test_a_named_place_without_nvcc_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toolkit = build_cuda.Toolkit("nvcc", (13, 0), [], "libcudart_static.a")
    monkeypatch.setattr(build_cuda, "nvcc_candidates", lambda: [("CUDA_HOME=/nowhere", None), ("the PATH", "nvcc")])
    monkeypatch.setattr(build_cuda, "read_toolkit", lambda nvcc: toolkit)
    monkeypatch.setattr(build_cuda, "try_toolkit", lambda toolkit, linker: None)
    assert build_cuda.find_toolkit(["cc"]) is toolkit
    assert "CUDA_HOME=/nowhere: no nvcc: passed over" in capsys.readouterr().err


# ---- what is compiled anew -----------------------------------------------------------------------------------------

COUNTING = 'for word; do last=$word; done; [ "$1" = --version ] || { echo run >> runs; cat state > "$last"; }'


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a kernel, a header and a program in nvcc's place that counts how often it compiles."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("csrc/numerics.h", "csrc/cuda/norm.cuh", "csrc/cuda/norm.cu", "state"):
        (tmp_path / name).write_text("")
    nvcc = str(make_nvcc(tmp_path, COUNTING))
    monkeypatch.chdir(tmp_path)

    def runs(*flags: str) -> int:
        before = len(Path("runs").read_text().split()) if Path("runs").exists() else 0
        name = build_cuda.compile_source([nvcc, *flags], "csrc/cuda/norm.cu", 1)
        assert Path(name).is_file()
        return len(Path("runs").read_text().split() if Path("runs").exists() else []) - before

    return runs


def test_objects_are_kept_while_nothing_changes(tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tree("-gencode=90") == 1
    assert tree("-gencode=90") == 0
    assert tree("-gencode=90", "-gencode=100") == 1
    assert tree("-gencode=90", "-gencode=100") == 0
    for name in ("csrc/numerics.h", "csrc/cuda/norm.cuh", "csrc/cuda/norm.cu"):
        Path(name).write_text("changed")
        assert tree("-gencode=90", "-gencode=100") == 1, name
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert tree("-gencode=90", "-gencode=100") == 1
    Path("build/cuda/norm.cu.o").unlink()
    assert tree("-gencode=90", "-gencode=100") == 1


def test_a_failure_is_not_kept(tree: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert tree() == 1
    Path("state").unlink()
    Path("csrc/numerics.h").write_text("changed")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"nvcc cannot compile csrc/cuda/norm\.cu"):
            tree()
        assert "state" in capfd.readouterr().err  # what it said
    Path("state").write_text("")
    assert tree() == 1


# ---- setup.py and a real nvcc --------------------------------------------------------------------------------------


def run_setup(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools", "77")
    if not (build_c.ROOT / "fusednorm" / "_version.py").is_file():
        pytest.skip("not the whole source tree")
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=build_c.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "name, value", [("FUSEDNORM_CUDA", "yes"), ("FUSEDNORM_OPENMP", "2"), ("MAX_JOBS", "none"), ("CC", "no-such-cc")]
)
def test_setup_refuses(name: str, value: str, tmp_path: Path) -> None:
    """Before anything is compiled."""
    environment = {"FUSEDNORM_CUDA": "0", "FUSEDNORM_OPENMP": "0", name: value}
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    result = run_setup("build_ext", *folders, **environment)
    assert result.returncode != 0
    assert re.search(rf"^fusednorm: .*{value}", result.stderr, re.MULTILINE), result.stderr
    assert not list(tmp_path.rglob("*.o"))


def test_other_settings_make_the_module_out_of_date(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", "77")
    sys.path.insert(0, str(build_c.ROOT))
    try:
        import setup
    finally:
        sys.path.pop(0)
    command = setup.BuildExtension(setuptools.Distribution())
    command.build_temp, command.nvcc = str(tmp_path), ["nvcc", "-gencode=90"]
    command.compiler = SimpleNamespace(compiler_so=["gcc"], linker_so=["gcc", "-shared"])
    extension = setuptools.Extension("fusednorm._core", ["a.c"])
    path = Path(command.settings_file(extension))
    os.utime(path, (1, 1))
    command.settings_file(extension)
    assert path.stat().st_mtime == 1, "nothing changed"
    for change in (
        lambda: command.nvcc.append("-gencode=100"),
        lambda: extension.sources.append("csrc/no_cuda.c"),
        lambda: command.compiler.compiler_so.append("-O1"),
        lambda: command.compiler.linker_so.append("-s"),
    ):
        change()
        os.utime(path, (1, 1))
        command.settings_file(extension)
        assert path.stat().st_mtime > 1


@pytest.fixture(scope="module")
def real() -> build_cuda.Toolkit:
    for _, nvcc in build_cuda.nvcc_candidates():
        toolkit = build_cuda.read_toolkit(nvcc) if nvcc else None
        if isinstance(toolkit, build_cuda.Toolkit):
            return toolkit
    pytest.skip("no nvcc here")


def linker() -> list[str]:
    return [*build_c.compiler_command(), "-shared"]


def test_a_real_toolkit_is_taken(real: build_cuda.Toolkit) -> None:
    assert build_cuda.try_toolkit(real, linker()) is None
    assert set(build_cuda.architectures(build_cuda.known_architectures(real))) >= {"80", "90"}
    assert any(Path(folder, "cuda_runtime_api.h").is_file() for folder in real.includes)


@pytest.mark.parametrize(
    "flags", ["-fmad=true", "-ftz=true", "--prec-div=false", "-prec-sqrt=false", "-Xcompiler=-O1 --fmad true"]
)
@pytest.mark.parametrize("name", ["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"])
def test_flags_that_change_bits(
    real: build_cuda.Toolkit, name: str, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that win over the build's are refused; those that lose change nothing."""
    monkeypatch.setenv(name, flags)
    if name == "NVCC_PREPEND_FLAGS":
        assert build_cuda.try_toolkit(real, linker()) is None
        return
    with pytest.raises(SystemExit, match=rf"of single IEEE operations in spite of .*{name}='{flags}'"):
        build_cuda.try_toolkit(real, linker())


@pytest.mark.parametrize("name", ["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"])
def test_fast_math_loses_or_is_refused(real: build_cuda.Toolkit, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc 13 gives the single switches of the build precedence over it; check_bits would see one that did not."""
    monkeypatch.setenv(name, "--use_fast_math")
    try:
        assert build_cuda.try_toolkit(real, linker()) is None
    except SystemExit as refused:
        assert "--use_fast_math" in str(refused)  # noqa: PT017 (either is right)
    with pytest.raises(SystemExit, match=r"makes .*\.ftz"):
        build_cuda.check_bits(fast_ptx(real))


def fast_ptx(real: build_cuda.Toolkit) -> str:
    source = build_c.cache_folder() / "fast.cu"
    source.write_text(build_cuda.PROBE)
    return build_c.cached("fast.ptx", [real.nvcc, "--use_fast_math", "-ptx", str(source)], [source]).read_text()
