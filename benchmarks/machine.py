"""What a figure depends on besides the code: the head of every table."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fusednorm

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "ml_dtypes", "torch")
MEASURED = ("csrc", "fusednorm", "setup.py", "benchmarks")


def describe() -> dict[str, str]:
    info = fusednorm.info()
    cpu = info["cpu"]
    return {
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "fusednorm": f"{info['version']}, {info['compiler']}, path {cpu['path']} of {', '.join(cpu['available'])}, "
        f"threads by {cpu['threading']}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions(), " ".join(platform.libc_ver())]),
        "system": f"{platform.system()} {platform.release()}, transparent huge pages: {huge_pages()}",
        "processor": processor(),
        "caches": caches(),
        "load": load(),
    }


def command() -> str:
    words = sys.argv[:]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", spec.name] if spec else ["python", os.path.relpath(words[0])]
    return shlex.join([*start, *words[1:]])


def commit() -> str:
    if os.environ.get("FUSEDNORM_COMMIT"):  # a copy of a checkout may name it
        return os.environ["FUSEDNORM_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        name = git("rev-parse", "--short=12", "HEAD").strip()
        changed = git("status", "--porcelain", "--", *MEASURED).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
    return f"{name}, with uncommitted changes" if changed else name


def versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def processor() -> str:
    lines = dict(line.split(":", 1) for line in _read("/proc/cpuinfo").splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    virtual = ", virtual" if "hypervisor" in fields.get("flags", "").split() else ""
    return f"{name}{f' ({family})' if family else ''}, {available_cpus()} logical processors{virtual}"


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def caches() -> str:
    folder = "/sys/devices/system/cpu/cpu0/cache"
    found = []
    for index in range(8):
        level, kind, size = (_read(f"{folder}/index{index}/{name}") for name in ("level", "type", "size"))
        if level and kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "unknown"


def last_level_cache_bytes() -> int:
    """What the kernel says; 32 MiB where it says nothing. (The C library's sysconf can count a whole socket.)"""
    sizes = [_read(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") for index in range(8)]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(size[:-1]) * units[size[-1]] for size in sizes if size and size[-1] in units]
    return max(known, default=32 << 20)


def huge_pages() -> str:
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else "unknown"


def load() -> str:
    averages = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return f"{' '.join(f'{value:.2f}' for value in averages)} at the start (1, 5, 15 minutes)"


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process: with two, the idle threads of one slow the other."""
    paths = {line.split()[-1] for line in _read("/proc/self/maps").splitlines() if "omp" in line.rsplit("/", 1)[-1]}
    return sorted(Path(path).name for path in paths if ".so" in path)


def keep_freed_memory() -> str:
    """Tells glibc to keep what is freed, so that nobody's new results pay for page faults on each call."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "malloc as it is: results that are allocated may pay for page faults on each call"
    trim_threshold, mmap_max = -1, -4
    done = mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0)
    return "malloc keeps freed memory (mallopt): no page faults after the first call" if done else "malloc as it is"
