"""What was done to a model, as data, as a table, as JSON, as a page."""

from __future__ import annotations

import fnmatch
import glob
import html
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from peft_fx.budgeting import readable
from peft_fx.listing import Lines
from peft_fx.passes.findings import EXACT, REBUILT, ChunkedLoss, KeptInput, Refusal, Site
from peft_fx.step.budget import Held

TEMPLATE = Path(__file__).with_name("report.html")
SLOT = '<script type="application/json" id="report">null</script>'
NO_MARKUP = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}  # in JSON the same, in a page no end of the script
TOLD = ("", "rebuilt", "low_rank", "checkpointed")  # codes that hold of exact keeps as well


@dataclass(frozen=True)
class GradientError:
    """How far a trained parameter's gradient is from that of exact keeps: ‖g - exact‖ / ‖exact‖, and the cosine between
    the two."""

    name: str
    relative: float
    cosine: float


@dataclass(frozen=True)
class Report:
    """Every adapter of a model: as a `Site`, with the forms chosen for it, or as a `Refusal`, with the reason.

    `graphs` is the number of graphs that Dynamo made of the model, `graph_breaks` says why it made more than one,
    `kept_bytes` is what backward keeps of forward's intermediate values, {"before": by Inductor alone, "after": now};
    empty where no graph was trained. `losses` are those computed chunk by chunk; one that could not be is a refusal, by
    the name of the layer that makes the logits. `failures` are graphs that our passes left to Inductor because
    they failed. `inputs` are the values that adapters' gradients read, with what is kept of each, `errors` what lossy
    keeps do to the gradients, where that was measured. `components` are the kept bytes by what keeps them, {"before":
    {"attention": bytes, …}, "after": …}; `nodes` the ATen nodes of each adapter's module as text, for `diff`. `budgets`
    is what was done for a memory budget, graph by graph.
    """

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    kept_bytes: dict[str, int] = field(default_factory=dict)
    losses: list[ChunkedLoss] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    inputs: list[KeptInput] = field(default_factory=list)
    errors: list[GradientError] = field(default_factory=list)
    components: dict[str, dict[str, int]] = field(default_factory=dict)
    budgets: list[Held] = field(default_factory=list)
    nodes: dict[str, dict[str, Lines]] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": [s.to_dict() for s in self.sites],
            "refusals": [r.to_dict() for r in self.refusals],
            "graphs": self.graphs,
            "graph_breaks": self.graph_breaks,
            "kept_bytes": self.kept_bytes,
            "losses": [loss.to_dict() for loss in self.losses],
            "failures": self.failures,
            "inputs": [i.to_dict() for i in self.inputs],
            "errors": [asdict(e) for e in self.errors],
            "components": self.components,
            "budgets": [b.to_dict() for b in self.budgets],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self) -> str:
        """One page that needs no other file and no network: what `str` tells, to sort, to search and to open adapter
        by adapter, with the algebra, FLOPs, bytes and ATen nodes before and after."""
        told = {**self.to_dict(), "nodes": self.nodes}
        data = json.dumps(told, separators=(",", ":")).translate(NO_MARKUP)
        return TEMPLATE.read_text(encoding="utf-8").replace(SLOT, SLOT.replace("null", data), 1)

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame of its own, so that neither's style or script meets the other's."""
        page = html.escape(self.to_html())
        style = "width:100%;height:640px;border:0"
        return f'<iframe sandbox="allow-scripts" style="{style}" title="peft_fx report" srcdoc="{page}"></iframe>'

    def diff(self, name: str) -> None:
        """Prints the ATen nodes of an adapter's module, as written and now, with - and + where they differ.

        `name` is a site's or a refusal's, or a part of it that fits no other: "…" and "*" stand for anything. Raises
        KeyError where it fits none or several, and ValueError where the report is of a compile that already ran: such
        a one keeps no graph.
        """
        if not self.nodes and (self.sites or self.refusals):
            raise ValueError(
                "this report has no nodes: a compile that already ran keeps none. Trace the call instead, as in "
                "peft_fx.explain(model, **batch).diff(name)"
            )
        name = self._named(name)
        print(f"{name}\n\n" + "\n".join(_compared(self.nodes[name])))

    def _named(self, name: str) -> str:
        """The one adapter that a name, or a part of one, fits."""
        if name in self.nodes:
            return name
        pattern = "*".join(map(glob.escape, re.split(r"…|\*", f"…{name}…")))
        found = [known for known in self.nodes if fnmatch.fnmatchcase(known, pattern)]
        found = [known for known in found if known.endswith(name)] or found
        if len(found) == 1:
            return found[0]
        what, some = ("several adapters are", found) if found else ("no adapter is", list(self.nodes))
        raise KeyError(f"{what} called {name!r}: {', '.join(some[:8])}{', …' * (len(some) > 8)}")

    def __str__(self) -> str:
        parts = [self._summary()]
        if self.sites:
            head = ("site", "method", "T×K→N", "r", "forward", "input grad", "adapter grad", "FLOPs", "price")
            parts.append(tabulate([_row(s) for s in self.sites], headers=head, disable_numparse=True))
        if self.losses:
            columns = ("loss of", "rows×vocabulary", "chunks", "logits and gradients alive", "saved")
            parts.append(tabulate([_loss_row(s) for s in self.losses], headers=columns, disable_numparse=True))
        if self.budgets:
            named = ("memory budget", "of it a step", "times", "peak", "kept", "made again", "adds")
            parts.append(tabulate([_budget_row(b) for b in self.budgets], headers=named, disable_numparse=True))
        if self.refusals:
            refused = [(r.name, r.code, r.detail) for r in self.refusals]
            parts.append(tabulate(refused, headers=("refused", "code", "why"), disable_numparse=True))
        if any(i.keep not in (EXACT, REBUILT) for i in self.inputs) or any(i.code not in TOLD for i in self.inputs):
            heads = ("input of", "keeps", "bytes", "exact", "code", "why not")
            parts.append(tabulate([_kept(i) for i in self.inputs], headers=heads, disable_numparse=True))
        if self.errors:
            errors = [(e.name, f"{e.relative:.2e}", f"{e.cosine:.6f}") for e in self.errors]
            parts.append(tabulate(errors, headers=("gradient of", "relative error", "cosine"), disable_numparse=True))
        parts += [f"graph break: {b}" for b in self.graph_breaks]
        parts += [f"left to Inductor untouched: {f}" for f in self.failures]
        return "\n\n".join(parts)

    def _summary(self) -> str:
        # an adapter has a row for each graph that it is in, of training and of evaluation
        refused = {r.name for r in self.refusals if not r.is_about_a_loss}
        found = {s.name for s in self.sites}
        rewritten = {s.name for s in self.sites if "weight" in (s.forward, s.input_grad)}
        text = f"{len(rewritten)} of {len(refused | found)} adapters in weight form"
        if cheaper := {s.name for s in self.sites if s.reason.startswith("cheaper")} - rewritten:
            text += f", {len(cheaper)} in activation form, which is cheaper at their sizes"
        if refused:
            text += f", {len(refused)} refused"
        text += f"; {self.graphs} graph{'s' * (self.graphs != 1)}"
        if self.kept_bytes:
            before, after = (self.kept_bytes[k] / 1e6 for k in ("before", "after"))
            text += f"; kept for backward: {before:.1f} MB by Inductor alone, {after:.1f} MB now"
        return text


def _compared(nodes: dict[str, Lines]) -> Iterator[str]:
    """The lines of both, those that the other lacks marked."""
    for label, other, mark in (("before", "after", "-"), ("after", "before", "+")):
        own, there = nodes[label], nodes[other]
        for direction in (d for d in own if own[d]):
            yield f"{label}, {direction}:"
            yield from (f"{' ' if line in there[direction] else mark} {line}" for line in own[direction])
            yield ""


def _row(s: Site) -> tuple[Any, ...]:
    size = f"{s.tokens}×{s.in_features}→{s.out_features}"
    return s.name, s.method, size, s.rank, s.forward, s.input_grad, s.adapter_grad, _ratio(s.flops), s.reason


def _loss_row(s: ChunkedLoss) -> tuple[Any, ...]:
    before, after = (s.bytes[k] / 1e6 for k in ("before", "after"))
    alive = f"{after:.1f} MB, not {before:.1f}"
    return s.name, f"{s.rows}×{s.vocabulary}", s.chunks, alive, f"{s.saved / 1e6:.1f} MB"


def _budget_row(held: Held) -> tuple[Any, ...]:
    peak, kept = (" → ".join(readable(of[k]) for k in ("before", "after")) for of in (held.peak, held.kept))
    step = readable(max(0, held.budget))
    missed = "" if held.is_held else " (not held)"
    again, adds = f"{held.rebuilt} values", f"{held.seconds * 1e3:.1f} ms"
    return readable(held.asked), step, f"{held.times:.3g}", peak + missed, kept, again, adds


def _kept(i: KeptInput) -> tuple[Any, ...]:
    return i.name, i.keep, i.sizes.get("now", 0), i.sizes.get(EXACT, 0), i.code, i.detail


def _ratio(amounts: dict[str, int]) -> str:
    return f"{amounts['after'] / amounts['before']:.2f}×" if amounts.get("before") else ""
