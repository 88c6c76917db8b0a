#!/usr/bin/env python3
"""Everything that needs a GPU, in one command, into one folder: python3 tools/gpu.py FOLDER

    build     the package, editable, for this machine's GPUs                                  build.txt
    test      the whole suite with CUDA, the exhaustive tests, arrays beyond 2^31 elements    tests.txt
    sanitize  compute-sanitizer's four tools over `pytest -m sanitizer`                       sanitizer.txt
    bench     python -m benchmarks.run --device cuda                                          cuda_*.txt and .json

summary.txt and summary.json say what ran, for how long, and how it ended; they are rewritten after each step. A step
that outlasts its share of the time is interrupted and keeps what it has, and the next one begins. The exit status is 0
if all that was asked for has passed. A goal that a benchmark misses is reported and fails nothing. Needs pytest, for
the benchmarks torch, of the Python that runs this file. FUSEDNORM_COMMIT names the commit where git cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "test", "sanitize", "bench")
# Seconds that are kept for what comes later.
RESERVED = {"build": 40, "suite": 60, "exhaustive": 45, "large": 30, "sanitize": 60, "bench": 150}
PARTS = {"build": ("build",), "test": ("suite", "exhaustive", "large"), "sanitize": ("sanitize",), "bench": ("bench",)}
MARKERS = {"suite": "not exhaustive and not large", "exhaustive": "exhaustive and not large", "large": "large"}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PACKAGES = ("numpy", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "jax", "ml_dtypes", "pytest", "hypothesis")
EVERY_S = 15.0  # a line on the terminal
GRACE_S = 20.0  # to write results after an interrupt
PASSED, FAILED, CANNOT, CUT = "passed", "FAILED", "could not run", "CUT SHORT"


@dataclass
class Outcome:
    name: str
    result: str
    seconds: float
    note: str = ""


def say(text: str) -> None:
    print(f"gpu.py: {text}", flush=True)


class Child:
    """A command in a process group of its own, its output in a file, and a deadline."""

    def __init__(self, name: str, words: list[str], log: Path, seconds: float, environment: dict[str, str]) -> None:
        self.name, self.log, self.cut = name, log, False
        self.started, self.deadline = time.monotonic(), time.monotonic() + seconds
        self.last, self.status, self.ended = "", -1, 0.0
        say(f"{name}: at most {seconds:.0f} s: {shlex.join(words)}")
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.log.open("a") as file:
            for line in self.process.stdout:
                file.write(line)
                file.flush()
                self.last = line.strip() or self.last
        self.ended = time.monotonic()

    def signal(self, number: signal.Signals) -> None:
        """To the command and to what it started, and to nothing else."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self) -> int:
        said = time.monotonic()
        try:
            while self.process.poll() is None:
                time.sleep(0.1)
                now = time.monotonic()
                if now - said >= EVERY_S:
                    said = now
                    say(f"{self.name}: {now - self.started:.0f} s: {self.last[:150]}")
                if not self.cut and now > self.deadline:
                    self.cut = True
                    say(f"{self.name}: out of time, interrupted")
                    self.signal(signal.SIGINT)
                elif self.cut and now > self.deadline + GRACE_S:
                    break
        finally:
            if self.cut or self.process.poll() is None:  # what a command started may outlive it, and use the GPU
                self.signal(signal.SIGKILL)
            self.status = self.process.wait()
            self.reader.join(5)
        return self.status

    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    def result(self) -> str:
        return CUT if self.cut else PASSED if self.status == 0 else FAILED


