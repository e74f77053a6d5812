"""`python -m bench long-context`: what training takes at up to 131072 tokens, by `peft_fx.estimate`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft_fx
from bench.report import publish
from bench.results import FOLDER, ROOT, Results
from bench.running import measure_here
from bench.tables import table
from peft_fx import configs
from peft_fx.estimates import Estimate, Row
from peft_fx.sizing import without_mask

LONG = """\
The memory of a training step of Llamas of 1, 3 and 8 billion parameters, LoRA of rank 16 on all linear layers or on
attention's alone, one sequence, by `peft_fx.estimate`: no weight exists, nothing is computed. Results:
bench/results/long-context.json, and the tables of docs/long-context.md. What was estimated already, from the same
source, is kept.
"""
PAGE = ROOT.parent / "docs" / "long-context.md"
MODELS = ROOT.parent / "examples" / "configs"
LENGTHS = (131072, 2048)
VARIANTS = ("inductor", "peft_fx", "peft_fx-loss", "inductor-ckpt", "peft_fx-ckpt-loss", "full", "frozen")
MEMORY = 80e9  # of the GPU that the longest sequence is asked for


def add_command(commands: Any) -> None:
    """Adds `long-context` to the sub-commands of an argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    long = commands.add_parser(
        "long-context", help="memory at up to 131072 tokens, estimated", description=LONG, formatter_class=formatter
    )
    long.add_argument("--output", type=Path, metavar="FILE", help="(default: bench/results/long-context.json)")
    long.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    results = Results(args.output or FOLDER / "long-context.json", "cpu")
    requests = [
        {"kind": "estimate", "model": path.stem, "targets": targets, "tokens": T, "variants": list(VARIANTS)}
        for T in LENGTHS
        for path in sorted(MODELS.glob("llama-*.json"))
        for targets in configs.TARGETS
    ]
    results.keep_only(requests)
    measure_here(requests, results, _estimated, _name, again=False)
    made = {"long-context": _peaks, "long-context parts": _parts, "long-context fits": _fits}
    for name, make in made.items():
        print(f"\n{make(results.rows, 'simple')}")
        if args.output is None:
            publish(PAGE, name, make(results.rows, "github"), results)
    return 0


def _name(row: Any) -> str:
    return f"{row['model']}, {row['targets']}, T = {row['tokens']}"


def _estimated(asked: Any) -> dict[str, Any]:
    model = without_mask(configs.adapted_model(MODELS / f"{asked['model']}.json", targets=asked["targets"]))
    batch = configs.batch_of(model, asked["tokens"])
    return {"estimated": peft_fx.estimate(model, machine="h100", variants=asked["variants"], **batch).to_dict()}


def _estimate(row: dict[str, Any]) -> Estimate:
    stored = [{k: v for k, v in r.items() if k != "peak_bytes"} for r in row["estimated"]["variants"]]
    return Estimate([Row(**r) for r in stored], row["estimated"]["machine"])


def _peaks(rows: Iterable[dict[str, Any]], style: str) -> str:
    """Gigabytes at the highest point of a step, all told."""
    lines = []
    for row in sorted(rows, key=_order):
        peaks = {r.name: r.peak_bytes / 1e9 for r in _estimate(row).rows}
        lines.append((row["model"], row["targets"], str(row["tokens"]), *(f"{peaks[v]:.1f}" for v in VARIANTS)))
    return table(("model", "adapters on", "T", *VARIANTS), lines, style, left=2)


def _parts(rows: Iterable[dict[str, Any]], style: str) -> str:
    """What backward keeps, in units of the weights, by what reads it."""
    lines = []
    components = ("attention", "MLP", "norms", "logits and loss", "adapters")
    for row in sorted(rows, key=_order):
        for r in (r for r in _estimate(row).rows if r.name in ("inductor", "peft_fx", "peft_fx-loss")):
            shares = (r.components.get(c, 0) / r.weight_bytes for c in components)
            whole = r.kept_bytes / r.weight_bytes
            told = (f"{share:.2f}" for share in (*shares, whole))
            lines.append((row["model"], row["targets"], str(row["tokens"]), r.name, *told))
    return table(("model", "adapters on", "T", "variant", *components, "all"), lines, style, left=4)


def _fits(rows: Sequence[dict[str, Any]], style: str) -> str:
    """The longest sequence in the memory of one GPU, on the line through the lengths estimated."""
    lines = []
    for model, targets in dict.fromkeys((row["model"], row["targets"]) for row in sorted(rows, key=_order)):
        found = [_estimate(row) for row in rows if (row["model"], row["targets"]) == (model, targets)]
        if len(found) < len(LENGTHS):
            continue
        whole = Estimate([r for e in found for r in e.rows], found[0].machine)
        longest = whole.largest(MEMORY)
        lines.append((model, targets, *(str(longest[v]) for v in VARIANTS), str(whole.crossover() or "none")))
    return table(("model", "adapters on", *VARIANTS, "inductor above full from"), lines, style, left=2)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], configs.TARGETS.index(row["targets"]), row["tokens"]
