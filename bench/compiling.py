"""`python -m bench compile`: seconds of our own passes, by the depth of the model."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import peft_fx
from bench import tables
from bench.models import FAMILIES, Setup, make_base, make_batch, setup_of, with_adapters
from bench.results import FOLDER, Results, request
from bench.running import measure_all
from peft_fx.passes import pipeline

COMPILE = """\
The joint graph of a model with adapters, traced on fake weights, at several depths; each in a fresh process. Nothing is
computed, and nothing lowered: on top of the traced graph, Inductor's own passes and its code come, of which the passes'
share is therefore smaller yet. `python -m bench time` has the seconds of a whole compile.

  traced    seconds of Dynamo, AOTAutograd and the partitioner, twice: with the passes and without
  passes    seconds of our own passes, of one form or another
  per node  of the joint graph, as it comes in
  memory    most that the process had, and what it had before the passes
"""


def add_command(commands: Any) -> None:
    """Adds `compile` to the sub-commands of an argument parser."""
    command = commands.add_parser(
        "compile",
        help="seconds of the passes, by the depth of the model",
        description=COMPILE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--model", choices=FAMILIES, default="llama-3.2-1b", help="(default: llama-3.2-1b)")
    command.add_argument("--layers", type=int, nargs="+", default=(8, 80), metavar="N", help="(default: 8 80)")
    command.add_argument("--form", choices=("auto", "weight", "activation"), default="auto", help="(default: auto)")
    command.add_argument("--tokens", type=int, default=4096, metavar="T", help="(default: 4096)")
    command.add_argument("--resume", action="store_true", help="keep what was measured before on the same device")
    command.add_argument("--output", type=Path, default=FOLDER / "compile.json", metavar="FILE")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    setup = setup_of(args.model, tokens=args.tokens, device="cpu")
    asked = [request("compile", replace(setup, layers=n), ["peft_fx"], form=args.form) for n in args.layers]
    rows = measure_all(asked, Results(args.output, "cpu"), again=not args.resume)
    print(f"\n{setup.model} on fake weights, T = {setup.tokens}, form {args.form}\n")
    print(table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    head = ["layers", "nodes", "sites", "traced s", "passes s", "share", "µs per node", "memory MB", "of which before"]
    lines = [
        [
            str(row["setup"]["layers"]),
            str(row["nodes"]),
            str(row["sites"]),
            f"{row['traced_s']:.1f}",
            f"{row['passes_s']:.2f}",
            f"{row['passes_s'] / row['traced_s']:.1%}",
            f"{1e6 * row['passes_s'] / row['nodes']:.0f}",
            f"{row['memory'] / 1e6:.0f}",
            f"{row['memory_before'] / 1e6:.0f}",
        ]
        for row in rows
        if "error" not in row
    ]
    return tables.table(head, lines, "simple", 0)


def compile(asked: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Nodes and sites of one model, and the seconds of its trace and of the passes in it."""
    setup = Setup(**asked["setup"])
    say(f"{setup.layers} layers")
    with torch.device("meta"):
        model = with_adapters(make_base(replace(setup, device="meta")), setup)
    found: dict[str, Any] = {"nodes": 0, "passes_s": 0.0, "memory_before": _memory()}
    real = pipeline.run

    def timed(graph: Any, *args: Any, **kwargs: Any) -> Any:
        found["nodes"] += len(graph.nodes)
        found["memory_before"] = _memory()
        outcome = real(graph, *args, **kwargs)
        found["passes_s"] += outcome.seconds
        found["memory"] = _memory()
        return outcome

    start = time.perf_counter()
    with patch.object(pipeline, "run", timed):
        report = peft_fx.explain(model, **make_batch(setup), options={"peft_fx.form": asked["form"]})
    return found | {"traced_s": time.perf_counter() - start, "sites": len(report.sites)}


def _memory() -> int:
    """Most bytes that the process had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
