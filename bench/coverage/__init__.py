"""`python -m bench coverage`: which adapters, on which architectures, become weights, and how exact that is.

Of all that is in zoo/:

rows.py  what is measured of each, and how far the results are from exact
page.py  the tables of docs/coverage.md
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from bench.coverage import page
from bench.coverage.rows import TABLES, measure
from bench.experiment import Experiment, Row, Session, option, quieten
from bench.results import asked


def request(table: str, name: str) -> dict[str, Any]:
    """The key of a row among the results."""
    return asked({"kind": "coverage", "table": table, "name": name, "variants": ["peft_fx"]})


def _measured(args: Namespace, session: Session) -> list[Row]:
    """All rows that there are then: in processes that measure many each, because of what each has to import."""
    every = [request(table, name) for table, entries in TABLES.items() for name in entries]
    wanted = [r for r in every if r["table"] in args.table and (not args.name or r["name"] in args.name)]
    jobs = 1 if args.time else min(args.jobs, os.cpu_count() or 1)  # what runs beside it would be timed too
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (jobs,)) as pool:
        due = {r["name"]: pool.submit(_row, r, args.draws, args.time) for r in wanted if session.known(r) is None}
        session.measure(wanted, lambda r, say: due[r["name"]].result(), only=every)
    return session.results.rows


def _begin(jobs: int) -> None:
    """In each process that measures: the cores shared out, third parties' warnings off."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    quieten()
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def _row(asked: Row, draws: int, timed: bool) -> Row:
    return measure(TABLES[asked["table"]][asked["name"]], draws, timed)


COVERAGE = Experiment(
    name="coverage",
    text="""\
What is rewritten, of every adapter and architecture.

Every configuration of PEFT's that a layer can carry, on a small block; LoRA on tiny models of every architecture; the
adapters of other packages. Each in training mode, prepared, forward and backward, with the weight form asked for and
the graphs run op by op: about 15 minutes on two cores. What is not installed gets a row that says so:

    pip install -e '.[bench,coverage]'

Two packages are not in that list. torchtune 0.6 needs torchao before 0.16, and PEFT 0.21 a later one or none: its rows
are measured in an environment of their own, by --table packages --name. pyreft 0.1 asks for transformers 4.45, but its
interventions do not use it: pip install --no-deps pyreft pyvene.
""",
    arguments=(
        option("--table", choices=TABLES, nargs="+", default=list(TABLES), help="(default: all)"),
        option("--name", nargs="+", metavar="NAME", help="rows of these names alone"),
        option("--draws", type=int, default=12, metavar="N", help="for the gate; 0: none (default: 12)"),
        option("--time", action="store_true", help="also seconds of a step, compiled by Inductor: an hour or two"),
        option("--jobs", type=int, default=2, metavar="N", help="rows at a time (default: 2, timed: 1)"),
    ),
    measured=_measured,
    tables=page.MARKS,
    page="coverage.md",
)
