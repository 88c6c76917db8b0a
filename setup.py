"""The build of the extension module fusednorm._core. Everything else about the package is in pyproject.toml.

Environment variables that it reads:
  CC, CFLAGS, LDFLAGS   as usual; the flags that decide bits come after CFLAGS and win
  FUSEDNORM_OPENMP      0: without OpenMP. 1: fail where OpenMP is missing. Unset: use it where it compiles and links
  FUSEDNORM_CUDA        0: without CUDA. 1: fail where no usable toolkit is found. Unset: use one where it is found
  FUSEDNORM_CUDA_ARCHS  the GPUs to compile for: "80;90", "8.0 9.0+PTX", "90a,120-virtual". Where it is unset,
                        TORCH_CUDA_ARCH_LIST, then CUDAARCHS, then DEFAULT_ARCHITECTURES of tools/build_cuda.py. The
                        newest gets PTX too, which a driver compiles for later GPUs, unless the list says what gets it.
                        90 brings 90a along, for the products that it alone can run
  CUDA_HOME, CUDA_PATH  a CUDA toolkit; then nvcc on the PATH, /usr/local/cuda, the packages of PyPI
  MAX_JOBS              how many source files are compiled at the same time (default: the number of processors)
  NVCC_THREADS          how many GPUs' code nvcc compiles at the same time, for each of these files
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

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))  # PEP 517 imports nothing from here by itself
import build_cuda
from build_cuda import count, say, switch

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
        # Python's own flags often have -g: two thirds of the module would be for a debugger.
        asked_for = os.environ.get("CFLAGS", "")
        defaults = [flag for flag, kind in (("-O3", "-O"), ("-g0", "-g")) if kind not in asked_for]
        host_flags = [*defaults, *compile_flags, *HOST_FLAGS]
        version = self.distribution.get_version()
        for extension in self.extensions:
            extension.extra_compile_args = host_flags
            extension.extra_link_args = [*link_flags, "-pthread"]
            extension.define_macros.append(("FN_VERSION", f'"{version}"'))
            self.add_cuda(extension)
            extension.depends.append(self.settings_file(extension))
        self.compiler.linker_so = [word for word in self.compiler.linker_so if word not in FLUSH_TO_ZERO]
        self.compile_host = self.compiler.compile
        self.compiler.compile = self.compile_sources
        super().build_extensions()

    def settings_file(self, extension: Extension) -> str:
        """A file that is newer than the module if the module was built with other settings."""
        path = Path(self.build_temp, "settings")
        text = repr([vars(extension), self.nvcc, self.compiler.compiler_so, self.compiler.linker_so])
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(path)

    def compile_sources(self, sources, output_dir=None, **options):
        """CCompiler.compile, one job per source. The one place to choose another compiler by a source's suffix."""
        objects = Path(output_dir or "")
        for source in sources:
            Path(objects, source).parent.mkdir(parents=True, exist_ok=True)  # before the threads, which would race

        def compile_one(source: str) -> list[str]:
            if source.endswith(".cu"):
                nvcc = self.nvcc_90a if source.endswith(build_cuda.ONLY_90A) else self.nvcc
                return [build_cuda.compile_source(nvcc, source, self.nvcc_threads)]
            more = dict(options)
            if source.startswith("csrc/cuda/"):
                system = [word for folder in self.toolkit.includes for word in ("-isystem", folder)]
                more["extra_postargs"] = [*(options.get("extra_postargs") or []), *system]
            return self.compile_host([source], output_dir=output_dir, **more)

        slowest_first = sorted(sources, key=lambda source: not source.endswith(".cu"))
        pool = ThreadPoolExecutor(jobs())
        try:
            return [name for names in pool.map(compile_one, slowest_first) for name in names]
        finally:  # after an error, what has not started never does
            pool.shutdown(cancel_futures=True)

    def add_cuda(self, extension: Extension) -> None:
        """The sources and flags of a build with CUDA, or csrc/no_cuda.c."""
        sources = sorted(glob("csrc/cuda/*.cu"))
        self.toolkit = build_cuda.find_toolkit(self.compiler.linker_so)
        if self.toolkit is None:
            self.nvcc = self.nvcc_90a = []
            extension.sources.append("csrc/no_cuda.c")
            return
        names = build_cuda.architectures(build_cuda.known_architectures(self.toolkit))
        say(f"CUDA: on ({self.toolkit.nvcc}, {'.'.join(map(str, self.toolkit.version))}), for {' '.join(names)}")
        self.nvcc = build_cuda.command_for(self.toolkit, names)
        self.nvcc_90a = build_cuda.command_for(self.toolkit, ["90a"])
        if build_cuda.runs_90a(names):
            extension.define_macros.append(("FN_MM_HOPPER", None))
            names = build_cuda.with_90a(names)
        else:
            sources = [name for name in sources if not name.endswith(build_cuda.ONLY_90A)]
        self.nvcc_threads = count("NVCC_THREADS", max(1, jobs() // max(1, len(sources))))
        extension.sources += [*sources, *sorted(glob("csrc/cuda/*.c"))]
        extension.define_macros.append(("FN_CUDA_ARCHITECTURES", f'"{" ".join(names)}"'))
        extension.extra_link_args += build_cuda.link_flags(self.toolkit)

    def find_openmp(self) -> tuple[list[str], list[str]]:
        wanted = switch("FUSEDNORM_OPENMP")
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


def host_sources() -> list[str]:
    """Of any build: add_cuda adds the others."""
    found = [name for folder in ("csrc", "csrc/cpu", "csrc/python") for name in sorted(glob(f"{folder}/*.c"))]
    return [name for name in found if name != "csrc/no_cuda.c"]


def jobs() -> int:
    return count("MAX_JOBS", os.cpu_count() or 1)


def headers() -> list[str]:
    return sorted(name for suffix in ("h", "cuh") for name in glob(f"csrc/**/*.{suffix}", recursive=True))


def main() -> None:
    os.chdir(Path(__file__).parent)
    extension = Extension(
        "fusednorm._core",
        sources=host_sources(),
        depends=["setup.py", "tools/build_cuda.py", *headers()],
        include_dirs=["csrc", numpy.get_include()],
        define_macros=[("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION")],
        libraries=["m"],
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    main()
