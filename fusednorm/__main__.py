"""`python -m fusednorm`: the commands."""

from __future__ import annotations

import argparse
import json
import sys

import fusednorm
from fusednorm.audit import cli


def _info(arguments: argparse.Namespace) -> int:
    print(json.dumps(fusednorm.info(), indent=2))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusednorm", description="RMSNorm and products with one published bit-level contract."
    )
    parser.add_argument("--version", action="version", version=f"fusednorm {fusednorm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    cli.add_parser(commands)
    info = commands.add_parser("info", help="print version, CPU paths, threads and CUDA state as JSON")
    info.set_defaults(run=_info)
    parsed = parser.parse_args(arguments)
    if not hasattr(parsed, "run"):
        parser.print_help()
        return 0
    code: int = parsed.run(parsed)
    return code


if __name__ == "__main__":
    sys.exit(main())