def output_of(words: list[str]) -> str:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def tool(name: str) -> str | None:
    """From the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    inside = [Path(home, "bin", name) for home in homes if home]
    return next((str(path) for path in inside if path.exists()), None) or shutil.which(name)


def commit() -> str:
    name = output_of(["git", "rev-parse", "--short=12", "HEAD"])
    if os.environ.get("FUSEDNORM_COMMIT") or not name:
        return os.environ.get("FUSEDNORM_COMMIT", "unknown (no git checkout)")
    return f"{name}, with uncommitted changes" if output_of(["git", "status", "--porcelain", "-uno"]) else name


def gpus() -> list[dict[str, str]]:
    fields = ("name", "compute_cap", "driver_version", "memory.total")
    answer = output_of(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    return [dict(zip(fields, (value.strip() for value in line.split(",")))) for line in answer.splitlines()]


def describe() -> dict[str, str]:
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    release = re.search(r"release [\d.]+, V[\d.]+", output_of([tool("nvcc") or "nvcc", "--version"]))
    return {
        "command": shlex.join(["python3", os.path.relpath(__file__), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": "; ".join(", ".join(gpu.values()) for gpu in gpus()) or "no GPU (nvidia-smi)",
        "nvcc": release.group() if release else "none",
        "versions": ", ".join(versions),
        "system": f"{platform.platform()}, {os.cpu_count()} processors",
    }


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder.resolve()
        self.started = time.monotonic()
        self.deadline = self.started + 60 * options.minutes
        self.head = describe()
        self.outcomes: list[Outcome] = []
        self.waiting = [part for step in STEPS for part in PARTS[step] if part in options.only]
        self.temporary = tempfile.TemporaryDirectory()
        self.folder.mkdir(parents=True, exist_ok=True)

    # ---- what is common ----

    def seconds_for(self, part: str) -> float:
        """All that is left but for what later parts need."""
        self.waiting = self.waiting[self.waiting.index(part) + 1 :]
        later = sum(RESERVED[other] for other in self.waiting)
        return max(20.0, self.deadline - time.monotonic() - later - GRACE_S)

    def begin(self, name: str) -> Path:
        """A file with the head alone, that a child's output follows."""
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in [*self.head_lines(), ""]))
        return path

    def head_lines(self) -> list[str]:
        width = max(map(len, self.head))
        return [f"{key:<{width}}  {value}" for key, value in self.head.items()]

    def ended(self, name: str, result: str, seconds: float, note: str = "") -> None:
        self.outcomes.append(Outcome(name, result, seconds, note))
        say(f"{name}: {result} after {seconds:.0f} s {note}".rstrip())
        self.write_summary()

    def write_summary(self) -> None:
        total = time.monotonic() - self.started
        lines = [*self.head_lines(), "", f"{'step':<12}{'result':<15}{'seconds':>7}"]
        lines += [f"{o.name:<12}{o.result:<15}{o.seconds:>7.0f}  {o.note}".rstrip() for o in self.outcomes]
        lines += ["", f"{total:.0f} s altogether"]
        (self.folder / "summary.txt").write_text("\n".join(lines) + "\n")
        content = {"head": self.head, "seconds": total, "steps": [asdict(o) for o in self.outcomes]}
        (self.folder / "summary.json").write_text(json.dumps(content, indent=1) + "\n")

    # ---- the steps ----

    def build(self) -> None:
        log = self.begin("build.txt")
        capabilities = sorted({gpu["compute_cap"].replace(".", "") for gpu in gpus()})
        environment = {"FUSEDNORM_CUDA": "1", "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count())}
        chosen = self.options.archs or os.environ.get("FUSEDNORM_CUDA_ARCHS") or ";".join(capabilities)
        if chosen:
            environment["FUSEDNORM_CUDA_ARCHS"] = chosen
        words = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", "."]
        seconds = self.seconds_for("build")
        child = Child("build", words, log, seconds, environment)
        note = f"for {chosen or 'the default architectures'}"
        if child.wait() and not child.cut:
            note += "; pip failed, setup.py build_ext --inplace instead"
            left = max(20.0, seconds - child.seconds())
            words = [sys.executable, "setup.py", "build_ext", "--inplace"]
            child = Child("build", words, log, left, environment)
            child.wait()
        code = "import fusednorm, json; print(json.dumps(fusednorm.info()))"
        info = output_of([sys.executable, "-c", code])
        result = child.result()
        if info:
            cuda = json.loads(info)["cuda"]
            self.head["fusednorm"] = info
            if not cuda.get("available"):
                result, note = FAILED, f"{note}; no CUDA in it: {cuda.get('reason')}"
        elif result == PASSED:
            result, note = FAILED, f"{note}; it can't be imported"
        self.ended("build", result, child.seconds(), note)

    def test(self) -> None:
        log = self.begin("tests.txt")
        for part in PARTS["test"]:
            if part in self.options.only:
                self.pytest(part, log)

    def pytest(self, part: str, log: Path) -> None:
        junit = Path(self.temporary.name) / f"{part}.xml"
        log.write_text(f"{log.read_text()}\n======== {part}\n")
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--durations=5"]
        words += ["-m", MARKERS[part], f"--junitxml={junit}"]
        workers = {"suite": self.options.workers, "exhaustive": min(4, self.options.workers), "large": 1}[part]
        if workers > 1 and importlib.util.find_spec("xdist"):
            words += ["-n", str(workers), "--dist", "worksteal"]
        child = Child(part, words, log, self.seconds_for(part), self.test_environment(workers))
        child.wait()
        counts, compared = counts_of(junit), elements_compared(log, part)
        result, notes = child.result(), [", ".join(f"{number} {word}" for word, number in counts.items() if number)]
        if child.status == 5 and not child.cut:  # pytest's status for no tests
            result, notes = CANNOT, ["no such test"]
        elif result == PASSED and not counts.get("passed"):
            result = CANNOT
        self.ended(part, result, child.seconds(), "; ".join(filter(None, [*notes, compared])))

    def test_environment(self, workers: int = 1) -> dict[str, str]:
        # The workers share the processors; JAX would take most of the GPU for itself.
        environment = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)),
            "OMP_WAIT_POLICY": "passive",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        if self.options.paths:
            environment["FUSEDNORM_TEST_PATHS"] = self.options.paths
        return environment

    def sanitize(self) -> None:
        """The four tools at the same time: each is one process that mostly waits for its own checks."""
        seconds, sanitizer = self.seconds_for("sanitize"), tool("compute-sanitizer")
        if not sanitizer:
            self.ended("sanitize", CANNOT, 0.0, "compute-sanitizer is not installed")
            return
        alone = ROOT / "tests" / "test_cuda_sanitizer.py"
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "sanitizer"]
        pytest.append(str(alone.relative_to(ROOT)) if alone.exists() else "tests")
        environment = {**self.test_environment(), "FUSEDNORM_TEST_PATHS": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        children = []
        for name in TOOLS:
            log = Path(self.temporary.name) / f"{name}.txt"
            words = [sanitizer, "--tool", name, "--error-exitcode", "9", *pytest]
            children.append(Child(name, words, log, seconds, environment))
        for child in children:
            child.wait()
        path = self.begin("sanitizer.txt")
        with path.open("a") as file:
            for child in children:
                text = child.log.read_text() if child.log.exists() else ""
                found = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", text)
                passed = re.findall(r"(\d+) passed", text)
                result = child.result()
                if result == PASSED and not (found and passed):
                    result = CANNOT
                note = "; ".join([*found[-1:], f"{passed[-1] if passed else 0} tests passed"])
                self.ended(child.name, result, child.seconds(), note)
                file.write(f"\n======== {child.name}: {result}, {note}\n{text}")

    def bench(self) -> None:
        seconds = self.seconds_for("bench")
        for old in self.folder.glob("cuda_*.json"):
            old.unlink()  # of an earlier run
        words = [sys.executable, "-m", "benchmarks.run", str(self.folder), "--device", "cuda", "--json"]
        words += ["--seconds", f"{max(20.0, 0.8 * seconds - 45):.0f}"]
        words += ["--quick"] if self.options.quick or seconds < 100 else []
        for peer in self.options.peer:
            words += ["--peer", str(peer.resolve())]
        log = Path(self.temporary.name) / "bench.txt"
        child = Child("bench", words, log, seconds, {"FUSEDNORM_COMMIT": self.head["commit"]})
        child.wait()
        result, notes = child.result(), []
        for path in sorted(self.folder.glob("cuda_*.json")):
            content = json.loads(path.read_text())
            met = [goal["met"] for goal in content["goals"]]
            notes.append(f"{path.stem}: {met.count(True)} goals met, {met.count(False)} missed")
            if "stopped" in content["head"]:
                notes.append(f"stopped {content['head']['stopped']}")
                result = CUT if result == PASSED else result
        if result == PASSED and not notes:
            result = FAILED
        if result != PASSED:
            notes.append(f"its output is in {shutil.copy(log, self.folder / 'bench.txt')}")
        self.ended("bench", result, child.seconds(), "; ".join(notes))


def counts_of(junit: Path) -> dict[str, int]:
    try:
        suites = ElementTree.parse(junit).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    counts = {"passed": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        other = {key: int(suite.get(key, "0")) for key in ("failures", "errors", "skipped")}
        counts["passed"] += int(suite.get("tests", "0")) - sum(other.values())
        for key, number in other.items():
            counts[key] += number
    return counts


def elements_compared(log: Path, part: str) -> str:
    """The lines of the suite's own section, of this part's output."""
    text = log.read_text().split(f"\n======== {part}\n")[-1]
    found = re.findall(r"^ *([\w-]+): +([\d,]+)$", text.split("elements compared bit for bit")[-1], re.MULTILINE)
    return "elements compared: " + ", ".join(f"{name} {number}" for name, number in found) if found else ""


def parse_arguments() -> argparse.Namespace:
    names = PARTS | {part: (part,) for part in PARTS["test"]}

    def parts(text: str) -> set[str]:
        wanted = [name for name in text.split(",") if name]
        for name in wanted:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(names)}")
        return {part for name in wanted for part in names[name]}

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the results go; made if it is not there")
    parser.add_argument("--only", type=parts, default=",".join(STEPS), metavar="STEPS", help=", ".join(names))
    parser.add_argument("--peer", type=Path, action="append", default=[], metavar="FILE", help="for benchmarks.run")
    parser.add_argument("--quick", action="store_true", help="the benchmarks: fewer shapes and turns")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="NUMBER", help="default: %(default)s")
    parser.add_argument("--archs", metavar="LIST", help="as FUSEDNORM_CUDA_ARCHS; default: this machine's GPUs")
    parser.add_argument("--paths", metavar="LIST", help="as FUSEDNORM_TEST_PATHS, such as cuda; default: all paths")
    workers = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="of pytest; default: %(default)s")
    return parser.parse_args()


def main() -> int:
    # Also where whoever started this ignores it, children must not: it is how they are told to finish.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run(parse_arguments())
    for line in run.head_lines():
        say(line)
    run.write_summary()
    for step in (step for step in STEPS if run.options.only.intersection(PARTS[step])):
        try:
            getattr(run, step)()
        except Exception as error:  # of this script or of the machine: the next step may still run
            run.ended(step, FAILED, 0.0, f"{type(error).__name__}: {error}")
    print((run.folder / "summary.txt").read_text())
    return 0 if all(outcome.result == PASSED for outcome in run.outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
