"""Instructions per call by callgrind, which do not depend on what else the machine does, and where they go.

A child process makes N and then 2 N calls of each kind under valgrind; what is shown is the difference, for one call.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .callgrind import Profile, read_all
from .machine import ROOT
from .native import native
from .progress import Progress
from .report import Report, Table
from .small_calls import EMPTY, SmallCall, small_calls

COLUMNS = 8
CALLS, QUICK_CALLS = 200, 50
LEAST_SHOWN = 0.004  # of a call's instructions
CHILD = "--child"


def absent() -> str | None:
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if not native().features()["callgrind"]:
        return "valgrind/callgrind.h is not installed"
    return None


def title(call: SmallCall, calls: int) -> str:
    return f"{call.group}|{call.name}|{calls}"


def child(calls: int) -> None:
    """Runs under valgrind."""
    import fusednorm

    fusednorm.set_num_threads(1)
    for call in small_calls(COLUMNS):
        with call.mode():
            for number in (calls, 2 * calls):
                c = call.call
                native().count(c.function, c.arguments, c.keywords, number, title(call, number))
    print(fusednorm.info()["cpu"]["path"])


def profiles(calls: int) -> tuple[dict[str, Profile], str]:
    """All dumps, and the path that ran under valgrind."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--instr-atstart=no",
            "--compress-strings=no",
            "--compress-pos=no",
            f"--callgrind-out-file={folder}/out",
            *[sys.executable, "-m", __spec__.name, CHILD, str(calls)],
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind's child failed:\n{done.stderr[-2000:]}")
        return read_all(Path(folder), "out"), done.stdout.strip()


def run(quick: bool, head: dict[str, str], progress: Progress) -> Report:
    reason = absent()
    if reason:
        return Report("instructions", dict(head), notes=[f"Not measured: {reason}."])
    calls = QUICK_CALLS if quick else CALLS
    progress(0, 1, "under valgrind, about half a minute")
    found, path = profiles(calls)
    progress(1, 1, "")
    head = {
        **head,
        "method": f"callgrind, 1 x {COLUMNS} float32, one thread; the difference between {2 * calls} and {calls} calls",
        "path": f"{path} under valgrind, which knows fewer instructions than the processor",
    }
    report = Report("instructions", head)
    report.notes = [
        "Instructions of one call in a C loop of PyObject_Vectorcall; the loop and the call itself included."
    ]
    overview = Table(f"1 x {COLUMNS}", ["arrays", "call", "instructions", "over empty"], text_columns=2)
    report.tables.append(overview)
    empty = 0.0
    for call in small_calls(COLUMNS):
        profile = found[title(call, 2 * calls)].minus(found[title(call, calls)])
        total = profile.total / calls
        if call.name == EMPTY:
            empty = total
        overview.rows.append([call.group or "none", call.name, f"{total:.0f}", f"{total - empty:.0f}"])
        parts = breakdown(profile, calls) if call.ours else []
        report.records.append(
            {
                "arrays": call.group,
                "call": call.name,
                "instructions": total,
                "over_empty": total - empty,
                "parts": parts,
            }
        )
        if parts:
            table = Table(
                f"{call.group}: {call.name}: {total:.0f} instructions",
                ["function", "inclusive", "self", "times called"],
            )
            table.rows = [
                [f"{'' if p['ours'] else '    '}{p['function']}", *[f"{p[k]:.0f}" for k in ("inclusive", "self")]]
                + [f"{p['calls']:.4g}"]
                for p in parts
            ]
            report.tables.append(table)
    report.notes.append(
        "In the breakdowns: the extension's own functions, and (indented) what they call outside of it."
    )
    return report


def breakdown(profile: Profile, calls: int) -> list[dict[str, Any]]:
    """The extension's functions, and those of other libraries as far as it calls them, by what they cost."""
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for function, cost in profile.inclusive.items():
        if _is_ours(function):
            count = sum(n for (_, callee), n in profile.calls.items() if callee == function)
            parts[function] = {"inclusive": cost, "self": profile.itself[function], "calls": count, "ours": True}
    for (caller, callee), cost in profile.called.items():
        if _is_ours(caller) and not _is_ours(callee):
            part = parts.setdefault(callee, {"inclusive": 0, "self": 0, "calls": 0, "ours": False})
            part["inclusive"] += cost
            part["calls"] += profile.calls[caller, callee]
            part["self"] = profile.itself[callee]
    least = LEAST_SHOWN * profile.total / calls
    shown = []
    for (library, name), part in parts.items():
        scaled = {key: part[key] / calls for key in ("inclusive", "self", "calls")}
        text = name if part["ours"] else f"{name.split('(')[0]} [{Path(library).name.split('.')[0]}]"
        if scaled["inclusive"] >= least:
            shown.append({"function": text[:90], "ours": part["ours"], **scaled})
    return sorted(shown, key=lambda part: -part["inclusive"])


def _is_ours(function: tuple[str, str]) -> bool:
    return "_core." in Path(function[0]).name


if __name__ == "__main__" and sys.argv[1:2] == [CHILD]:
    child(int(sys.argv[2]))
