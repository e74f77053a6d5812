"""`python -m bench report`: tables in Markdown and figures, from the results of suites. Nothing is measured."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import tables
from bench.experiment import DOCS, Command, Row, option, publish
from bench.figures import COLOURS, bars, bars_of, figure_of, save
from bench.results import FOLDER, provenance
from bench.tables import of_kind
from bench.variants import VARIANTS
from peft_fx.cli.terminal import Problem

KNOWN = ("gpu", "cpu", "methods", "loss")  # of two that have the same table for a page the first one stands there
AVX2 = "methods-avx2"  # on a CPU held to that


class Report(Command):
    def run(self, args: Namespace) -> None:
        paths = [path for path in args.files or (FOLDER / f"{name}.json" for name in (*KNOWN, AVX2)) if path.exists()]
        if not paths:
            raise Problem("There are no results yet. Measure some: python -m bench suite cpu")
        stored = {path.stem: json.loads(path.read_text()) for path in paths}
        args.folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(section(name, content) for name, content in stored.items())
        (args.folder / "tables.md").write_text(text)
        print(text)
        if args.folder == FOLDER:
            for name, content in reversed(stored.items()):
                made = {mark: table(content["rows"]) for mark, table in PAGE_TABLES.get(name, {}).items()}
                publish(DOCS / "benchmarks.md", name, made, content["runs"])
        draw_kept(next((rows for c in stored.values() if (rows := of_kind(c["rows"], "memory"))), []), args.folder)
        draw_tokens(next((rows for c in stored.values() if (rows := series(c["rows"]))), []), args.folder)


def section(name: str, content: dict[str, Any]) -> str:
    """All tables of one file of results, in Markdown."""
    parts = [f"## {name}\n", *(f"{provenance(run)}\n" for run in content["runs"])]
    return "\n".join([*parts, tables.listing(content["rows"], "github")])


# ---------------------------------------------------------------------------------------------- tables for a page


def _done(rows: Iterable[Row]) -> list[Row]:
    return [row for row in of_kind(rows, "step") if "error" not in row]


def _headline(rows: Sequence[Row]) -> str:
    """The step with the most variants, in the columns that matter most."""
    row = max(_done(rows), key=lambda row: len(row["variants"]), default=None)
    made = row and tables.beside_table(row, "frozen", "× frozen", "inductor")
    return f"A step of {tables.step_title(row)}:\n\n{made}" if row else ""


def _kept(rows: Sequence[Row]) -> str:
    memory = of_kind(rows, "memory")
    return tables.kept_table(tables.Memories(memory), "github") if memory else ""


def _methods(rows: Sequence[Row]) -> str:
    steps = of_kind(rows, "step")
    if not steps:
        return ""
    s = tables.setup_in(steps[0])
    size = f"{s.model}, {s.layers} layers × {s.hidden}, T = {s.tokens * s.batch}, {s.dtype}"
    return f"{size}; memory and step × the frozen model's:\n\n{tables.methods_table(steps)}"


def _loss(rows: Sequence[Row]) -> str:
    row = next(iter(_done(rows)), None)
    made = row and tables.beside_table(row, "inductor-loss", "× Inductor")
    return f"A step of {tables.step_title(row)}:\n\n{made}" if row else ""


_STEPS = {"step": _headline, "kept": _kept}
PAGE_TABLES = {"cpu": _STEPS, "gpu": _STEPS, "loss": {"loss": _loss}}
PAGE_TABLES |= {name: {name: _methods} for name in ("methods", AVX2)}

# -------------------------------------------------------------------------------------------------------- figures


def draw_kept(rows: Sequence[Row], folder: Path) -> None:
    """Bars of bytes kept per layer, as a ratio to the floor: one group for each setup."""
    memories = tables.Memories(rows)
    setups = memories.setups()
    names = [n for n in ("eager", "inductor", "peft_fx") if any(memories.per_layer(s, n) for s in setups)]
    if not setups:
        return
    labels = [
        f"{s.model}\n{s.dtype if s.method == 'lora' else s.method}" + (f"\ndropout {s.dropout:g}" if s.dropout else "")
        for s in setups
    ]
    figure, axes = bars_of(labels, 1.1)
    for i, name in enumerate(names):
        heights = [memories.per_layer(s, name) / (memories.floor(s)[1] or float("inf")) for s in setups]
        bars(axes, i, len(names), heights, label=VARIANTS[name].title, color=COLOURS[name])
    axes.axhline(1, color=COLOURS["frozen"], linewidth=1, label="floor: the frozen model")
    axes.set_ylabel("bytes kept per layer, × the floor")
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    save(figure, folder / "kept_per_layer.png")


def draw_tokens(rows: Sequence[Row], folder: Path) -> None:
    """Two panels over T: bytes kept for backward, and the peak of a step."""
    if not rows:
        return
    figure, ((left, right),) = figure_of(1, 2, (11.0, 4.0))
    T = [row["setup"]["tokens"] for row in rows]
    most = max(m["peak"] for row in rows for m in row["results"].values() if "peak" in m)
    unit, size = ("GB", 1e9) if most > 1e9 else ("MB", 1e6)
    for name in VARIANTS:
        found = [(r["setup"]["tokens"], m) for r in rows if "peak" in (m := r["results"].get(name, {}))]
        if not found:
            continue
        x = [tokens for tokens, _ in found]
        plain = name.removesuffix("-ckpt")
        line = "--" if name == "frozen" else "-" if plain == name else ":"  # the floor lies over what reaches it
        look: dict[str, Any] = {"color": COLOURS[plain], "marker": "o", "linestyle": line}
        left.plot(x, [m["kept"] / size for _, m in found], label=VARIANTS[name].title, **look)
        right.plot(x, [m["peak"] / size for _, m in found], **look)
    for axes, text in ((left, f"kept for backward, {unit}"), (right, f"peak of a step, {unit}")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(T, [str(tokens) for tokens in T])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="T, tokens", ylabel=text)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    save(figure, folder / "against_tokens.png")


def series(rows: Iterable[Row]) -> list[Row]:
    """The rows of steps that differ in T alone, most of them first found, shortest first, merged by T."""
    groups: dict[Any, dict[int, Row]] = {}
    for row in _done(rows):
        T = row["setup"]["tokens"]
        group = groups.setdefault(replace(tables.setup_in(row), tokens=0), {})
        group[T] = {**row, "results": {**row["results"], **group.get(T, {}).get("results", {})}}
    longest = max(groups.values(), key=len, default={})
    return [longest[T] for T in sorted(longest)] if len(longest) > 1 else []


REPORT = Report(
    name="report",
    text="""\
Tables and figures from the results of suites.

Reads bench/results/cpu.json, methods.json, loss.json and so on, or the files named, and writes next to them

  tables.md            every table, each with the command, device, versions and commit of its numbers
  kept_per_layer.png   bytes that a layer keeps for backward, by variant
  against_tokens.png   what a step keeps for backward, and its peak, against T

and, between its `<!-- bench: ... -->` marks, the tables of docs/benchmarks.md.
""",
    arguments=(
        option("files", nargs="*", type=Path, metavar="FILE", help="results (default: the suites')"),
        option("--folder", type=Path, default=FOLDER, help="where to write (default: bench/results)"),
    ),
)
