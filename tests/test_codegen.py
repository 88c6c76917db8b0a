"""What the compiler made of the sources: instructions that would change bits, fast math refused, no symbol exported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import build_c
import pytest
from test_c_programs import ARM_COMPILER, CONTRACTING, build_library

from fusednorm import _core

# Instructions that perform no single IEEE operation on fp32 lanes, on x86-64 and on AArch64: fused multiply-adds,
# approximations, and the conversion to bfloat16 that flushes subnormals.
FUSED = r"v?4?fn?m(add|sub)\w*|fmla\w*|fmls\w*|bfmlal\w*|bfdot|v?dpbf16ps|fcmla"
APPROXIMATE = r"v?(rcp|rsqrt)(14|28)?[ps]s|frecp[es]|frsqrt[es]|vexp2ps|vcvtne2?ps2bf16"
BIT_CHANGING = re.compile(f"{FUSED}|{APPROXIMATE}")

# Their presence shows that the norms were disassembled at all.
EXPECTED = {"x86_64": ["vmulps", "vaddps", "vcvtps2ph"], "aarch64": ["fmul", "fadd", "fcvtn"]}

FAST_MATH = "-ffast-math, or a part of it, changes results"


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: binutils)")
    return path


def instructions(binary: Path, objdump: str = "objdump") -> Counter[str]:
    """How often each mnemonic occurs in the code of a binary."""
    if sys.platform == "darwin":
        pytest.skip("objdump's text is read in the form that GNU binutils gives")
    command = [tool(objdump), "--disassemble", "--no-show-raw-insn", str(binary)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Counter(re.findall(r"^ +[0-9a-f]+:\t(?:(?:rep\w*|lock|data16|notrack) +)*([\w.]+)", text, re.MULTILINE))


def bit_changing(found: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in found.items() if BIT_CHANGING.fullmatch(name)}


def architecture(found: Counter[str]) -> str:
    return "x86_64" if found["vzeroupper"] or found["movq"] else "aarch64"


@pytest.fixture(scope="module")
def extension() -> Path:
    assert _core.__file__ is not None
    return Path(_core.__file__)


def test_the_extension_has_no_instruction_that_changes_bits(extension: Path) -> None:
    found = instructions(extension)
    assert all(found[name] for name in EXPECTED[architecture(found)]), "the norms are not in the disassembly"
    assert bit_changing(found) == {}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_flag_of_the_processor_brings_them_back(compiler: str) -> None:
    """-march=native has fused multiply-adds on every machine that runs the vector paths."""
    if not build_c.have_compiler(compiler):
        pytest.skip(f"{compiler} is not installed")
    found = instructions(build_library(CONTRACTING, compiler))
    assert all(found[name] for name in EXPECTED[architecture(found)]), "the norms are not in the disassembly"
    assert bit_changing(found) == {}


def test_aarch64_has_none() -> None:
    """There every processor has fused multiply-adds, so that no flag is needed to get them."""
    if not build_c.have_compiler(ARM_COMPILER):
        pytest.skip(f"{ARM_COMPILER} is not installed")
    found = instructions(build_library(["-O3"], ARM_COMPILER), objdump="aarch64-linux-gnu-objdump")
    assert all(found[name] for name in EXPECTED["aarch64"]), "the norms are not in the disassembly"
    assert bit_changing(found) == {}


FUSED_SOURCE = """
float fused(float a, float b, float c) { return a * b + c; }
void fused_rows(float *a, const float *b, int n) { for (int i = 0; i < n; i++) a[i] = b[i] * b[i] + a[i]; }
"""


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_fused_multiply_add_would_be_seen(compiler: str, tmp_path: Path) -> None:
    if not build_c.have_compiler(compiler):
        pytest.skip(f"{compiler} is not installed")
    source, binary = tmp_path / "fused.c", tmp_path / "fused.so"
    source.write_text(FUSED_SOURCE)
    command = [
        compiler,
        "-O3",
        "-march=native",
        "-ffp-contract=fast",
        "-shared",
        "-fPIC",
        str(source),
        "-o",
        str(binary),
    ]
    subprocess.run(command, check=True, capture_output=True)
    found = bit_changing(instructions(binary))
    if not found and "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    assert sum(found.values()) >= 2


def test_no_fused_multiply_add_is_called(extension: Path) -> None:
    command = [tool("nm"), "--dynamic", "--undefined-only", str(extension)]
    if sys.platform == "darwin":
        pytest.skip("nm has other options there")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    imported = {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert "PyErr_SetString" in imported or "PyErr_Format" in imported, "this is not the list of imported symbols"
    assert imported.isdisjoint({"fma", "fmaf", "fmal"})


def test_only_the_module_is_exported(extension: Path) -> None:
    """Another library's function of the same name, or ours in another library's place, would be silent."""
    if sys.platform == "darwin":
        pytest.skip("nm has other options there")
    command = [tool("nm"), "--dynamic", "--defined-only", str(extension)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert [line.split()[-1] for line in text.splitlines()] == ["PyInit__core"]


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_fast_math_is_refused(compiler: str, flag: str) -> None:
    if not build_c.have_compiler(compiler):
        pytest.skip(f"{compiler} is not installed")
    build_c.build_program("rsqrt_exhaustive", ["rsqrt_exhaustive.c"], compiler=compiler)
    with pytest.raises(build_c.BuildError, match=FAST_MATH):
        build_c.build_program("rsqrt_exhaustive", ["rsqrt_exhaustive.c"], [flag], compiler=compiler)


@pytest.mark.parametrize("flag", ["-ffinite-math-only", "-freciprocal-math", "-fno-signed-zeros"])
def test_a_part_of_fast_math_is_refused(flag: str) -> None:
    """gcc says which part is on; clang only that finite-math-only is."""
    if not build_c.have_compiler("gcc"):
        pytest.skip("gcc is not installed")
    with pytest.raises(build_c.BuildError, match=FAST_MATH):
        build_c.build_program("rsqrt_exhaustive", ["rsqrt_exhaustive.c"], [flag], compiler="gcc")


def test_wider_float_expressions_are_refused() -> None:
    if not build_c.have_compiler("gcc"):
        pytest.skip("gcc is not installed")
    with pytest.raises(build_c.BuildError) as refused:
        build_c.build_program("rsqrt_exhaustive", ["rsqrt_exhaustive.c"], ["-mfpmath=387"], compiler="gcc")
    if "unrecognized command-line option" in str(refused.value):
        pytest.skip("this processor has no wider registers")
    assert "must be evaluated in binary32" in str(refused.value)
