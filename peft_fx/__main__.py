"""The command line: `python -m peft_fx <command>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import peft_fx
from peft_fx.cli import calibrate, demo, estimate, explain
from peft_fx.cli.terminal import Problem

EPILOG = """\
examples:
  python -m peft_fx demo                            two layers, 512 tokens
  python -m peft_fx demo --tokens 2048 --layers 4   more tokens: more of a difference
  python -m peft_fx explain config.json             what is rewritten in a model, from its configuration alone
  python -m peft_fx estimate config.json            memory and time of a training step, by variant
  python -m peft_fx calibrate                       measure this machine, so that the price is right on it
  python -m peft_fx explain --help                  what a command does, its options and examples

environment:
  TORCH_LOGS="+peft_fx"   each decision of the backend, while it compiles
  PEFT_FX_DISABLE=1       the backend hands every graph to Inductor untouched
  PEFT_FX_CACHE_DIR=DIR   where calibrations are kept, instead of peft_fx in the user's cache directory

exit status: 0; 1 where what was asked for failed; 2 where something that it needs is missing or wrong;
130 where it was interrupted
"""


def parser() -> argparse.ArgumentParser:
    """A sub-command is a function `run(args) -> exit status` and one that declares its arguments."""
    top = argparse.ArgumentParser(
        prog="python -m peft_fx",
        description="A torch.compile backend that rewrites LoRA adapters to their weight form, x(W + sAB).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"peft_fx {peft_fx.__version__}")
    commands = top.add_subparsers(title="commands", metavar="command", required=True)
    demo.add_command(commands)
    explain.add_command(commands)
    estimate.add_command(commands)
    calibrate.add_command(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, of which the help speaks. Without a command it shows the help."""
    args = parser().parse_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    try:
        status: int = args.run(args)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    raise SystemExit(main())
