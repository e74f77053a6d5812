"""`python -m bench estimate`: what `peft_fx.estimate` says, held against what the suites measured."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft_fx
from bench import tables
from bench.models import Setup, make_base, make_batch, precision, with_adapters
from bench.report import publish
from bench.results import FOLDER, ROOT, Results, request
from bench.running import measure_here
from bench.variants import FLOORS
from peft_fx.estimates import Row
from peft_fx.estimating import VARIANTS
from peft_fx.passes.decide.machine import MACHINES

ESTIMATE = """\
Takes the kept bytes and the peak of a step that bench/results has of the suites, each of every
setup and variant that `peft_fx.estimate` knows too, and puts beside them what it says of the same model. Nothing is
measured. Results: bench/results/estimate.json and a table of docs/benchmarks.md.
"""
PAGE = ROOT.parent / "docs" / "benchmarks.md"
SUITES = ("gpu", "cpu", "methods", "loss")


def add_command(commands: Any) -> None:
    """Adds `estimate` to the sub-commands of an argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    estimate = commands.add_parser(
        "estimate", help="estimated memory against measured", description=ESTIMATE, formatter_class=formatter
    )
    estimate.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results (default: the suites')")
    estimate.add_argument("--output", type=Path, metavar="FILE", help="(default: bench/results/estimate.json)")
    estimate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    paths = args.files or [path for name in SUITES if (path := FOLDER / f"{name}.json").exists()]
    found = [pair for path in paths for pair in measured_in(json.loads(path.read_text()))]
    results = Results(args.output or FOLDER / "estimate.json", "cpu")
    requests = [asked for asked, _ in found]
    results.keep_only(requests)
    sizes = {json.dumps(asked): size for asked, size in found}
    measure_here(
        requests,
        results,
        lambda asked: {"measured": sizes[json.dumps(asked)], "estimated": _estimated(asked)},
        lambda asked: tables.step_title(dict(asked)),
        again=True,
    )
    print(_table(results.rows, "simple"))
    if args.output is None:
        publish(PAGE, "estimate", _table(results.rows, "github"), results)
    return 0


def measured_in(content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A request for each setup of a file of results, and what was measured of its variants: kept and peak bytes."""
    grouped: dict[tuple[Setup, str], dict[str, dict[str, int]]] = {}
    for row in content["rows"]:
        machine = next((m for m in MACHINES if m in content["runs"][row["run"]]["device"].lower()), "cpu")
        for setup, name, measured in _samples(row):
            if name in VARIANTS and "peak" in measured:
                group = grouped.setdefault((setup, machine), {})
                group[name] = {k: measured[k] for k in ("kept", "peak")}
    for (setup, machine), group in grouped.items():
        yield request("estimate", setup, list(group), machine=machine), group


def _samples(row: dict[str, Any]) -> Iterator[tuple[Setup, str, dict[str, Any]]]:
    if row["kind"] == "memory":
        (name,) = row["variants"]
        for sample in row.get("samples", ()):
            yield replace(tables.setup_in(row), layers=sample["layers"]), name, sample
    elif row["kind"] == "step":
        for name, measured in row.get("results", {}).items():
            yield tables.setup_in(row), name, measured


def _estimated(asked: Any) -> dict[str, dict[str, int]]:
    setup, names = replace(Setup(**asked["setup"]), device="cpu"), asked["variants"]
    base = make_base(setup)
    model = base if all(name in FLOORS for name in names) else with_adapters(base, setup)
    with precision(setup):
        found = peft_fx.estimate(model, machine=asked["machine"], variants=names, **make_batch(setup))
    return {row.name: {"kept": row.kept_bytes, "peak": _on_top(row)} for row in found.rows}


def _on_top(row: Row) -> int:
    """The peak of a step as it is measured: above weights and the optimiser's state."""
    return row.peak_bytes - row.weight_bytes - row.optimizer_bytes


def _table(rows: Sequence[dict[str, Any]], style: str) -> str:
    """How far the estimates are off, by variant: the middle one, the worst below and above, and how many are near."""
    lines = []
    for name in VARIANTS:
        kept, peak = (_ratios(rows, name, what) for what in ("kept", "peak"))
        if peak:
            near = sum(abs(ratio - 1) <= 0.1 for ratio in peak)
            worst = f"{min(peak):.2f} to {max(peak):.2f}"
            kept_told = f"{min(kept):.2f} to {max(kept):.2f}"
            lines.append((name, str(len(peak)), kept_told, f"{statistics.median(peak):.2f}", worst, str(near)))
    head = ("variant", "steps", "kept, × measured", "peak, × measured", "from … to", "within 10 %")
    return tables.table(head, lines, style)


def _ratios(rows: Iterable[dict[str, Any]], name: str, what: str) -> list[float]:
    pairs = [(r["estimated"][name][what], r["measured"][name][what]) for r in rows if name in r["measured"]]
    return [estimated / measured for estimated, measured in pairs]
