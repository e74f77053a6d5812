"""`python -m bench budget`: time against memory, within budgets."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.commands import step_request
from bench.models import setup_of
from bench.report import figure_of, publish, save
from bench.results import FOLDER, ROOT, Results
from bench.running import measure_all
from bench.tables import table

BUDGET = """\
Seconds and peak of a step of small models, fp32, on a CPU: by peft_fx within budgets, which are shares of the peak that
it has without; by Inductor within PyTorch's own, activation_memory_budget; and with HF's gradient checkpointing.
Results: bench/results/budget.json, a table of docs/benchmarks.md and bench/results/budget.png.
"""
MODELS = ("llama-256", "vit", "t5", "gpt2", "opt")
SHARES = (0.9, 0.75, 0.6, 0.45)
OTHERS = ("inductor", "inductor@0.5", "inductor@0.2", "inductor-ckpt")
PAGE = ROOT.parent / "docs" / "benchmarks.md"
Point = tuple[str, float, float, float]  # the variant, bytes measured and estimated (0: not told), seconds


def add_command(commands: Any) -> None:
    """Adds `budget` to the sub-commands of an argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    budget = commands.add_parser(
        "budget", help="time against memory, within budgets", description=BUDGET, formatter_class=formatter
    )
    budget.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="(default: all)")
    budget.add_argument("--layers", type=int, default=4, metavar="N", help="(default: 4)")
    budget.add_argument("--rounds", type=int, default=7, metavar="N", help="steps of each variant (default: 7)")
    budget.add_argument("--resume", action="store_true", help="keep what was measured before on the same device")
    budget.add_argument("--output", type=Path, metavar="FILE", help="(default: bench/results/budget.json)")
    budget.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    results = Results(args.output or FOLDER / "budget.json", "cpu")
    for model in args.model:
        setup = setup_of(model, layers=args.layers, hidden=256, tokens=512, vocab=512, dtype="fp32", device="cpu")
        (whole,) = measure_all([step_request(setup, ["peft_fx@1e15"], 1, cold=False)], results, again=not args.resume)
        peak = whole["results"]["peft_fx@1e15"]["held"]["peak"]["before"]
        names = ["peft_fx", *(f"peft_fx@{int(share * peak)}" for share in SHARES), *OTHERS]
        measure_all([step_request(setup, names, args.rounds, cold=False)], results, again=not args.resume)
    rows = [row for row in results.rows if len(row["variants"]) > 1]
    print(_table(rows, "simple"))
    if args.output is None:
        publish(PAGE, "budget", _table(rows, "github"), results)
        _draw(rows, FOLDER / "budget.png")
    return 0


def _points(row: dict[str, Any]) -> list[Point]:
    found = []
    for name, result in row["results"].items():
        if "error" not in result:
            told = result.get("held", {}).get("peak", {}).get("after", 0)
            found.append((name, result["peak"], told, statistics.median(result["times"])))
    return found


def _behind(points: Sequence[Point]) -> list[str]:
    """The others' points at which none of ours takes as little memory in as little time."""
    ours = [(peak, seconds) for name, peak, _, seconds in points if name.startswith("peft_fx")]
    rest = [point for point in points if not point[0].startswith("peft_fx")]
    return [name for name, peak, _, seconds in rest if not any(p <= peak and s <= 1.05 * seconds for p, s in ours)]


def _table(rows: Sequence[dict[str, Any]], style: str) -> str:
    """Peak and seconds of each variant, over those of peft_fx without a budget."""
    lines = []
    for row in rows:
        points = _points(row)
        behind = _behind(points)
        (_, whole, _, seconds) = points[0]
        for name, peak, told, median in points:
            base, _, budget = name.partition("@")
            asked = f"{float(budget) / (whole if base == 'peft_fx' else 1):.2f}" if budget else ""
            off = f"{told / peak:.2f}" if told else ""
            line = (row["setup"]["model"], base, asked, f"{peak / 1e6:.1f}", f"{peak / whole:.2f}", off)
            lines.append((*line, f"{median / seconds:.2f}", "yes" if name in behind else ""))
    head = ("model", "variant", "budget", "peak MB", "peak, ×", "estimated / measured", "time, ×", "not matched")
    return table(head, lines, style, left=2)


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each model: seconds against bytes."""
    figure, panels = figure_of(1, len(rows), (3.2 * len(rows), 3.2))
    for panel, row in zip(panels.flat, rows, strict=True):
        points = _points(row)
        for base, style in (("peft_fx", "o-"), ("inductor", "s-"), ("inductor-ckpt", "^")):
            mine = sorted((peak / 1e6, 1e3 * s) for name, peak, _, s in points if name.partition("@")[0] == base)
            panel.plot([peak for peak, _ in mine], [s for _, s in mine], style, label=base, markersize=4)
        panel.set(title=row["setup"]["model"], xlabel="peak of a step, MB", ylabel="ms a step", ylim=(0, None))
    panels.flat[0].legend(frameon=False, fontsize=7)
    save(figure, path)
