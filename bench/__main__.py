"""The command line: `python -m bench <command>`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from bench.experiments import COMMANDS
from bench.report import REPORT
from peft_fx.cli.terminal import Problem

DESCRIPTION = "Memory and time of training adapters: peft_fx against everything a user would otherwise run."
EPILOG = """\
examples:
  python -m bench memory                                       a small Llama, PEFT's defaults
  python -m bench memory --model roberta t5 --hidden 128 --tokens 256 --vocab 512 --dtype peft fp32
  python -m bench memory --dropout 0 0.1 --tensors             which tensors are kept
  python -m bench time --model llama-512                       every variant, a few minutes
  python -m bench fit --model llama-256 --memory 0.5           the longest sequence in 0.5 GB
  python -m bench suite cpu && python -m bench report          what is committed, and its tables and figures
  python -m bench suite gpu --minutes 9                        in parts: the same command again goes on
  python -m bench compile --layers 8 80                        seconds of the passes, by depth

Needs: pip install -e '.[bench]', and a C++ compiler. A progress bar goes to stderr, tables go to stdout, and every raw
sample goes to bench/results/ with the command, device, versions and commit that made it.
"""


def parser() -> ArgumentParser:
    top = ArgumentParser("python -m bench", description=DESCRIPTION, epilog=EPILOG)
    top.formatter_class = RawDescriptionHelpFormatter
    found = top.add_subparsers(title="commands", metavar="command", required=True)
    for command in (*COMMANDS, REPORT):
        command.add_to(found)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 where something that it needs is missing."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
