"""Builds the C programs of tests/c and runs them: over whole domains, with other compilers, sanitizers, and under qemu.

They need no Python, and state the contract in their own words: tests/c/norm_reference.h and tests/c/exact_dtypes.h.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import build_c
import helpers
import pytest

LIBRARY = [path.relative_to(build_c.ROOT) for path in sorted(build_c.ROOT.glob("csrc/*.c"))]
LIBRARY += [path.relative_to(build_c.ROOT) for path in sorted(build_c.ROOT.glob("csrc/cpu/*.c"))]
ERRORS = ["norm_errors", "mm_errors"]
DIGESTS = ["bits_digest", "mm_digest"]
PROGRAMS = ["rsqrt_exhaustive", "conversions_exhaustive", "norm_paths", "mm_paths", *ERRORS, *DIGESTS]
THREADS = ["-pthread"]
OPENMP = ["-fopenmp", *THREADS]
SEED = str(helpers.SEED % 2**32)

# Where a compiler would make fused multiply-adds if the base flags did not forbid it.
CONTRACTING = ["-O3", "-march=native", "-std=gnu11"]

ARM_COMPILER = "aarch64-linux-gnu-gcc"
ARM_EMULATORS = ["qemu-aarch64", "qemu-aarch64-static"]


@cache
def has_openmp(compiler: str | None = None) -> bool:
    try:
        build_c.build_program("rsqrt_exhaustive", ["rsqrt_exhaustive.c"], OPENMP, compiler=compiler)
    except build_c.BuildError:
        return False
    return True


def build_library(flags: Sequence[str] = (), compiler: str | None = None) -> Path:
    """The C half of the package as a shared object, compiled once for each compiler and flags."""
    flags = [*THREADS, *flags, "-shared", "-fPIC"]
    return build_c.build_program("libfusednorm.so", LIBRARY, flags, compiler=compiler)


def build(name: str, flags: Sequence[str] = (), compiler: str | None = None) -> Path:
    library = build_library(flags, compiler)
    return build_c.build_program(name, [f"{name}.c", library], [*THREADS, *flags], compiler=compiler)


def run(program: Path, *options: str, emulator: Sequence[str] = ()) -> str:
    """What the program prints; an AssertionError with its counterexample if it fails."""
    command = [*emulator, str(program), *options]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    print(result.stdout)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def count_elements(output: str, suffix: str = "") -> None:
    """Adds what norm_paths or mm_paths compared to the suite's count."""
    paths = re.search(r"^\w+_paths: paths ((?:\w+ )*\w+),", output)
    elements = re.search(r"(\d+) elements on each path", output)
    assert paths is not None
    assert elements is not None
    for path in paths[1].split():
        helpers.compared[path + suffix] += int(elements[1])


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if not build_c.have_compiler():
        pytest.skip("no C compiler: set CC or install one")


@pytest.fixture(scope="session")
def openmp() -> list[str]:
    return OPENMP if has_openmp() else []


