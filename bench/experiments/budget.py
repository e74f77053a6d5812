"""Time against memory, within budgets.

Seconds and peak of a step of small models, fp32, on a CPU: by peft_fx within budgets, which are shares of the peak that
it has without; by both Inductor and peft_fx within PyTorch's own, activation_memory_budget; with HF's checkpointing.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.experiment import Experiment, Row, Session, option
from bench.experiments.steps import step_request
from bench.figures import figure_of, save
from bench.tables import table
from zoo.models import setup_of

MODELS = ("llama-256", "vit", "t5", "gpt2", "opt")
SHARES = (0.9, 0.75, 0.6, 0.45)
LINES = {"peft_fx": "o-", "inductor": "s-", "peft_fx, PyTorch's budget": "d:", "inductor-ckpt": "^"}
OTHERS = ("inductor", "inductor@0.5", "inductor@0.2", "inductor-ckpt", "peft_fx@0.5", "peft_fx@0.2")


def _measured(args: Namespace, session: Session) -> list[Row]:
    rows = []
    for model in args.model or MODELS:
        setup = setup_of(model, layers=args.layers, hidden=256, tokens=512, vocab=4096, dtype="fp32", device="cpu")
        (whole,) = session.measure([step_request(setup, ["peft_fx@1e15"], 1, cold=False)])
        peak = whole["results"]["peft_fx@1e15"]["held"]["peak"]["before"]
        names = ["peft_fx", *(f"peft_fx@{int(share * peak)}" for share in SHARES), *OTHERS]
        rows += session.measure([step_request(setup, names, args.rounds, cold=False)])
    return rows


class Point(NamedTuple):
    """A step of one variant: bytes measured and, by the budget's choice, estimated (0: not told); seconds."""

    name: str
    peak: float
    told: float
    seconds: float

    @property
    def way(self) -> str:
        """The variant; peft_fx within its own budget and within PyTorch's are two."""
        variant, _, budget = self.name.partition("@")
        return f"{variant}, PyTorch's budget" if variant == "peft_fx" and budget and float(budget) <= 1 else variant


def _points(row: Row) -> list[Point]:
    found = []
    for name, result in row.get("results", {}).items():
        if "error" not in result and len(row["variants"]) > 1:
            told = result.get("held", {}).get("peak", {}).get("after", 0)
            found.append(Point(name, result["peak"], told, statistics.median(result["times"])))
    return found


def _matched(point: Point, points: Sequence[Point]) -> bool:
    """Whether one of ours takes as little memory in as little time."""
    return any(p.way == "peft_fx" and p.peak <= point.peak and p.seconds <= 1.05 * point.seconds for p in points)


def _table(rows: Sequence[Row], style: str) -> str:
    """Peak and seconds of each variant, over those of peft_fx without a budget."""
    lines = []
    for row, points in ((row, _points(row)) for row in rows):
        for p in points:
            whole, budget = points[0], p.name.partition("@")[2]
            asked = f"{float(budget) / (whole.peak if p.way == 'peft_fx' else 1):.2f}" if budget else ""
            off = f"{p.told / p.peak:.2f}" if p.told else ""
            line = (row["setup"]["model"], p.way, asked, f"{p.peak / 1e6:.1f}", f"{p.peak / whole.peak:.2f}", off)
            lines.append((*line, f"{p.seconds / whole.seconds:.2f}", "" if _matched(p, points) else "yes"))
    head = ("model", "variant", "budget", "peak MB", "peak, ×", "estimated / measured", "time, ×", "not matched")
    return table(head, lines, style, left=2)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """A panel for each model: seconds against bytes."""
    found = [(row["setup"]["model"], points) for row in rows if (points := _points(row))]
    figure, panels = figure_of(1, len(found), (3.2 * len(found), 3.2))
    for panel, (model, points) in zip(panels.flat, found, strict=True):
        for way, style in LINES.items():
            mine = sorted((p.peak / 1e6, 1e3 * p.seconds) for p in points if p.way == way)
            panel.plot(*zip(*mine, strict=True), style, label=way, markersize=4)
        panel.set(title=model, xlabel="peak of a step, MB", ylabel="ms a step", ylim=(0, None))
    panels.flat[0].legend(frameon=False, fontsize=7)
    save(figure, path)


BUDGET = Experiment(
    name="budget",
    text=__doc__,
    arguments=(
        option("--model", nargs="+", choices=MODELS, metavar="NAME", help="(default: all)"),
        option("--layers", type=int, default=4, metavar="N", help="(default: 4)"),
        option("--rounds", type=int, default=7, metavar="N", help="steps of each variant (default: 7)"),
    ),
    measured=_measured,
    tables={"budget": _table},
    page="benchmarks.md",
    figure=_draw,
)
