"""`python -m bench coverage`: which adapters, on which architectures, become weights, and how exact that is."""

from __future__ import annotations

import argparse
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.coverage import page
from bench.coverage.rows import TABLES, measure
from bench.results import FOLDER, ROOT, Results, asked
from bench.running import progress_bar
from bench.worker import quieten

COVERAGE = """\
Every configuration of PEFT's that a layer can carry, on a small block; LoRA on tiny models of every architecture; the
adapters of other packages. Each in training mode, prepared, forward and backward, with the weight form asked for and
the graphs run op by op: about 15 minutes on two cores. What is not installed gets a row that says so:

    pip install -e '.[bench,coverage]'

Two packages are not in that list. torchtune 0.6 needs torchao before 0.16, and PEFT 0.21 a later one or none: its rows
are measured in an environment of their own, by --table packages --name. pyreft 0.1 asks for transformers 4.45, but its
interventions do not use it: pip install --no-deps pyreft pyvene.

Writes bench/results/coverage.json and, of all rows in it, docs/coverage.md.
"""
PAGE = ROOT.parent / "docs" / "coverage.md"


def add_command(commands: Any) -> None:
    """Adds `coverage` to the sub-commands of an argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    coverage = commands.add_parser(
        "coverage",
        help="what is rewritten, of every adapter and architecture",
        description=COVERAGE,
        formatter_class=formatter,
    )
    coverage.add_argument("--table", choices=TABLES, nargs="+", default=list(TABLES), help="(default: all)")
    coverage.add_argument("--name", nargs="+", metavar="NAME", help="rows of these names alone")
    coverage.add_argument("--draws", type=int, default=12, metavar="N", help="for the gate; 0: none (default: 12)")
    coverage.add_argument(
        "--time", action="store_true", help="also seconds of a step, compiled by Inductor: an hour or two"
    )
    coverage.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="rows at a time (default: 2, timed: 1)",
    )
    coverage.add_argument("--resume", action="store_true", help="keep what was measured from the same source")
    coverage.add_argument("--output", type=Path, default=FOLDER / "coverage.json", metavar="FILE")
    coverage.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="(default: docs/coverage.md)")
    coverage.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    wanted = [(table, name) for table in args.table for name in TABLES[table] if not args.name or name in args.name]
    results = Results(args.output, "cpu")
    results.keep_only([request(table, name) for table, entries in TABLES.items() for name in entries])
    wanted = [key for key in wanted if not args.resume or results.find(request(*key)) is None]
    jobs = 1 if args.time else args.jobs  # what runs beside it would be timed too
    with progress_bar() as progress, ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (jobs,)) as pool:
        task = progress.add_task("", total=len(wanted))
        measured = [pool.submit(_measured, *key, args.draws, args.time) for key in wanted]
        for (table, name), row in zip(wanted, measured, strict=True):
            progress.update(task, description=name)
            results.add(request(table, name), row.result())
            progress.advance(task)
    text = page.text(results.runs, results.rows)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(text)
    print(text)
    return 0


def _begin(jobs: int) -> None:
    """In each process that measures: the cores shared out, third parties' warnings off."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    quieten()
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def _measured(table: str, name: str, draws: int, timed: bool) -> dict[str, Any]:
    return measure(TABLES[table][name], draws, timed)


def request(table: str, name: str) -> dict[str, Any]:
    """The key of a row among the results."""
    return asked({"kind": "coverage", "table": table, "name": name, "variants": ["peft_fx"]})
