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
from peft_fx.cli import configs
from peft_fx.estimates import Estimate, joined
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.variants import VARIANTS, WITHIN
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
            kept_told, worst = (f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in (kept, peak))
            near = sum(abs(ratio - 1) <= 0.1 for ratio in peak)
            lines.append((name, str(len(peak)), kept_told, f"{statistics.median(peak):.2f}", worst, str(near)))
    head = ("variant", "steps", "kept, × measured", "peak, × measured", "from … to", "within 10 %")
    return tables.table(head, lines, style)


ESTIMATE = Experiment(
    name="estimate",
    text="Estimated memory against measured.\n\nOf each step of the suites' results that `peft_fx.estimate` knows too.",
    arguments=(option("files", nargs="*", type=Path, metavar="FILE", help="results (default: the suites')"),),
    measured=_measured,
    tables={"estimate": _off},
    page="benchmarks.md",
)

# ------------------------------------------------------------------------------------------------- long contexts

MODELS = ROOT.parent / "examples" / "configs"
LENGTHS = (131072, 2048)
PLAIN = ("eager", "inductor", "peft_fx", "peft_fx-loss", "inductor-ckpt", "peft_fx-ckpt-loss", *WITHIN)
LONG_VARIANTS = (*PLAIN, "full", "frozen")
GPUS = {"rtx4090": (16, 24), "h100": (80,)}  # GB that the longest sequence is asked for
NF4 = 4.127 / 16  # of bfloat16, the scales of blocks among it


def _long(args: Namespace, session: Session) -> list[Row]:
    requests = [
        {"kind": "estimate", "model": path.stem, "tokens": T, "machine": machine, "variants": list(LONG_VARIANTS)}
        for T in LENGTHS
        for path in sorted(MODELS.glob("llama-*.json"))
        for machine in GPUS
    ]
    return session.measure(requests, _of_config, only=requests)


def _of_config(asked: Request, say: Say) -> Row:
    model = configs.without_mask(configs.adapted_model(MODELS / f"{asked['model']}.json"))
    batch = configs.batch_of(model, asked["tokens"])
    found = peft_fx.estimate(model, machine=asked["machine"], variants=asked["variants"], **batch)
    layers = [m.base_layer.weight.nbytes for m in model.modules() if hasattr(m, "base_layer")]
    return {"estimated": found.to_dict(), "adapted_bytes": sum(layers), "largest_bytes": max(layers)}


def _of(rows: Iterable[Row]) -> dict[tuple[str, str], Estimate]:
    """The estimate for all T, by model and machine."""
    found: dict[tuple[str, str], list[Estimate]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["machine"], row["tokens"])):
        told = found.setdefault((row["model"], row["machine"]), [])
        told.append(Estimate.from_dict(row["estimated"]))
    return {about: joined(told) for about, told in found.items()}


def _peaks(rows: Iterable[Row], style: str) -> str:
    """Gigabytes at the highest point of a step, all told."""
    lines = []
    for (model, machine), estimate in _of(rows).items():
        for T in sorted(LENGTHS) if machine == "h100" else ():
            peaks = {r.name: f"{r.peak_bytes / 1e9:.1f}" for r in estimate.within(0).rows if r.tokens == T}
            lines.append([model, str(T), *(peaks[name] for name in LONG_VARIANTS)])
    return tables.table(("model", "T", *LONG_VARIANTS), lines, style)


def _parts(rows: Iterable[Row], style: str) -> str:
    """What backward keeps, in units of the weights, by what reads it."""
    lines = []
    components = ("attention", "MLP", "norms", "logits and loss", "adapters")
    for (model, machine), estimate in _of(rows).items():
        for r in (r for r in estimate.rows if machine == "h100" and r.name in ("inductor", "peft_fx", "peft_fx-loss")):
            sizes = (*(r.components.get(c, 0) for c in components), r.kept_bytes)
            lines.append([model, str(r.tokens), r.name, *(f"{size / r.weight_bytes:.2f}" for size in sizes)])
    return tables.table(("model", "T", "variant", *components, "all"), lines, style, left=3)


def _fits(rows: Sequence[Row], style: str) -> str:
    """The longest sequence in the memory of a GPU, on the line through the lengths estimated; and by 4-bit weights, of
    which one layer's are there in full while it is computed."""
    sizes = {row["model"]: (row["adapted_bytes"], row["largest_bytes"]) for row in rows}
    lines = []
    for (model, machine), estimate in _of(rows).items():
        adapted, largest = sizes[model]
        for base, less in (("bf16", 0), ("4-bit", adapted * (1 - NF4) - largest)):
            for memory in GPUS[machine]:
                longest = estimate.largest(memory * 1e9 + less)
                lines.append([model, base, f"{machine}, {memory} GB", *(str(longest[name]) for name in PLAIN)])
    return tables.table(("model", "weights", "GPU", *PLAIN), lines, style, left=3)


LONG = Experiment(
    name="long-context",
    text="""\
Memory at up to 131072 tokens, estimated.

A training step of Llamas of 1, 3 and 8 billion parameters, LoRA of rank 16 on all linear layers, one sequence, by
`peft_fx.estimate`: no weight exists, nothing is computed. What was estimated already, from the same source, is kept.
""",
    measured=_long,
    tables={"long-context": _peaks, "long-context parts": _parts, "long-context fits": _fits},
    page="long-context.md",
    fresh=False,
)
