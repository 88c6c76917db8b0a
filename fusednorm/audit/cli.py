"""The command line of the audit."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from . import plot, report
from .measure import OPERATIONS
from .operands import DTYPES, Shape, sources
from .peer_files import WrongFile
from .peers import DEVICES, absent_package, cuda_reason
from .products import PRODUCT, QUICK_SHAPES, SHAPES
from .progress import progress_bar
from .run import Found, Options, audit, find

SUMMARY = "count what every RMSNorm and product found here rounds differently from the exact result"
DESCRIPTION = """Compares every RMSNorm found in this installation (fusednorm under each preset, NumPy, and those of
PyTorch and transformers where they are installed; on CUDA also FlashInfer, QuACK, Liger, vLLM and SGLang) with the
exact result, with HF eager, with itself in batches of other sizes and on the CPU, and in time; on random data and on
the hidden states of a real model. Then the products with an fp32 result (fusednorm, NumPy, PyTorch; on CUDA also the
batch-invariant kernels of batch_invariant_ops, vLLM and SGLang, and DeepGEMM): whether a row keeps its bits in batches
of other sizes, the error against float64, and whether 16 bits or TF32 came between."""
EXAMPLES = """examples:
  python -m fusednorm audit                                 everything that is found; a minute or two
  python -m fusednorm audit --quick                         small arrays, without torch.compile: seconds
  python -m fusednorm audit --list                          what was found, and what is absent and why
  python -m fusednorm audit --device cuda --peer mine.py    on CUDA alone, with the kernels of a file of yours
  python -m fusednorm audit --plot audit.png --json a.json  also as a picture and as data
  python -m fusednorm audit --operation mm_dtype --products 256x7168,4096x4096
  python -m fusednorm audit --peers fusednorm,torch:hf --dtype bf16 --columns 4096 --data random
"""
QUICK = {"rows": 256, "columns": 1024}
ALL_OPERATIONS = (*OPERATIONS, PRODUCT)


def _names(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    allowed = list(allowed)

    def parse(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return tuple(dict.fromkeys(names))

    return parse


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() else -1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return parse


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for part in text.split(","):
        numbers = [int(number) if number.isascii() and number.isdigit() else 0 for number in part.split("x")]
        if len(numbers) != 2 or numbers[0] < 1 or numbers[1] < 2:
            raise argparse.ArgumentTypeError(f"{part!r} is not like 256x7168: N, at least 1, by K, at least 2")
        shapes.append((numbers[0], numbers[1]))
    return tuple(dict.fromkeys(shapes))


def _input(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such file")
    return path


def _output(endings: tuple[str, ...], dash: bool = False) -> Callable[[str], Path]:
    def parse(text: str) -> Path:
        path = Path(text)
        if dash and text == "-":
            return path
        if endings and path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(endings)}")
        if not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.absolute().parent}")
        return path

    return parse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "audit",
        help=SUMMARY,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=_at_least(1), metavar="N", help="rows of the random data (1024; with --quick 256)")
    add("--columns", type=_at_least(1), metavar="N", help="their length (2048; with --quick 1024)")
    add(
        "--dtype",
        type=_names(DTYPES),
        default=("float16", "bfloat16"),
        metavar="NAMES",
        help="fp16,bf16; also fp32, which products always have",
    )
    add("--data", type=_names(sources(1, 1, 0)), default=("random", "hidden"), metavar="NAMES", help="random,hidden")
    add("--operation", type=_names(ALL_OPERATIONS), default=ALL_OPERATIONS, metavar="NAMES",
        help=",".join(ALL_OPERATIONS))  # fmt: skip
    add("--products", type=_shapes, metavar="SHAPES", help="N x K of the products' weights (256x7168; quick 256x1024)")
    add("--peers", type=lambda text: tuple(text.split(",")), default=(), metavar="NAMES",
        help="only these: names, their beginnings or patterns, as --list shows them")  # fmt: skip
    add("--device", type=_names(DEVICES), metavar="NAMES",
        help="cpu,cuda (both where torch and a CUDA device are found; else cpu)")  # fmt: skip
    add("--peer", type=_input, action="append", default=[], metavar="FILE",
        help="also the peers of this Python file's list PEERS (see fusednorm/audit/peer_files.py)")  # fmt: skip
    add("--seed", type=_at_least(0), metavar="N", help="of the random data (a fresh one, shown in the output)")
    add("--threads", type=_at_least(1), metavar="N", help="of every package that can be told (default: as they are)")
    add("--quick", action="store_true", help="small arrays, fewer batch sizes, no torch.compile")
    add("--plot", type=_output((".png", ".svg")), metavar="FILE", help="also draw bars: .png or .svg; needs matplotlib")
    add("--json", type=_output((), dash=True), metavar="FILE", help="also write JSON; - writes JSON alone to stdout")
    add("--list", action="store_true", help="list what was found and what is absent, and stop")
    parser.set_defaults(run=run, parser=parser)


@contextlib.contextmanager
def _stdout_is_ours() -> Iterator[None]:
    """What packages print meanwhile, from Python or from C, goes to stderr: stdout is the report's alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _devices(asked: tuple[str, ...] | None) -> tuple[tuple[str, ...], str | None]:
    """The devices, and why CUDA is not among them where nobody decided that."""
    if asked is not None:
        return asked, None
    reason = cuda_reason() or absent_package("torch")
    return (DEVICES, None) if reason is None else (("cpu",), reason)


