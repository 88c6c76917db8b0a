"""Which peers and tables an audit has, and what comes out of it as one value."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

import fusednorm

from .measure import OPERATIONS, Mixed, Table, audit_operation, with_fp32_weight
from .operands import Shape, missing_dtype, random_factors, shape_text, sources
from .peer_files import joined
from .peers import Absent, Peer, registry
from .products import (
    PRODUCT,
    QUICK_ROWS,
    ROWS,
    SHAPES,
    ProductTable,
    audit_product,
    product_dtypes,
)
from .trial import Job, Trials, run_trials

JSON_SCHEMA = 3


@dataclass(frozen=True)
class Options:
    rows: int = 1024
    columns: int = 2048
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    data: tuple[str, ...] = ("random", "hidden")
    operations: tuple[str, ...] = (*OPERATIONS, PRODUCT)
    products: tuple[Shape, ...] = SHAPES
    peers: tuple[str, ...] = ()  # patterns of names; none: all
    files: tuple[Path, ...] = ()  # of --peer
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
        declares = {operation: list(points) for operation, points in peer.declares.items()}
        more = {"device": peer.device, "operations": list(peer.operations), "declares": declares}
        return {**about, **more, "absent": self.absent}


@dataclass
class Report:
    options: Options
    found: list[Found]
    tables: list[Table]
    missing: list[str]  # what was asked for and can't be done here, in words
    threads: dict[str, int]  # package: threads of a call
    products: list[ProductTable] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)  # other than the CPU: name and software, in words

    def as_json(self) -> dict[str, Any]:
        options = self.options
        return {
            "schema": JSON_SCHEMA,
            "fusednorm": fusednorm.info(),
            "numpy": np.__version__,
            "machine": {"processor": platform.machine(), "system": platform.system(), "threads": self.threads},
            "devices": self.devices,
            "seed": options.seed,
            "quick": options.quick,
            "peers": [found.as_json() for found in self.found],
            "missing": self.missing,
            "tables": [table.as_json() for table in self.tables],
            "products": [table.as_json() for table in self.products],
        }


def find(
    patterns: tuple[str, ...] = (),
    quick: bool = False,
    peers: list[Peer] | None = None,
    devices: tuple[str, ...] = ("cpu",),
    files: tuple[Path, ...] = (),
) -> list[Found]:
    """The registry's peers and the files', or `peers`, that a pattern selects, with the reason where one can't run.

    Imports none of their packages.
    """
    selected = [
        peer
        for peer in (joined(registry(devices), files, devices) if peers is None else peers)
        if not patterns or any(fnmatch(peer.name, pattern) or peer.name.startswith(pattern) for pattern in patterns)
    ]
    return [Found(peer, "left out by --quick" if quick and peer.slow else peer.available()) for peer in selected]


class Audit:
    """One run, step by step; `tick` tells `progress` (steps done, steps in all, what comes next)."""

    def __init__(self, options: Options, found: list[Found], progress: Callable[[int, int, str], None]) -> None:
        self.options, self.progress = options, progress
        self.report = Report(options, found, [], [], {})
        self.lost: dict[str, str] = {}  # devices that an error has ended
        self.dtypes: list[str] = []
        for dtype in options.dtypes:
            reason = missing_dtype(dtype)
            if reason:
                self.report.missing.append(reason)
            else:
                self.dtypes.append(dtype)
        self.norm_operations = [name for name in options.operations if name in OPERATIONS]
        self.factors = [(shape, dtype) for shape in options.products for dtype in product_dtypes(self.dtypes)]
        self.done = 0
        present = self.present()
        self.total = len(present) + sum(peer.risky for peer in present) + self.steps(present)

    def present(self) -> list[Peer]:
        return [each.peer for each in self.report.found if each.absent is None]

    def norms(self, peers: list[Peer]) -> list[Peer]:
        return [peer for peer in peers if any(name in peer.operations for name in self.norm_operations)]

    def products(self, peers: list[Peer]) -> list[Peer]:
        return [peer for peer in peers if PRODUCT in peer.operations] if PRODUCT in self.options.operations else []

    def steps(self, peers: list[Peer]) -> int:
        """Of all that follows the loading."""
        norms, products = self.norms(peers), self.products(peers)
        tables = len(self.options.data) * len(self.norm_operations) * len(self.dtypes)
        each = len(norms) + 1 + len({peer.device for peer in norms}) if norms else 0
        return tables * each + self.has_mixed(norms) + len(self.factors) * len(products)

    def has_mixed(self, norms: list[Peer]) -> bool:
        return "bfloat16" in self.dtypes and any(peer.device != "cpu" for peer in norms)

    def tick(self, text: str) -> None:
        self.progress(self.done, self.total, text)
        self.done += 1

    def run(self) -> Report:
        trials = self.try_risky()
        self.load()
        peers = self.present()
        self.total = self.done + self.steps(peers)
        norms, products = self.norms(peers), self.products(peers)
        if norms:
            self.audit_norms(norms, trials)
        if products:
            self.audit_products(products, trials)
        self.progress(self.total, self.total, "done")
        return self.report

    def audit_norms(self, peers: list[Peer], trials: Trials) -> None:
        options = self.options
        make = sources(options.rows, options.columns, options.seed)
        for data in options.data:
            for operation in self.norm_operations:
                for dtype in self.dtypes:
                    self.report.tables += audit_operation(
                        peers,
                        OPERATIONS[operation],
                        make[data](dtype),
                        options.seed,
                        options.quick,
                        self.tick,
                        {
                            (peer.device, peer.name): refused
                            for peer in peers
                            if (refused := trials.refused(peer, operation, data, dtype))
                        },
                        self.lost,
                    )
        if self.has_mixed(peers):
            self.tick("bfloat16 with an fp32 weight")
            self.try_fp32_weights(peers, trials)

    def audit_products(self, peers: list[Peer], trials: Trials) -> None:
        options = self.options
        for shape, dtype in self.factors:
            refused = {
                (peer.device, peer.name): trials.refused(peer, PRODUCT, shape_text(shape), dtype) for peer in peers
            }
            factors = random_factors(dtype, QUICK_ROWS if options.quick else ROWS, shape, options.seed)
            self.report.products += audit_product(peers, factors, options.quick, self.tick, refused, self.lost)

    def try_risky(self) -> Trials:
        options = self.options
        risky = [peer for peer in self.present() if peer.risky]
        if not risky:
            return Trials()
        names = [(peer.name, peer.device) for peer in risky]
        files = [str(path.resolve()) for path in options.files]
        job = Job(names, files, options.data, options.operations, tuple(self.dtypes), options.rows, options.columns,
                  options.seed, products=options.products, quick=options.quick)  # fmt: skip
        trials = run_trials(job, risky, self.tick)
        for each in self.report.found:
            each.absent = each.absent or trials.absent(each.peer)
        return trials

    def load(self) -> None:
        report, options = self.report, self.options
        for each in report.found:
            if each.absent is not None:
                continue
            self.tick(f"load {each.peer.label}")
            try:
                each.peer.load()
            except Absent as reason:
                each.absent = str(reason)
        for peer in self.present():
            if options.threads is not None:
                peer.set_threads(options.threads)
            threads = peer.threads()
            if threads is not None:
                report.threads[peer.package] = threads
            if peer.device not in report.devices:
                described = peer.describe_device()
                if described is not None:
                    report.devices[peer.device] = described

    def try_fp32_weights(self, peers: list[Peer], trials: Trials) -> None:
        """Once for a peer and an operation: the answer stands in each of its bfloat16 tables."""
        known: dict[tuple[str, str, str], Mixed | None] = {}
        by_name = {(peer.device, peer.name): peer for peer in peers}
        for table in self.report.tables:
            if table.device == "cpu" or table.dtype != "bfloat16":
                continue
            for result in table.results:
                peer = by_name[table.device, result.peer]
                key = table.device, result.peer, table.operation
                if key not in known:
                    known[key] = self.fp32_weight(peer, table.operation, trials)
                result.fp32_weight = known[key]

    def fp32_weight(self, peer: Peer, operation: str, trials: Trials) -> Mixed | None:
        if peer.risky:
            return trials.fp32_weight(peer, operation)
        if peer.device in self.lost:
            return None
        return with_fp32_weight(peer, OPERATIONS[operation], self.options.columns, self.options.seed)


def audit(options: Options, found: list[Found], progress: Callable[[int, int, str], None]) -> Report:
    """Runs everything. `progress` is told (steps done, steps in all, what comes next)."""
    return Audit(options, found, progress).run()
