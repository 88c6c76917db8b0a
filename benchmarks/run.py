"""Runs the benchmarks and writes one table (and with --json one JSON file) for each into a folder.

    python -m benchmarks.run results                      everything: about a quarter of an hour on two cores
    python -m benchmarks.run results --quick              a look: about two minutes
    python -m benchmarks.run results --only call --json   host time of small calls, also as JSON
    python -m benchmarks.run results --peer mine.py       with another contestant; benchmarks/peers.py says how
    python -m benchmarks.run results --device cuda        on a GPU: about five minutes with all peers

Ratios within one table are comparable, figures of different runs or machines are not. On a machine that does other work
at the same time the shares of memcpy move by tens of per cent; instruction counts do not.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

if __package__ in (None, ""):  # python benchmarks/run.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "benchmarks"
    import benchmarks  # noqa: F401

from . import (
    bandwidth,
    calls,
    cuda_between,
    cuda_call,
    cuda_graphs,
    cuda_peers,
    cuda_price,
    cuda_product_peers,
    cuda_products,
    cuda_tiles,
    cuda_time,
    instructions,
    machine,
    products,
)
from .cases import DTYPES, numpy_dtype
from .peers import Peer, registry
from .product_peers import product_registry
from .progress import Progress, show
from .report import Report

AnyPeer = TypeVar("AnyPeer", Peer, cuda_peers.CudaPeer)
Runs = dict[str, Callable[[Progress], Report]]
BENCHMARKS = {
    "cpu": ("bandwidth", "call", "instructions", "products"),
    "cuda": ("cuda_call", "cuda_time", "cuda_between", "cuda_products", "cuda_price", "cuda_tiles"),
}
NAMES = (*BENCHMARKS["cpu"], *BENCHMARKS["cuda"])
SECONDS_PARTS = {"cuda_time": 7, "cuda_between": 3, "cuda_products": 3}  # of those that run


def _list_of(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name)
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        return tuple(int(float(part[:-1]) * units[part[-1]]) for part in text.split(","))
    except (KeyError, ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes look like 64K,1M,64M") from None


def _threads(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of threads look like 1,2")
    return numbers


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    processors = machine.available_cpus()
    parser.add_argument("folder", type=Path, help="where the results go; made if it is not there")
    parser.add_argument(
        "--device", choices=tuple(BENCHMARKS), help="which benchmarks run, without --only; default: cpu"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, row lengths and turns")
    parser.add_argument("--json", action="store_true", help="write NAME.json beside NAME.txt")
    parser.add_argument(
        "--only",
        type=_list_of(NAMES),
        metavar="NAMES",
        help="; ".join(f"{device}: {', '.join(names)}" for device, names in BENCHMARKS.items()),
    )
    parser.add_argument(
        "--peer",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file with a list PEERS; may be given again",
    )
    group = parser.add_argument_group("bandwidth and products")
    group.add_argument(
        "--threads",
        type=_threads,
        default=(1, 2) if processors > 1 else (1,),
        metavar="NUMBERS",
        help="default: %(default)s",
    )
    group.add_argument("--sizes", type=_sizes, metavar="SIZES", help="bytes of x, such as 64K,1M,64M")
    group.add_argument("--dtypes", type=_list_of(DTYPES), default=DTYPES, metavar="NAMES", help=", ".join(DTYPES))
    group = parser.add_argument_group("cuda_time, cuda_between and cuda_products")
    group.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        metavar="NUMBER",
        help="for those of them that run, together; then slow beginners are left out, a third later all; "
        "default: %(default)s",
    )
    options = parser.parse_args(words)
    options.only = options.only or BENCHMARKS[options.device or "cpu"]
    outside = [name for name in options.only if options.device and name not in BENCHMARKS[options.device]]
    if outside:
        parser.error(f"--only {','.join(outside)}: not with --device {options.device}")
    return options


def present(peers: list[AnyPeer]) -> tuple[list[AnyPeer], list[str]]:
    """Those that can run, and for the others the reason."""
    found, absent = [], []
    for peer in peers:
        reason = peer.absent()
        if reason:
            absent.append(f"{peer.name}: {reason}")
        else:
            found.append(peer)
    return found, absent


def known_dtypes(wanted: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for name in wanted:
        try:
            numpy_dtype(name)
        except ImportError:
            print(f"{name} is left out: it needs ml_dtypes", file=sys.stderr)
        else:
            found.append(name)
    return tuple(found)


def on_cpu(options: argparse.Namespace) -> Runs:
    everyone = registry(options.peer)
    peers, absent = present(everyone)
    multiply, cannot = present(product_registry(everyone))
    absent += [reason for reason in cannot if reason not in absent]
    head = machine.describe()
    if absent:
        head["absent"] = "; ".join(absent)
    settings = bandwidth.Settings(options.quick, options.threads, options.sizes, known_dtypes(options.dtypes))
    return {  # call before bandwidth, which changes how malloc behaves in this process
        "call": lambda progress: calls.run(options.quick, head, progress),
        "instructions": lambda progress: instructions.run(options.quick, head, progress),
        "products": lambda progress: products.run(multiply, settings, head, progress),
        "bandwidth": lambda progress: bandwidth.run(peers, settings, head, progress),
    }


def on_cuda(options: argparse.Namespace) -> Runs:
    gpu = cuda_graphs.Gpu()
    reason = gpu.absent()
    if reason:
        raise SystemExit(f"no benchmark runs on a GPU here: {reason}")
    # A file first: what it does to the path of modules may decide which packages are found.
    everyone = cuda_peers.registry(options.peer)
    peers, absent = present(everyone)
    wanted = cuda_product_peers.product_registry(everyone) if "cuda_products" in options.only else []
    multiply, cannot = present(wanted)
    absent += [reason for reason in cannot if reason not in absent]
    head = {**machine.describe(), **gpu.describe()}
    versions = [f"{peer.name} {peer.version()}".strip() for peer in [*peers, *multiply]]
    head["peers"] = ", ".join(dict.fromkeys(versions))
    if absent:
        head["absent"] = "; ".join(absent)
    quick, seconds = options.quick, options.seconds
    parts = {name: part for name, part in SECONDS_PARTS.items() if name in options.only}
    share = {name: seconds * part / sum(parts.values()) for name, part in parts.items()}
    return {  # host times first, while no library's threads are at work
        "cuda_call": lambda progress: cuda_call.run(peers, quick, gpu, head, progress),
        "cuda_time": lambda progress: cuda_time.run(peers, quick, share["cuda_time"], gpu, head, progress),
        "cuda_between": lambda progress: cuda_between.run(peers, quick, share["cuda_between"], gpu, head, progress),
        "cuda_products": lambda progress: cuda_products.run(
            multiply, quick, share["cuda_products"], gpu, head, progress
        ),
        "cuda_price": lambda progress: cuda_price.run(quick, gpu, head, progress),
        "cuda_tiles": lambda progress: cuda_tiles.run(quick, gpu, head, progress),
    }


def main() -> int:
    options = parse_arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    runs: Runs = {}
    status = 0
    for device, prepare in (("cpu", on_cpu), ("cuda", on_cuda)):
        if {*options.only} & {*BENCHMARKS[device]}:
            runs.update(prepare(options))
    for name, run in runs.items():
        if name not in options.only:
            continue
        report = run(show)
        report.head["load after"] = machine.load().replace("at the start", "at the end")
        print(report.text(), flush=True)
        for path in report.write(options.folder, options.json):
            print(f"written: {path}", file=sys.stderr, flush=True)
        stopped = report.head.get("stopped", "")
        if stopped.startswith("interrupted"):
            return 130
        status = status or int(bool(stopped))
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # what was measured is written then too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
