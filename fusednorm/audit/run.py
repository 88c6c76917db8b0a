"""Which peers and tables an audit has, and what comes out of it as one value."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np

import fusednorm

from .measure import OPERATIONS, Table, audit_operation
from .operands import missing_dtype, sources
from .peers import Absent, Peer, registry

JSON_SCHEMA = 1


@dataclass(frozen=True)
class Options:
    rows: int = 1024
    columns: int = 2048
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    data: tuple[str, ...] = ("random", "hidden")
    operations: tuple[str, ...] = tuple(OPERATIONS)
    peers: tuple[str, ...] = ()  # patterns of names; none: all
    seed: int = 0
    quick: bool = False
    threads: int | None = None  # of every package that can be told; None: as they are


@dataclass
class Found:
    """A peer of the registry; `absent` is the reason if it can't run here."""

    peer: Peer
    absent: str | None

    def as_json(self) -> dict[str, Any]:
        peer = self.peer
        version = "" if self.absent else peer.version()
        about = {"name": peer.name, "label": peer.label, "package": peer.package, "version": version}
        return {**about, "device": peer.device, "operations": list(peer.operations), "absent": self.absent}


@dataclass
class Report:
    options: Options
    found: list[Found]
    tables: list[Table]
    missing: list[str]  # what was asked for and can't be done here, in words
    threads: dict[str, int]  # package: threads of a call

    def as_json(self) -> dict[str, Any]:
        options = self.options
        return {
            "schema": JSON_SCHEMA,
            "fusednorm": fusednorm.info(),
            "numpy": np.__version__,
            "machine": {"processor": platform.machine(), "system": platform.system(), "threads": self.threads},
            "seed": options.seed,
            "quick": options.quick,
            "peers": [found.as_json() for found in self.found],
            "missing": self.missing,
            "tables": [table.as_json() for table in self.tables],
        }


def find(patterns: tuple[str, ...] = (), quick: bool = False, peers: list[Peer] | None = None) -> list[Found]:
    """The registry's peers that a pattern selects, with the reason where one can't run. Imports none of them."""
    selected = [
        peer
        for peer in (registry() if peers is None else peers)
        if not patterns or any(fnmatch(peer.name, pattern) or peer.name.startswith(pattern) for pattern in patterns)
    ]
    return [Found(peer, "left out by --quick" if quick and peer.slow else peer.available()) for peer in selected]


def audit(options: Options, found: list[Found], progress: Callable[[int, int, str], None]) -> Report:
    """Runs everything. `progress` is told (steps done, steps in all, what comes next)."""
    report = Report(options, found, [], [], {})
    dtypes = []
    for dtype in options.dtypes:
        reason = missing_dtype(dtype)
        if reason:
            report.missing.append(reason)
        else:
            dtypes.append(dtype)
    tables = len(options.data) * len(options.operations) * len(dtypes)
    present = [each for each in found if each.absent is None]
    total, done = len(present) + tables * (len(present) + 2), 0

    def tick(text: str) -> None:
        nonlocal done
        progress(done, total, text)
        done += 1

    for each in present:
        tick(f"load {each.peer.label}")
        try:
            each.peer.load()
        except Absent as reason_absent:
            each.absent = str(reason_absent)
            total -= tables
    peers = [each.peer for each in found if each.absent is None]
    for peer in peers:
        if options.threads is not None:
            peer.set_threads(options.threads)
        threads = peer.threads()
        if threads is not None:
            report.threads[peer.package] = threads
    make = sources(options.rows, options.columns, options.seed)
    for data in options.data:
        for operation in options.operations:
            for dtype in dtypes:
                operands = make[data](dtype)
                table = audit_operation(peers, OPERATIONS[operation], operands, options.seed, options.quick, tick)
                report.tables.append(table)
    progress(total, total, "done")
    return report
