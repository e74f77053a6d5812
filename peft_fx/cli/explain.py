"""`python -m peft_fx explain`: what the backend makes of a model that is there as a configuration alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import peft_fx
from peft_fx.cli import configs
from peft_fx.cli.terminal import Problem, check_writable, progress, silence_others
from peft_fx.reports import Report

DESCRIPTION = """\
Says what peft_fx makes of a model: each adapter with the form chosen for it and why, what is refused and why, and the
bytes that backward keeps, before and after. The model is built from its configuration on the meta device, with PEFT's
LoRA: no weight exists, nothing is downloaded, nothing is computed. --machine says whose speeds decide, and with them
whether the graph is the one that a GPU or a CPU is given.
"""
EPILOG = """\
examples:
  python -m peft_fx explain config.json --tokens 4096 --machine h100
        the table: a model as transformers describes it, LoRA of rank 16 on all linear layers
  python -m peft_fx explain ~/models/llama --rank 64 --targets q_proj,v_proj --html report.html
        of a checkpoint's folder, as a page to sort, search and click in
  python -m peft_fx explain config.json --dropout 0.05 --option keep=int8 --json report.json
        under options of the backend, as data
  python -m peft_fx explain config.json --diff layers.0.self_attn.q_proj
        the ATen nodes of one layer, before and after

exit status: 0; 1 where a pass failed and a graph would go to Inductor untouched; 2 where something is missing or wrong
"""


def add_command(commands: Any) -> None:
    """Adds `explain` to the sub-commands of an argument parser."""
    explain = commands.add_parser(
        "explain",
        help="what is rewritten in a model, and why, from its config.json",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configs.add_arguments(explain)
    tokens = "of each sequence (default: %(default)s)"
    explain.add_argument("--tokens", type=configs.positive, default=2048, metavar="T", help=tokens)
    configs.add_backend_arguments(explain, "whose speeds the price reckons with")
    loss = "return the loss without its logits, as peft_fx.loss_only does"
    explain.add_argument("--loss-only", action="store_true", help=loss)
    explain.add_argument("--html", type=Path, metavar="FILE", help="the report as a page of its own")
    explain.add_argument("--json", type=Path, metavar="FILE", help="the report as JSON")
    explain.add_argument("--diff", metavar="NAME", help="the ATen nodes of one adapter, instead of the table")
    explain.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Explains and writes what was asked for; returns the exit status."""
    options = configs.options_of(args)
    files = {check_writable(p): text for p, text in ((args.html, Report.to_html), (args.json, Report.to_json)) if p}
    silence_others()
    with progress(f"{args.config}, {args.batch} × {args.tokens} tokens") as say:
        say("building the model without its weights")
        model = configs.model_of(args)
        batch = configs.batch_of(model, args.tokens, args.batch)
        say("tracing it and running the passes")
        told = peft_fx.loss_only(model) if args.loss_only else model
        report = peft_fx.explain(told, options=options, device=args.device, **batch)
    if args.diff is None:
        print(report)
    else:
        _print_diff(report, args.diff)
    for path, text in files.items():
        path.write_text(text(report), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    return 1 if report.failures else 0


def _print_diff(report: Report, name: str) -> None:
    try:
        report.diff(name)
    except KeyError as error:
        raise Problem(f"--diff {name}: {error.args[0]}") from error
