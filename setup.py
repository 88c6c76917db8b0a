"""The build of the extension module fusednorm._core. Everything else about the package is in pyproject.toml.

Environment variables that it reads:
  CC, CFLAGS, LDFLAGS   as usual; the flags that decide bits come after CFLAGS and win
  FUSEDNORM_OPENMP      0: without OpenMP. 1: fail where OpenMP is missing. Unset: use it where it compiles and links
  MAX_JOBS              how many source files are compiled at the same time (default: the number of processors)
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# One IEEE-754 operation per operation of the source: no contraction, no reassociation, NaN and -0 kept. The single
# switches are named too, since -fno-fast-math does not undo a switch that CFLAGS sets by its own name.
BIT_FLAGS = [
    "-std=c11",
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fno-finite-math-only",
    "-fsigned-zeros",
]
# gcc and clang answer these at link time with start-up code that sets flush-to-zero for the whole process.
FLUSH_TO_ZERO = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-mdaz-ftz"}
HOST_FLAGS = ["-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", *BIT_FLAGS]

INSTALL = "Install gcc and Python's headers (Debian, Ubuntu: gcc python3-dev; Fedora: gcc python3-devel)"

OPENMP_PROBE = """
#include <omp.h>
int fusednorm_probe(void) {
    int threads = 0;
#pragma omp parallel reduction(+ : threads)
    threads += omp_get_num_threads();
    return threads;
}
"""


def openmp_candidates() -> list[tuple[list[str], list[str]]]:
    """Compiler and linker flags to try, in order."""
    candidates = [(["-fopenmp"], ["-fopenmp"])]
    if sys.platform == "darwin":  # Apple's clang has no libomp of its own: Homebrew's, MacPorts', or on the usual paths
        for prefix in ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp", "/opt/local/libomp", "/usr/local"):
            compile_flags = ["-Xpreprocessor", "-fopenmp", f"-I{prefix}/include"]
            candidates.append((compile_flags, [f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib", "-lomp"]))
    return candidates


def say(text: str) -> None:
    print(f"fusednorm: {text}", file=sys.stderr, flush=True)


class BuildExtension(build_ext):
    """Compiles one object per source file, several at a time, then links them into one module."""

    def build_extensions(self) -> None:
        if self.compiler.compiler_type != "unix":
            raise SystemExit("fusednorm: needs gcc or clang: no other compiler's flags are known to keep its bits")
        compiler = self.compiler.compiler_so[0]
        if shutil.which(compiler) is None:
            raise SystemExit(f"fusednorm: no C compiler: {compiler!r} is not on the PATH. {INSTALL}")
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise SystemExit(f"fusednorm: no Python.h in {sysconfig.get_path('include')}. {INSTALL}")
        compile_flags, link_flags = self.find_openmp()
        host_flags = [*compile_flags, *HOST_FLAGS]
        if "-O" not in os.environ.get("CFLAGS", ""):
            host_flags.insert(0, "-O3")
        version = self.distribution.get_version()
        for extension in self.extensions:
            extension.extra_compile_args = host_flags
            extension.extra_link_args = [*link_flags, "-pthread"]
            extension.define_macros.append(("FN_VERSION", f'"{version}"'))
        self.compiler.linker_so = [word for word in self.compiler.linker_so if word not in FLUSH_TO_ZERO]
        self.compile_host = self.compiler.compile
        self.compiler.compile = self.compile_sources
        super().build_extensions()

    def compile_sources(self, sources, output_dir=None, **options):
        """CCompiler.compile, one job per source. The one place to choose another compiler by a source's suffix."""
        for name in self.compiler.object_filenames(sources, output_dir=output_dir or ""):
            Path(name).parent.mkdir(parents=True, exist_ok=True)  # before the threads, which would race to make it
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            compiled = pool.map(lambda source: self.compile_host([source], output_dir=output_dir, **options), sources)
            return [name for names in compiled for name in names]

    def find_openmp(self) -> tuple[list[str], list[str]]:
        wanted = os.environ.get("FUSEDNORM_OPENMP", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"fusednorm: FUSEDNORM_OPENMP is {wanted!r}: must be 0 (off), 1 (required) or unset")
        if wanted == "0":
            say("OpenMP: off, because FUSEDNORM_OPENMP=0: every call runs on one thread")
            return [], []
        for compile_flags, link_flags in openmp_candidates():
            if self.compiles_and_links(compile_flags, link_flags):
                say(f"OpenMP: on ({' '.join(compile_flags)})")
                return compile_flags, link_flags
        if wanted == "1":
            raise SystemExit("fusednorm: FUSEDNORM_OPENMP=1, but no program with OpenMP compiles and links here")
        say("OpenMP: not found: every call runs on one thread. gcc brings it; clang needs libomp (Debian: libomp-dev)")
        return [], []

    def compiles_and_links(self, compile_flags: list[str], link_flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(OPENMP_PROBE)
            commands = [
                [*self.compiler.compiler_so, "-c", str(source), "-o", f"{folder}/probe.o", *compile_flags],
                [*self.compiler.linker_so, f"{folder}/probe.o", "-o", f"{folder}/probe.so", *link_flags],
            ]
            return all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)


os.chdir(Path(__file__).parent)
setup(
    ext_modules=[
        Extension(
            "fusednorm._core",
            sources=[name for folder in ("csrc", "csrc/cpu", "csrc/python") for name in sorted(glob(f"{folder}/*.c"))],
            depends=["setup.py", *sorted(glob("csrc/**/*.h", recursive=True))],
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION")],
            libraries=["m"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
