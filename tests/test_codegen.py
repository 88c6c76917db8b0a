"""What the compiler made of the sources: instructions that would change bits, fast math refused, no symbol exported."""

from __future__ import annotations

import platform
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

# Instructions that perform no single IEEE operation on fp32 lanes, on x86-64 and on AArch64: fused multiply-adds or
# calls of the C library's, approximations, and the conversion to bfloat16 that flushes subnormals.
FUSED = r"v?4?fn?m(add|sub)\w*|fmla\w*|fmls\w*|bfmlal\w*|bfdot|v?dpbf16ps|fcmla|fma[fl]?"
APPROXIMATE = r"v?(rcp|rsqrt)(14|28)?[ps]s|frecp[es]|frsqrt[es]|vexp2ps|vcvtne2?ps2bf16"
BIT_CHANGING = re.compile(f"{FUSED}|{APPROXIMATE}")

# The kernels of products, and they alone, multiply and add in one operation, and ask for it by name. The functions of
# their files are static but one: of a function that is not, a linker does not keep the file.
PRODUCT_FILES = re.compile(r"mm_dtype_(scalar|avx2|avx512|neon)\.c")
PRODUCT_FUNCTION = "fn_mm_scalar"
MULTIPLY_ADD = re.compile(r"vfmadd\d{3}[ps]s|fmla|fmadd|fmaf")

# Two multiply-adds that flush subnormals: in the functions that know where none can occur, and in them alone.
PAIRS_FILE, PAIRS_FUNCTION, PAIRS = "mm_dtype_avx512.c", "pairs_", "vdpbf16ps"

# Their presence shows that the norms were disassembled at all.
EXPECTED = {"x86_64": ["vmulps", "vaddps", "vcvtps2ph"], "aarch64": ["fmul", "fadd", "fcvtn"]}

FAST_MATH = "-ffast-math, or a part of it, changes results"

Code = dict[tuple[str, str], Counter[str]]  # by source file, "" where it is not known, and function


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: binutils)")
    return path


def run_objdump(objdump: str, *arguments: str) -> str:
    if sys.platform == "darwin":
        pytest.skip("objdump's text is read in the form that GNU binutils gives")
    return subprocess.run([tool(objdump), *arguments], check=True, capture_output=True, text=True).stdout


def source_files(binary: Path, objdump: str) -> dict[int, str]:
    """By address: the file of each static function. A file's symbols follow its name."""
    text, files, file = run_objdump(objdump, "--syms", str(binary)), {}, ""
    for address, flags, name in re.findall(
        r"^([0-9a-f]+) (.{7}) \S+\t[0-9a-f]+ +(?:\.\w+ )?(\S*)$", text, re.MULTILINE
    ):
        if flags.endswith("f"):
            file = Path(name).name
        elif flags.startswith("l") and flags.endswith("F"):
            files[int(address, 16)] = file
    if not files:
        pytest.skip(f"{binary} has no symbols: it was stripped")
    return files


def instructions(binary: Path, objdump: str = "objdump") -> Code:
    """How often each mnemonic occurs in each function of a binary. A call of fmaf() also counts as one of "fmaf"."""
    files, found = source_files(binary, objdump), Code()
    key = ("", "")
    for line in run_objdump(objdump, "--disassemble", "--no-show-raw-insn", str(binary)).splitlines():
        label = re.match(r"([0-9a-f]+) <(.+)>:$", line)
        if label:
            key = files.get(int(label[1], 16), ""), label[2]
            continue
        instruction = re.match(r" +[0-9a-f]+:\t(?:(?:rep\w*|lock|data16|notrack) +)*([\w.]+)(.*)", line)
        if instruction is None or key[1].endswith("@plt"):
            continue
        names = found.setdefault(key, Counter())
        names[instruction[1]] += 1
        names.update(re.findall(r"<(fma[fl]?)\b", instruction[2]))
    return found


def is_product(file: str, function: str) -> bool:
    return bool(PRODUCT_FILES.fullmatch(file)) or function.split(".")[0] == PRODUCT_FUNCTION


def bit_changing(code: Code) -> dict[str, list[str]]:
    """What must not be there, by function."""
    wrong: dict[str, list[str]] = {}
    for (file, function), names in code.items():
        seen = {name for name in names if BIT_CHANGING.fullmatch(name)}
        if is_product(file, function):
            seen = {name for name in seen if not MULTIPLY_ADD.fullmatch(name)}
        if file == PAIRS_FILE and function.startswith(PAIRS_FUNCTION):
            seen.discard(PAIRS)
        if seen:
            wrong[f"{file}: {function}"] = sorted(seen)
    return wrong


def together(code: Code) -> Counter[str]:
    return sum(code.values(), Counter())


def check_code(code: Code) -> None:
    found = together(code)
    architecture = "x86_64" if found["vzeroupper"] or found["movq"] else "aarch64"
    assert all(found[name] for name in EXPECTED[architecture]), "the norms are not in the disassembly"
    products = together({key: names for key, names in code.items() if is_product(*key)})
    assert any(MULTIPLY_ADD.fullmatch(name) for name in products), "the products are not in the disassembly"
    assert bool(products[PAIRS]) == (architecture == "x86_64")
    assert bit_changing(code) == {}


