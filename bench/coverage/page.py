"""docs/coverage.md, made of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.coverage.adapters import LEFT_OUT, Method
from bench.coverage.architectures import Architecture
from bench.coverage.numerics import GATE
from bench.coverage.rows import LESS, TABLES, Entry
from bench.report import provenance
from bench.tables import table

Row = Mapping[str, Any]
TITLES = {
    "peft": "PEFT's configurations, each on a block of two layers",
    "architectures": "LoRA on all layers of tiny models, 512 tokens or more",
    "packages": "Adapters of other packages, each on a block of two layers",
}
INTRODUCTION = """\
# Coverage

Made by `python -m bench coverage`; `tests/test_coverage.py` holds the counts to what is told here.

{summary}

- *weight*: sites whose forward is in weight form, of the layers with an adapter. There are more sites than layers
  where a layer is called more than once, or an adapter has an adapter's form inside.
- *input gradient*: those of them whose gradient of the layer's input is in weight form too. A first layer has none, and
  where the adapter comes before the weight it is no sum.
- *refused*: adapters without a weight form, by the code of the reason.
- *error*: against float64, as a multiple of the same model's error in eager mode, the worst of the output and of
  every gradient, pooled over several draws of parameters and inputs. Up to {gate} is held to be no worse. *random*:
  the model draws random numbers, so that two runs cannot be compared. The trained parameters have noise on them that
  makes deltas about as large as W, and the rounding errors of one product are those of a larger matrix, where the
  adapter's own sums, of a few terms, have hardly any. Where that is more than {gate}: in brackets, with {less} of the
  noise.
- *false*: sites and refusals told of the same model without any adapter, all of it trained.
- *kept*: bytes that forward leaves for backward, after and before the rewrite.
"""


def text(runs: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """The whole page."""
    by_table = {name: {r["name"]: r for r in rows if r["table"] == name} for name in TABLES}
    parts = [INTRODUCTION.format(summary=_summary(by_table), gate=GATE, less=LESS)]
    parts += [f"{provenance(dict(run))}\n" for run in runs]
    for name, found in by_table.items():
        if found:
            parts += [f"## {TITLES[name]}\n", _table(TABLES[name], found), ""]
        if name == "peft" and found:
            parts += ["Not in the table:\n", *(f"- {who}: {why}." for who, why in LEFT_OUT.items()), ""]
    parts += _problems(rows)
    return "\n".join(parts).rstrip() + "\n"


def _summary(by_table: Mapping[str, Mapping[str, Row]]) -> str:
    """How many rows of each table are in weight form throughout."""
    lines = []
    for name, found in ((n, f) for n, f in by_table.items() if f):
        states = [state(TABLES[name][n], row) for n, row in found.items()]
        told = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states, key=ORDER.index)))
        lines.append(f"- {name}: {len(states)} rows; {told}.")
    return "\n".join(lines)


FULL, ALREADY, PART, REFUSED, LEFT, FAILED, MISSING = ORDER = (
    "in weight form",
    "in weight form or without a product as their package codes them",
    "in part",
    "refused",
    "left as they are",
    "failed",
    "not installed",
)


def state(entry: Entry, row: Row) -> str:
    """A row in a word: one of `ORDER`."""
    if "missing" in row:
        return MISSING
    if "error" in row:
        return FAILED
    if entry.already:
        return ALREADY
    weight = row["forward"] + row["in_weights"]
    if weight >= row["adapters"]:
        return FULL if row["forward"] else ALREADY
    if weight:
        return PART
    return REFUSED if row["refusals"] else LEFT


def _table(entries: Mapping[str, Entry], rows: Mapping[str, Row]) -> str:
    timed = any("seconds" in row for row in rows.values())
    plain = any("plain" in row for row in rows.values())
    head = ["", "what", "weight", "input gradient", "refused", "error", "kept, KB", "graphs"]
    head += ["false"] * plain + ["time"] * timed
    lines = [_line(name, entry, rows[name], plain, timed) for name, entry in entries.items() if name in rows]
    return table(head, lines, "github", left=2)


def _line(name: str, entry: Entry, row: Row, plain: bool, timed: bool) -> list[str]:
    first = [name, _described(entry)]
    if "missing" in row or "error" in row:
        return [*first, row.get("missing", "fails, see below"), *[""] * (5 + plain + timed)]
    kept = row["kept"]
    cells = [
        _weight(entry, row),
        f"{row['input_grad']}" if row["forward"] else "",
        ", ".join(f"{n} {code}" for code, n in row["refusals"].items()),
        _gate(row.get("gate", {}), row.get("gate of less", {})),
        f"{kept['after'] / 1e3:.0f} / {kept['before'] / 1e3:.0f}" if kept.get("before") else "",
        str(row["graphs"]),
    ]
    cells += [str(row.get("plain", ""))] * plain + [_time(row.get("seconds", {}))] * timed
    return [*first, *cells]


def _described(entry: Entry) -> str:
    if isinstance(entry, Architecture):
        return entry.note
    return f"{entry.formula}" if isinstance(entry, Method) else f"{entry.formula} ({entry.package})"


def _weight(entry: Entry, row: Row) -> str:
    told = f"{row['forward']} of {row['adapters']}" if row["forward"] or not entry.already else ""
    inside = f"{row['in_weights']} by PEFT itself" if row["in_weights"] else ""
    return "; ".join(part for part in (told, inside, entry.already) if part)


def _gate(gate: Row, less: Row) -> str:
    if "error" in gate:
        return "fails"
    if "ratio" not in gate:
        return ""
    ratio = gate["ratio"]
    if ratio is None:
        return "random"
    if ratio <= GATE:
        return f"{ratio:.2f}"
    return f"**{ratio:.2f}** ({_gate(less, {})})" if less else f"**{ratio:.2f}**"


def _time(seconds: Row) -> str:
    """Of Inductor's."""
    return f"{seconds['peft_fx'] / seconds['inductor']:.2f}×" if "inductor" in seconds else ""


def _problems(rows: Iterable[Row]) -> list[str]:
    """What failed, and why there is more than one graph."""
    lines = []
    for row in rows:
        gate = row.get("gate", {})
        told = [row.get("error", ""), *row.get("failures", ()), *(f"graph break: {b}" for b in row.get("breaks", ()))]
        told.append(f"compiled: {gate['error']}" if "error" in gate else "")
        lines += [f"- {row['name']}: {text}" for text in dict.fromkeys(told) if text]
    return ["## What fails, and graph breaks\n", *lines, ""] if lines else []
