"""`python -m bench report`: tables in Markdown and figures, from the results that are there. Nothing is measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import tables
from bench.results import FOLDER, ROOT, Results
from bench.variants import VARIANTS

Row = dict[str, Any]
COLOURS = {
    "eager": "#9aa0a6",
    "inductor": "#e8710a",
    "peft_fx": "#1a73e8",
    "frozen": "#202124",
    "full": "#a142f4",
    "paper": "#f9ab00",
    "handwritten": "#12a4af",
}

PAGE = ROOT.parent / "docs" / "benchmarks.md"

REPORT = """\
Reads bench/results/cpu.json, methods.json, loss.json and gpu.json, or the files named, and writes next to them

  tables.md            every table, each with the command, device, versions and commit of its numbers
  kept_per_layer.png   bytes that a layer keeps for backward, by variant
  against_tokens.png   what a step keeps for backward, and its peak, against T

and, between its `<!-- bench: ... -->` marks, the tables of docs/benchmarks.md.
"""


def add_command(commands: Any) -> None:
    """Adds `report` to the sub-commands of an argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    report = commands.add_parser(
        "report", help="tables and figures from the results", description=REPORT, formatter_class=formatter
    )
    report.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results (default: the suites')")
    report.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: bench/results)")
    report.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    known = [FOLDER / f"{suite}.json" for suite in ("gpu", "cpu", "methods", "loss")]
    paths = [path for path in args.files or known if path.exists()]
    if not paths:
        print("There are no results yet. Measure some: python -m bench suite cpu")
        return 2
    stored = [(path, json.loads(path.read_text())) for path in paths]
    args.folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(section(path.stem, content) for path, content in stored)
    (args.folder / "tables.md").write_text(text)
    print(text)
    if args.folder == FOLDER:
        PAGE.write_text(with_tables(PAGE.read_text(), {path.stem: content for path, content in stored}))
    _draw_kept(next(({"rows": r} for _, c in stored if (r := _of_kind(c["rows"], "memory"))), None), args.folder)
    _draw_tokens(next((c for _, c in stored if _series(c["rows"])), None), args.folder)
    return 0


# -------------------------------------------------------------------------------------------------------- tables


def section(name: str, content: dict[str, Any]) -> str:
    """All tables of one file of results, in Markdown."""
    parts = [f"## {name}\n", *(f"{provenance(run)}\n" for run in content["runs"])]
    return "\n".join([*parts, *_tables(content["rows"], "github", "### ")])


def print_rows(rows: Iterable[Row]) -> None:
    """The same tables for a terminal."""
    print("\n".join(["", *_tables(list(rows), "simple", "")]))


def provenance(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "transformers", "peft", "peft_fx"))
    commit = f", commit {run['commit'][:10]}" if run["commit"] else ""
    return f"`{run['command']}` on {run['device']}, {run['threads']} threads; {versions}{commit}; {run['date']}."


def _tables(rows: list[Row], style: str, heading: str) -> list[str]:
    parts = []
    if memory := _of_kind(rows, "memory"):
        memories = tables.Memories(memory)
        parts += [f"{heading}Kept for backward per layer, × the floor\n", tables.kept_table(memories, style), ""]
        parts += [f"{heading}Peak of a step, × the frozen model\n", tables.peak_table(memories, style), ""]
        parts += _breakdown(memories, style, heading)
    for row in _of_kind(rows, "step"):
        body = row["error"] if "error" in row else tables.step_table(row, style)
        parts += [f"{heading}A step of {tables.step_title(row)}\n", body, ""]
    return parts


def _breakdown(memories: tables.Memories, style: str, heading: str) -> list[str]:
    """What a layer keeps, by tensor, of the first setup measured."""
    setup = next(iter(memories.setups()), None)
    parts = []
    for name in ("inductor", "peft_fx", "frozen") if setup else ():
        if len(memories.samples(setup, name)) > 1:
            title = f"{heading}What a layer keeps, {name}: {setup.model}, T = {setup.tokens}, {setup.dtype}\n"
            parts += [title, tables.kept_tensors_table(memories, setup, name, style), ""]
    return parts


def with_tables(text: str, stored: dict[str, dict[str, Any]]) -> str:
    """A page with the tables between its marks made anew, each followed by where its numbers come from."""
    for name, (suites, make) in PAGE_TABLES.items():
        content = next((stored[suite] for suite in suites if suite in stored), None)
        body = make(content["rows"]) if content else ""
        if content and body:
            text = page_with(text, name, "\n\n".join([body, *(provenance(run) for run in content["runs"])]))
    return text


