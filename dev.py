#!/usr/bin/env python3
"""Sets up what fusednorm needs in .venv, next to this file, and runs its audit or its tests there.

    python3 dev.py audit     what every RMSNorm found here computes, compared with the exact result
    python3 dev.py test      the test suite

Needs Python 3.10 or newer with its headers, a C compiler and access to a package index; changes nothing outside .venv
and the built module. The second run reuses what the first one made.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fusednorm-dev.json"
CONSTRAINTS = VENV / "fusednorm-constraints.txt"

# Optional, since each is large. torch is pinned: its wheel decides how many gigabytes are fetched.
FRAMEWORKS = {"torch": "torch==2.13.0", "jax": "jax", "transformers": "transformers"}
# The compiler's settings are part of what was built.
BUILD_VARIABLES = (
    *("CC", "CFLAGS", "LDFLAGS", "FUSEDNORM_OPENMP", "FUSEDNORM_CUDA", "FUSEDNORM_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"),
    *("CUDAARCHS", "CUDA_HOME", "CUDA_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
)


class SetupError(Exception):
    """Something that the machine lacks, in words that say what to do about it."""


def say(text: str) -> None:
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def run(words: list[str], purpose: str) -> None:
    say(purpose)
    say(f"  $ {shlex.join(words)}")
    started = time.monotonic()
    # An index's or a user's setting must not send packages anywhere but to .venv.
    environment = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    status = subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode
    if status != 0:
        raise SetupError(f"{purpose}: failed with exit status {status}; what went wrong is printed above")
    say(f"  done in {time.monotonic() - started:.0f} s")


def pip_install(*words: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", "install", *words]


# ---- what has to be there ------------------------------------------------------------------------------------------


def check_machine() -> None:
    if os.name != "posix":
        raise SetupError("fusednorm builds on Linux and macOS only")
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise SetupError(
            f"the headers of this Python are missing: no Python.h in {include}. "
            "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    wanted = os.environ.get("CC") or str(sysconfig.get_config_var("CC") or "cc")
    if shutil.which(shlex.split(wanted)[0]):
        return
    if "CC" in os.environ:
        raise SetupError(f"no C compiler: CC is {wanted!r}, which is not on the PATH")
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            os.environ["CC"] = name
            return
    raise SetupError(
        "no C compiler: none of cc, gcc and clang is on the PATH. "
        "Install one (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc; macOS: xcode-select --install)"
    )


def make_venv() -> None:
    """An environment with pip in it, also where Python came without ensurepip or without pip."""
    if importlib.util.find_spec("ensurepip"):
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], "making .venv")
        return
    if not importlib.util.find_spec("venv"):
        raise SetupError("this Python has no venv module. Install it (Debian, Ubuntu: apt install python3-venv)")
    if not importlib.util.find_spec("pip"):
        raise SetupError(
            "this Python has neither ensurepip nor pip, so nothing can be installed into .venv. "
            "Install either (Debian, Ubuntu: apt install python3-venv)"
        )
    run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)], "making .venv (no ensurepip here)")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = subprocess.run([str(PYTHON), "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    # A target folder is allowed where the system's own Python refuses installs, and by every pip.
    run([sys.executable, "-m", "pip", "install", "--target", target, "pip"], "putting pip into .venv")


# ---- what was made, and whether it still holds ---------------------------------------------------------------------


def sources_digest() -> str:
    """Changes when the built module or the package's metadata could."""
    files = [ROOT / name for name in ("pyproject.toml", "setup.py", "tools/build_cuda.py", "fusednorm/_version.py")]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".c", ".h", ".cu", ".cuh")]
    digest = hashlib.sha256(repr([(name, os.environ.get(name)) for name in BUILD_VARIABLES]).encode())
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def module_identity() -> list[int]:
    """Size and time of the built module: another environment may build into the same folder."""
    path = ROOT / "fusednorm" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else []


def interpreter() -> str:
    return f"{Path(sys.executable).resolve()} {sys.version}"


def read_stamp() -> dict[str, object]:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and PYTHON.exists() else {}


def write_stamp(stamp: dict[str, object]) -> None:
    STAMP.write_text(json.dumps(stamp, indent=1) + "\n")


