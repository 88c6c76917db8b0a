"""Compiles the C programs and extension modules of tests/c with `cc`, or with $CC, and keeps the results in a cache.

`build_program("name", ["name.c", "csrc/dispatch.c"], ["-O3"])` gives the path of an executable,
`build_extension("stub_producer", ["stub_producer.c"])` an imported module. A source is looked for in tests/c, then from
the root of the repository. Results lie in one folder per user below the temporary folder, or in
$FUSEDNORM_TEST_CACHE, under a name that changes with the compiler, its options, the sources and every header.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

TESTS_C = Path(__file__).resolve().parent / "c"
ROOT = TESTS_C.parent.parent
WARNINGS = ["-Wall", "-Wextra", "-Wshadow"]
# The bits of the norms depend on the first two: ISO mode and no contraction into fused multiply-adds.
BASE_FLAGS = ["-std=c11", "-ffp-contract=off", "-O2", "-g", *WARNINGS]


class BuildError(RuntimeError):
    """The compiler is missing or refused a source; the text has the command and what the compiler said."""


def compiler_command(compiler: str | None = None) -> list[str]:
    """The compiler as a list of words: `compiler`, else $CC, else `cc`."""
    words = shlex.split(compiler or os.environ.get("CC") or "cc")
    if not words or shutil.which(words[0]) is None:
        raise BuildError(
            f"no C compiler: {words[0] if words else 'an empty name'!r} is not on the PATH; install one or set CC"
        )
    return words


def have_compiler(compiler: str | None = None) -> bool:
    """Whether `compiler`, $CC or `cc` can be run here."""
    try:
        compiler_command(compiler)
    except BuildError:
        return False
    return True


def have_python_headers() -> bool:
    """Whether extension modules can be compiled for this interpreter."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def build_program(
    name: str, sources: Sequence[str | Path], flags: Sequence[str] = (), *, compiler: str | None = None
) -> Path:
    """Compiles `sources` into an executable; `flags` follow the base flags, so that -O0 or -std=... wins over them."""
    return _build(name, sources, list(flags), compiler_command(compiler))


def build_extension(name: str, sources: Sequence[str | Path], flags: Sequence[str] = ()) -> ModuleType:
    """Compiles `sources` into an extension module for this interpreter and imports it, once per process."""
    if name in sys.modules:
        return sys.modules[name]
    if not have_python_headers():
        raise BuildError(f"no Python.h in {sysconfig.get_path('include')}: install this Python's development headers")
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    include = [f"-I{folder}" for folder in {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = _build(name, sources, ["-fPIC", *shared, *include, *flags], compiler_command(), suffix)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    return module


def stub_producer() -> ModuleType:
    """The array objects of tests/c/stub_producer.c, and its empty function `nothing`."""
    return build_extension("stub_producer", ["stub_producer.c", "stub_exchange.c"], ["-fvisibility=hidden"])


def _build(name: str, sources: Sequence[str | Path], flags: list[str], compiler: list[str], suffix: str = "") -> Path:
    paths = [_find(source) for source in sources]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{TESTS_C}"]
    libraries = [flag for flag in flags if flag.startswith(("-l", "-Wl,"))]  # the linker reads these in order
    others = [flag for flag in flags if flag not in libraries]
    command = [*compiler, *BASE_FLAGS, *includes, *others, *map(str, paths)]
    return cached(f"{name}{suffix}", command, paths, [*libraries, "-lm"])


def cached(name: str, command: list[str], sources: Sequence[Path], last: Sequence[str] = ()) -> Path:
    """The file that `command -o FILE last` makes of the sources, and what it said, in NAME.log beside that."""
    folder = cache_folder() / f"{name.split('.')[0]}-{_key([*command, *last], list(sources))}"
    output = folder / name
    if output.is_file():
        return output
    folder.mkdir(exist_ok=True)
    unfinished, log = (output.with_name(f"{output.name}{suffix}.{os.getpid()}") for suffix in ("", ".log"))
    whole = [*command, "-o", str(unfinished), *last]
    result = subprocess.run(whole, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise BuildError(f"{shlex.join(whole)}\nexited with {result.returncode}:\n{result.stdout}")
    log.write_text(result.stdout)
    os.replace(log, output.with_name(f"{output.name}.log"))
    os.replace(unfinished, output)  # another process that builds the same thing never sees half a file
    return output


def _find(source: str | Path) -> Path:
    for folder in (TESTS_C, ROOT):
        path = folder / source
        if path.is_file():
            return path
    raise BuildError(f"{source} is neither in {TESTS_C} nor in {ROOT}")


def _key(command: list[str], sources: list[Path]) -> str:
    digest = hashlib.sha256(repr((command, _compiler_version(command[0]))).encode())
    for path in [*sources, *_headers()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _headers() -> list[Path]:
    """Every header, and every source of csrc, since a source may include another one."""
    return sorted([*(ROOT / "csrc").rglob("*.[ch]"), *(ROOT / "csrc").rglob("*.cuh"), *TESTS_C.glob("*.h")])


@cache
def _compiler_version(program: str) -> str:
    return subprocess.run([program, "--version"], check=False, capture_output=True, text=True).stdout


@cache
def cache_folder() -> Path:
    given = os.environ.get("FUSEDNORM_TEST_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir(), f"fusednorm-tests-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's folder under our name: never run what lies there
        return Path(tempfile.mkdtemp(prefix="fusednorm-tests-"))
    return folder