def page_with(text: str, name: str, made: str) -> str:
    """A page with what is between the marks of that name replaced; the same page where it has no such marks."""
    before, mark, rest = text.partition(f"<!-- bench: {name} -->")
    return f"{before}{mark}\n{made}\n<!-- end -->{rest.partition('<!-- end -->')[2]}" if mark else text


def publish(page: Path, name: str, table: str, results: Results) -> None:
    """Puts a table and where it comes from between a page's marks of that name."""
    page.write_text(page_with(page.read_text(), name, "\n\n".join([table, *(provenance(r) for r in results.runs)])))


def _headline(rows: Iterable[Row]) -> str:
    """The step with the most variants, in the columns that matter most."""
    steps = [row for row in _of_kind(rows, "step") if "error" not in row]
    if not steps:
        return ""
    row = max(steps, key=lambda row: len(row["variants"]))
    return f"A step of {tables.step_title(row)}:\n\n{tables.headline_table(row)}"


def _kept(rows: Iterable[Row]) -> str:
    memory = _of_kind(rows, "memory")
    return tables.kept_table(tables.Memories(memory), "github") if memory else ""


def _methods(rows: Iterable[Row]) -> str:
    steps = _of_kind(rows, "step")
    if not steps:
        return ""
    s = tables.setup_in(steps[0])
    size = f"{s.model}, {s.layers} layers × {s.hidden}, T = {s.tokens * s.batch}, {s.dtype}"
    return f"{size}; memory and step × the frozen model's:\n\n{tables.methods_table(steps)}"


def _loss(rows: Iterable[Row]) -> str:
    row = next((row for row in _of_kind(rows, "step") if "error" not in row), None)
    return f"A step of {tables.step_title(row)}:\n\n{tables.loss_table(row)}" if row else ""


PAGE_TABLES = {
    "step": (("gpu", "cpu"), _headline),
    "kept": (("gpu", "cpu"), _kept),
    "methods": (("methods",), _methods),
    "loss": (("loss",), _loss),
}


def _of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


# ------------------------------------------------------------------------------------------------------- figures


def _draw_kept(content: dict[str, Any] | None, folder: Path) -> None:
    """Bars of bytes kept per layer, as a ratio to the floor: one group for each setup."""
    if content is None:
        return
    memories = tables.Memories(content["rows"])
    setups = memories.setups()
    names = [n for n in ("eager", "inductor", "peft_fx") if any(memories.per_layer(s, n) for s in setups)]
    figure, (axes,) = figure_of(1, 1, (max(6.0, 1.1 * len(setups)), 4.0))
    for i, name in enumerate(names):
        heights = [memories.per_layer(s, name) / (memories.floor(s)[1] or float("inf")) for s in setups]
        places = [j + 0.8 * (i + 0.5) / len(names) - 0.4 for j in range(len(setups))]
        axes[0].bar(places, heights, 0.8 / len(names), label=VARIANTS[name].title, color=COLOURS[name])
    axes[0].axhline(1, color=COLOURS["frozen"], linewidth=1, label="floor: the frozen model")
    labels = [
        f"{s.model}\n{s.dtype if s.method == 'lora' else s.method}" + (f"\ndropout {s.dropout:g}" if s.dropout else "")
        for s in setups
    ]
    axes[0].set_xticks(range(len(setups)), labels, fontsize=8)
    axes[0].set_ylabel("bytes kept per layer, × the floor")
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    save(figure, folder / "kept_per_layer.png")


def _draw_tokens(content: dict[str, Any] | None, folder: Path) -> None:
    """Two panels over T: bytes kept for backward, and the peak of a step."""
    if content is None:
        return
    rows = _series(content["rows"])
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


def _series(rows: Iterable[Row]) -> list[Row]:
    """The rows of steps that differ in T alone, most of them first found, shortest first, merged by T."""
    groups: dict[Any, dict[int, Row]] = {}
    for row in _of_kind(rows, "step"):
        if "error" in row:
            continue
        T = row["setup"]["tokens"]
        group = groups.setdefault(replace(tables.setup_in(row), tokens=0), {})
        merged = {**row, "results": {**row["results"], **group.get(T, {}).get("results", {})}}
        group[T] = merged
    longest = max(groups.values(), key=len, default={})
    return [longest[T] for T in sorted(longest)] if len(longest) > 1 else []


def figure_of(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its panels, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Without the date and version that would make equal figures differ."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