def build_requirements() -> list[str]:
    """[build-system] requires. A regular expression, since Python 3.10 has no tomllib."""
    found = re.search(r"^requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert found, "pyproject.toml has no [build-system] requires"
    return re.findall(r'"([^"]+)"', found[1])


def set_up(extra: str, frameworks: list[str], fresh: bool) -> None:
    check_machine()
    stamp = {} if fresh else read_stamp()
    if stamp.get("interpreter") != interpreter():
        make_venv()
        stamp = {"interpreter": interpreter(), "packages": []}
        write_stamp(stamp)
    packages = stamp["packages"]
    assert isinstance(packages, list)
    if "build" not in packages:
        run(pip_install(*build_requirements()), "installing the build's requirements")
        packages.append("build")
    if "torch" in frameworks and "torch" not in packages:
        run(pip_install(FRAMEWORKS["torch"]), "installing torch (large)")
        packages.append("torch")
    if "torch" in packages:  # nothing installed later may replace it
        CONSTRAINTS.write_text(FRAMEWORKS["torch"] + "\n")
    constraint = ["-c", str(CONSTRAINTS)] if "torch" in packages else []
    missing = [name for name in frameworks if name not in packages]
    if missing:
        words = pip_install(*constraint, *[FRAMEWORKS[name] for name in missing])
        run(words, f"installing {' and '.join(missing)}")
        packages += missing
    built = [sources_digest(), module_identity()]
    if stamp.get("built") != built or extra not in packages:
        stamp.pop("built", None)
        write_stamp(stamp)  # a build that fails half way is not taken for a finished one
        words = pip_install(*constraint, "--no-build-isolation", "--editable", f".[{extra}]")
        run(words, f"building fusednorm and installing what '{extra}' needs")
        packages.append(extra)
        stamp["built"] = [sources_digest(), module_identity()]
    write_stamp(stamp)


def describe() -> None:
    """One line on what was built. The settings of the build are only known to the module itself."""
    program = (
        "import fusednorm, json, sys; i = fusednorm.info(); c = i['cpu'];"
        "print(f\"fusednorm {i['version']}, {i['compiler']}, path {c['path']} of {', '.join(c['available'])},"
        " threads: {c['threading']}, {c['num_threads']}\")"
    )
    result = subprocess.run([str(PYTHON), "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(f"the built module cannot be used:\n{result.stderr}")
    say(result.stdout.strip())


# ---- the command line ----------------------------------------------------------------------------------------------


def frameworks_list(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in FRAMEWORKS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(FRAMEWORKS)}")
    return names


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{audit,test}")
    for name, tool, example in (
        ("audit", "python -m fusednorm audit", "dev.py audit --with torch --plot audit.svg"),
        ("test", "pytest", "dev.py test -k layouts -x"),
    ):
        command = commands.add_parser(
            name,
            help=f"set up, then {tool}",
            description=f"Sets up .venv, then runs {tool}. Other arguments go to it.",
            epilog=f"example: python3 {example}; the options of {tool}: python3 dev.py {name} -- --help",
            allow_abbrev=False,
        )
        command.add_argument(
            "--with",
            dest="frameworks",
            type=frameworks_list,
            default=[],
            metavar="NAMES",
            help=f"also install these, separated by commas (they stay): {', '.join(FRAMEWORKS)}",
        )
        command.add_argument("--fresh", action="store_true", help="make .venv anew")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = parser.parse_known_args(arguments[:split])
    return options, rest + arguments[split + 1 :]


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 (whatever runs this file is what the user has)
        print(f"dev.py: needs Python 3.10 or newer; this is {sys.version.split()[0]} ({sys.executable})")
        return 2
    options, rest = parse(sys.argv[1:])
    try:
        set_up(options.command, options.frameworks, options.fresh)
        describe()
    except SetupError as error:
        say(str(error))
        return 2
    if options.command == "audit":  # in the caller's folder, where its --plot and --json files belong
        words, folder = [str(PYTHON), "-m", "fusednorm", "audit", *rest], None
    else:
        words, folder = [str(PYTHON), "-m", "pytest", *rest], ROOT
    say(f"  $ {shlex.join(words)}")
    return subprocess.run(words, cwd=folder, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