# The programs, built as the package is


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_and_unknown_options(name: str, openmp: list[str]) -> None:
    program = build(name, openmp)
    assert "--threads" in run(program, "--help")
    refused = subprocess.run([program, "--no-such-option"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--no-such-option" in refused.stderr


@pytest.mark.parametrize("name", ERRORS)
def test_the_c_interface_refuses_wrong_calls(name: str, openmp: list[str]) -> None:
    assert "wrong calls refused" in run(build(name, openmp))


@pytest.mark.parametrize("name", ["rsqrt_exhaustive", "conversions_exhaustive", "norm_paths", "mm_paths"])
def test_sample(name: str, openmp: list[str]) -> None:
    output = run(build(name, openmp), "--sample", "--seed", SEED)
    if name.endswith("_paths"):
        count_elements(output)


@pytest.mark.parametrize("name", ["norm_paths", "mm_paths"])
def test_without_openmp(name: str) -> None:
    compiler = next(filter(build_c.have_compiler, ["gcc", "clang"]), None)
    output = run(build(name, ["-O3"], compiler), "--sample", "--seed", SEED)
    assert "threading none" in output
    count_elements(output)


@pytest.mark.exhaustive
def test_rsqrt_is_correctly_rounded_for_every_float(openmp: list[str]) -> None:
    assert f"{2**31 + 2**23 - 1} encodings, every non-negative float" in run(build("rsqrt_exhaustive", openmp))


@pytest.mark.exhaustive
def test_conversions_are_right_for_every_encoding(openmp: list[str]) -> None:
    output = run(build("conversions_exhaustive", openmp), "--seed", SEED)
    assert f"{2 * 2**32} fp32 encodings narrowed (all, to two types)" in output
    assert f"{2 * 2**16} 16-bit encodings widened" in output


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["norm_paths", "mm_paths"])
def test_every_path_follows_the_contract(name: str, openmp: list[str]) -> None:
    count_elements(run(build(name, openmp), "--seed", SEED))


# Other builds, whose bits must be the same


def digests(output: str) -> set[str]:
    found = re.findall(r"^digest \w+ ([0-9a-f]{16} \d+)$", output, re.MULTILINE)
    assert found, output
    return set(found)


@cache
def plain_digest(name: str, *options: str) -> str:
    """Of the build that the package has."""
    (digest,) = digests(run(build(name, OPENMP if has_openmp() else []), *options))
    return digest


@pytest.mark.parametrize("flags", [["-O0"], ["-O3"], CONTRACTING], ids=" ".join)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", DIGESTS)
def test_compilers_and_their_flags_move_no_bit(name: str, compiler: str, flags: list[str]) -> None:
    if not build_c.have_compiler(compiler):
        pytest.skip(f"{compiler} is not installed")
    assert digests(run(build(name, flags, compiler))) == {plain_digest(name)}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_digest_sees_other_values(name: str) -> None:
    assert plain_digest(name, "--seed", "2") != plain_digest(name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sanitizers are tried on Linux only")
@pytest.mark.parametrize("name", [*ERRORS, "norm_paths", "mm_paths", "conversions_exhaustive"])
def test_sanitizers_find_nothing(name: str) -> None:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
    try:
        program = build(name, flags)
    except build_c.BuildError as error:
        if "asan" not in str(error) and "ubsan" not in str(error):
            raise
        pytest.skip("the compiler has no sanitizer libraries")
    run(program, "--sample", "--seed", SEED)


# NEON


def arm_tools() -> tuple[str | None, list[str]]:
    """The compiler, None for the machine's own, and the emulator's command, empty where none is needed."""
    if platform.machine() in ("aarch64", "arm64"):
        return None, []
    emulator = next((name for name in ARM_EMULATORS if shutil.which(name)), None)
    missing = [] if build_c.have_compiler(ARM_COMPILER) else [ARM_COMPILER]
    missing += [] if emulator else [ARM_EMULATORS[0]]
    if missing or emulator is None:
        pytest.skip(f"not installed: {' and '.join(missing)} (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    command = [ARM_COMPILER, "-print-file-name=libc.so.6"]
    libc = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    if not libc.is_absolute():
        pytest.skip(f"{ARM_COMPILER} has no C library (Debian: libc6-dev-arm64-cross)")
    return ARM_COMPILER, [emulator, "-L", str(libc.resolve().parent.parent)]


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ERRORS])
def test_neon(name: str) -> None:
    compiler, emulator = arm_tools()
    program = build(name, ["-O3"], compiler)
    output = run(program, "--sample", *([] if name in DIGESTS else ["--seed", SEED]), emulator=emulator)
    if name != "rsqrt_exhaustive":
        assert "neon" in output
    if name.endswith("_paths"):
        count_elements(output, " under qemu" if emulator else "")
    if name in DIGESTS:
        assert digests(output) == {plain_digest(name, "--sample")}
