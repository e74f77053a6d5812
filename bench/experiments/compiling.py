"""Seconds of our own passes, by the depth of the model.

The joint graph of a model with adapters, traced on fake weights, at several depths; each in a fresh process. Nothing is
computed, and nothing lowered: on top of the traced graph, Inductor's own passes and its code come, of which the passes'
share is therefore smaller yet. `python -m bench time` has the seconds of a whole compile.

  traced    seconds of Dynamo, AOTAutograd and the partitioner, twice: with the passes and without
  passes    seconds of our own passes, of one form or another
  per node  of the joint graph, as it comes in
  memory    most that the process had, and what it had before the passes
  choice    with --budget: CPU seconds of the choice of what is kept, and those of the passes and of the partitioner, of
            which it is a share
"""

from __future__ import annotations

import contextlib
import resource
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

import peft_fx
from bench import tables
from bench.experiment import Experiment, Row, Say, Session, option
from bench.results import request
from peft_fx import budgeting, compat
from peft_fx.passes import pipeline
from zoo.models import FAMILIES, Setup, make_base, make_batch, setup_of, with_adapters


def _measured(args: Namespace, session: Session) -> list[Row]:
    setup = setup_of(args.model, tokens=args.tokens, device="cpu")
    more = {"form": args.form} | ({"budget": args.budget} if args.budget else {})
    return session.measure(request("compile", replace(setup, layers=n), ["peft_fx"], **more) for n in args.layers)


COLUMNS = {
    "layers": lambda row: str(row["setup"]["layers"]),
    "nodes": lambda row: str(row["nodes"]),
    "sites": lambda row: str(row["sites"]),
    "traced s": lambda row: f"{row['traced_s']:.1f}",
    "passes s": lambda row: f"{row['passes_s']:.2f}",
    "share": lambda row: f"{row['passes_s'] / row['traced_s']:.1%}",
    "µs per node": lambda row: f"{1e6 * row['passes_s'] / row['nodes']:.0f}",
    "memory MB": lambda row: f"{row['memory'] / 1e6:.0f}",
    "of which before": lambda row: f"{row['memory_before'] / 1e6:.0f}",
}
OF_CHOICE = {
    "choice s": lambda row: f"{row['choice_s']:.2f}",
    "of passes and partitioner": lambda row: f"{row['choice_s'] / (row['passes_cpu_s'] + row['partitioner_s']):.1%}",
}


def _table(rows: Sequence[Row], style: str) -> str:
    done = [row for row in rows if "error" not in row]
    columns = COLUMNS | (OF_CHOICE if done and all("choice_s" in row for row in done) else {})
    setup, form = tables.setup_in(rows[0]), rows[0]["form"]
    title = f"{setup.model} on fake weights, T = {setup.tokens}, form {form}"
    return f"{title}\n\n{tables.of_columns(columns, done, style, 0)}"


def compile(asked: dict[str, Any], say: Say) -> dict[str, Any]:
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
        start = time.process_time()
        outcome = real(graph, *args, **kwargs)
        found["passes_cpu_s"] = time.process_time() - start
        found["passes_s"] += outcome.seconds
        found["memory"] = _memory()
        return outcome

    start = time.perf_counter()
    options, share = {"peft_fx.form": asked["form"]}, asked.get("budget")
    options |= {"peft_fx.memory_budget": "1000TB", "peft_fx.memory_budget_of": "step"} if share else {}
    with patch.object(pipeline, "run", timed), _timed_choice(share, found) if share else contextlib.nullcontext():
        report = peft_fx.explain(model, **make_batch(setup), options=options)
    return found | {"traced_s": time.perf_counter() - start, "sites": len(report.sites)}


@contextlib.contextmanager
def _timed_choice(share: float, found: dict[str, Any]) -> Iterator[None]:
    """Inside the block a budget is a share of the step's peak. `found` gets the CPU seconds of the choice for it, and
    of the passes and the partitioner."""
    hold, split, spent = budgeting.hold, compat.min_cut_rematerialization_partition, 0.0

    def held(graph: Any, values: Any, roles: Any, asked: Any, machine: Any, hint: Any) -> Any:
        nonlocal spent
        begun = time.process_time()
        choices = budgeting.choices_in(graph, values, hint, machine)
        asked = replace(asked, bytes=int(share * choices.of(frozenset(choices.before)).peak))
        start = time.process_time()
        chosen = hold(graph, values, roles, asked, machine, hint)
        found["choice_s"], found["held"] = time.process_time() - start, chosen[0].to_dict()
        spent = time.process_time() - begun
        return chosen

    def timed(*args: Any, **kwargs: Any) -> Any:  # without the passes first, then with them
        start = time.process_time()
        halves = split(*args, **kwargs)
        found["partitioner_s"] = time.process_time() - start - spent
        return halves

    with patch.object(budgeting, "hold", held), patch.object(compat, "min_cut_rematerialization_partition", timed):
        yield


def _memory() -> int:
    """Most bytes that the process had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


COMPILE = Experiment(
    name="compile",
    text=__doc__,
    arguments=(
        option("--model", choices=FAMILIES, default="llama-3.2-1b", help="(default: llama-3.2-1b)"),
        option("--layers", type=int, nargs="+", default=(8, 80), metavar="N", help="(default: 8 80)"),
        option("--form", choices=("auto", "weight", "activation"), default="auto", help="(default: auto)"),
        option("--tokens", type=int, default=4096, metavar="T", help="(default: 4096)"),
        option("--budget", type=float, metavar="SHARE", help="of the step's memory, to be held"),
    ),
    measured=_measured,
    tables={"": _table},
    kinds={"compile": compile},
)