@pytest.fixture(scope="module")
def extension() -> Path:
    assert _core.__file__ is not None
    return Path(_core.__file__)


def test_the_extension_has_no_instruction_that_changes_bits(extension: Path) -> None:
    check_code(instructions(extension))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_flag_of_the_processor_brings_them_back(compiler: str) -> None:
    """-march=native has fused multiply-adds on every machine that runs the vector paths."""
    if not build_c.have_compiler(compiler):
        pytest.skip(f"{compiler} is not installed")
    check_code(instructions(build_library(CONTRACTING, compiler)))


def test_aarch64_has_none() -> None:
    """There every processor has fused multiply-adds, so that no flag is needed to get them."""
    if not build_c.have_compiler(ARM_COMPILER):
        pytest.skip(f"{ARM_COMPILER} is not installed")
    check_code(instructions(build_library(["-O3"], ARM_COMPILER), objdump="aarch64-linux-gnu-objdump"))


FUSED_SOURCE = """
#include <math.h>
#define FUNCTION static __attribute__((noinline, used))
FUNCTION float fused(float a, float b, float c) { return a * b + c; }
FUNCTION void fused_rows(float *a, const float *b, int n) { for (int i = 0; i < n; i++) a[i] = b[i] * b[i] + a[i]; }
FUNCTION void called(float *a, const float *b, int n) { for (int i = 0; i < n; i++) a[i] = CALLED(b[i], b[i], a[i]); }
#if defined(NAME)
float NAME(float *a, const float *b) { return CALLED(*a, *b, 1); }
#endif
"""


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_fused_multiply_add_would_be_seen(compiler: str, tmp_path: Path) -> None:
    """As an instruction or a call, in all files but those of products; in double precision or subtracted, there too."""
    if not build_c.have_compiler(compiler):
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, "-O3", "-march=native", "-fPIC"]
    contract, call = "-ffp-contract=fast", ["-ffp-contract=off", "-fno-builtin"]
    sources = {
        "rms_norm_avx2.c": [contract, "-DCALLED=fmaf", "-DNAME=fn_norm"],
        "mm_dtype.c": [*call, "-DCALLED=fmaf"],
        "mm_dtype_avx2.c": [contract, "-DCALLED=fmaf", "-DNAME=fn_mm_scalar"],
        "mm_dtype_avx512.c": [contract, "-DCALLED(a,b,c)=(a)*(b)-(c)"],
        "mm_dtype_scalar.c": [*call, "-DCALLED=fma"],
    }
    for name, flags in sources.items():
        (tmp_path / name).write_text(FUSED_SOURCE)
        subprocess.run([*command, *flags, "-c", name, "-o", name + ".o"], cwd=tmp_path, check=True, capture_output=True)
    objects = [name + ".o" for name in sources]
    subprocess.run([compiler, "-shared", *objects, "-o", "fused.so", "-lm"], cwd=tmp_path, check=True)
    found = bit_changing(instructions(tmp_path / "fused.so"))
    if "rms_norm_avx2.c: fused" not in found and "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    wrong = {f"rms_norm_avx2.c: {name}" for name in ("fused", "fused_rows", "called")}
    wrong |= {": fn_norm", "mm_dtype.c: called", "mm_dtype_avx512.c: called", "mm_dtype_scalar.c: called"}
    assert set(found) == wrong, found


PAIRS_SOURCE = """
#include <immintrin.h>
#define FUNCTION __attribute__((noinline, used)) static
FUNCTION void pairs_1(__m512 *c, __m512bh a, __m512bh b) { *c = _mm512_dpbf16_ps(*c, a, b); }
FUNCTION void exact_1(__m512 *c, __m512bh a, __m512bh b) { *c = _mm512_dpbf16_ps(*c, a, b); }
"""


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_product_of_pairs_would_be_seen_elsewhere(compiler: str, tmp_path: Path) -> None:
    if not build_c.have_compiler(compiler) or platform.machine() != "x86_64":
        pytest.skip(f"needs {compiler} on x86-64")
    for name in ("mm_dtype_avx512.c", "mm_dtype_avx2.c"):
        (tmp_path / name).write_text(PAIRS_SOURCE)
    command = [compiler, "-O3", "-mavx512bf16", "-mavx512vl", "-fPIC", "-shared", "-o", "pairs.so"]
    subprocess.run([*command, "mm_dtype_avx512.c", "mm_dtype_avx2.c"], cwd=tmp_path, check=True, capture_output=True)
    found = bit_changing(instructions(tmp_path / "pairs.so"))
    assert set(found) == {"mm_dtype_avx512.c: exact_1", "mm_dtype_avx2.c: exact_1", "mm_dtype_avx2.c: pairs_1"}


def test_no_other_fused_multiply_add_is_imported(extension: Path) -> None:
    """The scalar product calls fmaf(), as the tests above see."""
    command = [tool("nm"), "--dynamic", "--undefined-only", str(extension)]
    if sys.platform == "darwin":
        pytest.skip("nm has other options there")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    imported = {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert "PyErr_SetString" in imported or "PyErr_Format" in imported, "this is not the list of imported symbols"
    assert imported.isdisjoint({"fma", "fmal"})


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