def _without_peers(devices: tuple[str, ...], found: list[Found]) -> str | None:
    """A device on which nothing can run, in words, or None."""
    for device in devices:
        reasons = [each.absent for each in found if each.peer.device == device]
        if reasons and all(reasons):
            return f"--device {device}: nothing can run there: {reasons[0]}"
    return None


def run(arguments: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = arguments.parser
    devices, without_cuda = _devices(arguments.device)
    try:
        found = find(arguments.peers, arguments.quick, devices=devices, files=tuple(arguments.peer))
    except WrongFile as error:
        parser.error(f"--peer {error}")
    if not found:
        parser.error(f"--peers {','.join(arguments.peers)} selects nothing: --list shows the names")
    if arguments.list:
        print("\n".join(report.describe(found, without_cuda)))
        return 0
    nothing = _without_peers(devices, found) if arguments.device else None
    if nothing:
        parser.error(nothing)
    if arguments.plot is not None:
        reason = plot.missing()
        if reason:
            parser.error(f"--plot {reason}")
    quick = QUICK if arguments.quick else {}
    options = Options(
        rows=arguments.rows or quick.get("rows", Options.rows),
        columns=arguments.columns or quick.get("columns", Options.columns),
        dtypes=tuple(dict.fromkeys(DTYPES[name] for name in arguments.dtype)),
        data=arguments.data,
        operations=arguments.operation,
        products=arguments.products or (QUICK_SHAPES if arguments.quick else SHAPES),
        peers=arguments.peers,
        files=tuple(arguments.peer),
        seed=secrets.randbelow(2**32) if arguments.seed is None else arguments.seed,
        quick=arguments.quick,
        threads=arguments.threads,
    )
    with progress_bar() as progress, _stdout_is_ours():
        result = audit(options, found, progress)
    if without_cuda is not None:
        result.missing.append(f"CUDA is left out: {without_cuda}")
    if arguments.json is not None and str(arguments.json) == "-":
        report.write_json(result, sys.stdout)
    else:
        report.write(result, sys.stdout)
        if arguments.json is not None:
            with arguments.json.open("w", encoding="utf-8") as stream:
                report.write_json(result, stream)
            print(f"data: {arguments.json}", file=sys.stderr)
    measured = bool(result.tables or result.products)
    if arguments.plot is not None and measured:
        plot.draw(result, arguments.plot)
        print(f"plot: {arguments.plot}", file=sys.stderr)
    return 0 if measured else 1
