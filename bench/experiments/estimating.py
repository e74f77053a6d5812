"""`python -m bench estimate` and `long-context`: what `peft_fx.estimate` says of steps that were measured, and of those
that nobody here can measure. No weight exists, nothing is computed."""

from __future__ import annotations

import json
import statistics
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft_fx
from bench import tables
from bench.experiment import Experiment, Request, Row, Say, Session, option
from bench.report import KNOWN
from bench.results import FOLDER, ROOT, request
from bench.variants import FLOORS
from peft_fx import configs, estimates
from peft_fx.estimating import VARIANTS
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.sizing import without_mask
from zoo.models import Setup, make_base, make_batch, precision, with_adapters

# ---------------------------------------------------------------------------------------------- what was measured


def _measured(args: Namespace, session: Session) -> list[Row]:
    paths = args.files or [path for name in KNOWN if (path := FOLDER / f"{name}.json").exists()]
    found = [pair for path in paths for pair in measured_in(json.loads(path.read_text()))]
    sizes = {json.dumps(asked): size for asked, size in found}

    def estimated(asked: Request, say: Say) -> Row:
        return {"measured": sizes[json.dumps(asked)], "estimated": _estimated(asked)}

    requests = [asked for asked, _ in found]
    return session.measure(requests, estimated, only=requests)


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


def _samples(row: Row) -> Iterator[tuple[Setup, str, dict[str, Any]]]:
    setup = tables.setup_in(row)
    for sample in row.get("samples", ()):  # of memory
        yield replace(setup, layers=sample["layers"]), row["variants"][0], sample
    for name, measured in row.get("results", {}).items():  # of steps
        yield setup, name, measured


def _estimated(asked: Request) -> dict[str, dict[str, int]]:
    setup, names = replace(Setup(**asked["setup"]), device="cpu"), asked["variants"]
    base = make_base(setup)
    model = base if all(name in FLOORS for name in names) else with_adapters(base, setup)
    with precision(setup):
        found = peft_fx.estimate(model, machine=asked["machine"], variants=names, **make_batch(setup))
    on_top = {row.name: row.peak_bytes - row.weight_bytes - row.optimizer_bytes for row in found.rows}  # as measured
    return {row.name: {"kept": row.kept_bytes, "peak": on_top[row.name]} for row in found.rows}


def _off(rows: Sequence[Row], style: str) -> str:
    """How far the estimates are off, by variant: the middle one, the worst below and above, and how many are near."""
    lines = []
    for name in VARIANTS:
        found = [(row["estimated"][name], row["measured"][name]) for row in rows if name in row["measured"]]
        kept, peak = ([told[what] / size[what] for told, size in found] for what in ("kept", "peak"))
        if peak:
            near = sum(abs(ratio - 1) <= 0.1 for ratio in peak)
            kept_told, worst = (f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in (kept, peak))
            lines.append((name, str(len(peak)), kept_told, f"{statistics.median(peak):.2f}", worst, str(near)))
    head = ("variant", "steps", "kept, × measured", "peak, × measured", "from … to", "within 10 %")
    return tables.table(head, lines, style)


ESTIMATE = Experiment(
    name="estimate",
    text="""\
Estimated memory against measured.

Takes the kept bytes and the peak of a step that bench/results has of the suites, each of every
setup and variant that `peft_fx.estimate` knows too, and puts beside them what it says of the same model. Nothing is
measured.
""",
    arguments=(option("files", nargs="*", type=Path, metavar="FILE", help="results (default: the suites')"),),
    measured=_measured,
    tables={"estimate": _off},
    page="benchmarks.md",
)

# ------------------------------------------------------------------------------------------------- long contexts

MODELS = ROOT.parent / "examples" / "configs"
LENGTHS = (131072, 2048)
LONG_VARIANTS = ("inductor", "peft_fx", "peft_fx-loss", "inductor-ckpt", "peft_fx-ckpt-loss", "full", "frozen")
GPU = 80e9  # bytes that the longest sequence is asked for


def _long(args: Namespace, session: Session) -> list[Row]:
    requests = [
        {"kind": "estimate", "model": path.stem, "targets": targets, "tokens": T, "variants": list(LONG_VARIANTS)}
        for T in LENGTHS
        for path in sorted(MODELS.glob("llama-*.json"))
        for targets in configs.TARGETS
    ]
    return session.measure(requests, _of_config, only=requests)


def _of_config(asked: Request, say: Say) -> Row:
    model = without_mask(configs.adapted_model(MODELS / f"{asked['model']}.json", targets=asked["targets"]))
    batch = configs.batch_of(model, asked["tokens"])
    return {"estimated": peft_fx.estimate(model, machine="h100", variants=asked["variants"], **batch).to_dict()}


def _of(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, estimates.Estimate]]:
    """Model, what its adapters are on, T, and the estimate; in order."""
    for row in sorted(rows, key=lambda row: (row["model"], configs.TARGETS.index(row["targets"]), row["tokens"])):
        stored = [{k: v for k, v in r.items() if k != "peak_bytes"} for r in row["estimated"]["variants"]]
        estimate = estimates.Estimate([estimates.Row(**r) for r in stored], row["estimated"]["machine"])
        yield row["model"], row["targets"], str(row["tokens"]), estimate


def _peaks(rows: Iterable[Row], style: str) -> str:
    """Gigabytes at the highest point of a step, all told."""
    lines = []
    for *about, estimate in _of(rows):
        peaks = {r.name: f"{r.peak_bytes / 1e9:.1f}" for r in estimate.rows}
        lines.append([*about, *(peaks[name] for name in LONG_VARIANTS)])
    return tables.table(("model", "adapters on", "T", *LONG_VARIANTS), lines, style, left=2)


def _parts(rows: Iterable[Row], style: str) -> str:
    """What backward keeps, in units of the weights, by what reads it."""
    lines = []
    components = ("attention", "MLP", "norms", "logits and loss", "adapters")
    for *about, estimate in _of(rows):
        for r in (r for r in estimate.rows if r.name in ("inductor", "peft_fx", "peft_fx-loss")):
            sizes = (*(r.components.get(c, 0) for c in components), r.kept_bytes)
            lines.append([*about, r.name, *(f"{size / r.weight_bytes:.2f}" for size in sizes)])
    return tables.table(("model", "adapters on", "T", "variant", *components, "all"), lines, style, left=4)


def _fits(rows: Iterable[Row], style: str) -> str:
    """The longest sequence in the memory of one GPU, on the line through the lengths estimated."""
    lines, found = [], list(_of(rows))
    for about in dict.fromkeys((model, targets) for model, targets, _, _ in found):
        mine = [estimate for *whose, _, estimate in found if tuple(whose) == about]
        if len(mine) == len(LENGTHS):
            whole = estimates.Estimate([r for e in mine for r in e.rows], mine[0].machine)
            longest = whole.largest(GPU)
            lines.append([*about, *(str(longest[name]) for name in LONG_VARIANTS), str(whole.crossover() or "none")])
    return tables.table(("model", "adapters on", *LONG_VARIANTS, "inductor above full from"), lines, style, left=2)


LONG = Experiment(
    name="long-context",
    text="""\
Memory at up to 131072 tokens, estimated.

The memory of a training step of Llamas of 1, 3 and 8 billion parameters, LoRA of rank 16 on all linear layers or on
attention's alone, one sequence, by `peft_fx.estimate`: no weight exists, nothing is computed. What was
estimated already, from the same source, is kept.
""",
    measured=_long,
    tables={"long-context": _peaks, "long-context parts": _parts, "long-context fits": _fits},
    page="long-context.md",
    fresh=False,
)
