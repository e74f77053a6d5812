"""The tables of docs/coverage.md, made of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench import tables
from bench.coverage.rows import TABLES, Entry
from bench.experiment import Row
from tests.support.oracle import GATE

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


def _found(name: str, rows: Sequence[Row]) -> list[tuple[str, Entry, Row]]:
    """Name, entry and row of one table, in the order of its entries."""
    by_name = {row["name"]: row for row in rows if row["table"] == name}
    return [(n, entry, by_name[n]) for n, entry in TABLES[name].items() if n in by_name]


def summary(rows: Sequence[Row], style: str) -> str:
    """How many rows of each table are in weight form throughout."""
    lines = []
    for name in TABLES:
        states = sorted((state(entry, row) for _, entry, row in _found(name, rows)), key=ORDER.index)
        told = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        lines += [f"- {name}: {len(states)} rows; {told}."] if states else []
    return "\n".join(lines)


COLUMNS = {
    "weight": lambda entry, row: _weight(entry, row),
    "input gradient": lambda entry, row: f"{row['input_grad']}" if row["forward"] else "",
    "refused": lambda entry, row: ", ".join(f"{n} {code}" for code, n in row["refusals"].items()),
    "error": lambda entry, row: _gate(row.get("gate", {}), row.get("gate of less", {})),
    "kept, KB": lambda entry, row: _kept(**row["kept"]) if row["kept"] else "",
    "graphs": lambda entry, row: str(row["graphs"]),
    "false": lambda entry, row: str(row.get("plain", "")),
    "time": lambda entry, row: _time(row.get("seconds", {})),
}
IF_MEASURED = {"false": "plain", "time": "seconds"}  # columns that are there where a row has that


def table(name: str, rows: Sequence[Row], style: str) -> str:
    found = _found(name, rows)
    measured = {key for _, _, row in found for key in row}
    columns = {c: cell for c, cell in COLUMNS.items() if IF_MEASURED.get(c, "name") in measured}
    lines = [[n, entry.described, *_cells(columns, entry, row)] for n, entry, row in found]
    return tables.table(["", "what", *columns], lines, style, left=2) if found else ""


def _cells(columns: dict[str, Any], entry: Entry, row: Row) -> list[str]:
    if "missing" in row or "error" in row:
        return [row.get("missing", "fails, see below"), *[""] * (len(columns) - 1)]
    return [cell(entry, row) for cell in columns.values()]


def _weight(entry: Entry, row: Row) -> str:
    told = f"{row['forward']} of {row['adapters']}" if row["forward"] or not entry.already else ""
    inside = f"{row['in_weights']} by PEFT itself" if row["in_weights"] else ""
    return "; ".join(part for part in (told, inside, entry.already) if part)


def _kept(before: int, after: int, **_: Any) -> str:
    return f"{after / 1e3:.0f} / {before / 1e3:.0f}" if before else ""


def _gate(gate: dict[str, Any], less: dict[str, Any]) -> str:
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


def _time(seconds: dict[str, float]) -> str:
    """Of Inductor's."""
    return f"{seconds['peft_fx'] / seconds['inductor']:.2f}×" if "inductor" in seconds else ""


def problems(rows: Sequence[Row], style: str) -> str:
    """What failed, and why there is more than one graph."""
    lines = []
    for row in rows:
        gate = row.get("gate", {})
        told = [row.get("error", ""), *row.get("failures", ()), *(f"graph break: {b}" for b in row.get("breaks", ()))]
        told.append(f"compiled: {gate['error']}" if "error" in gate else "")
        lines += [f"- {row['name']}: {text}" for text in dict.fromkeys(told) if text]
    return "\n".join(lines)


MARKS = {
    "coverage": summary,
    **{f"coverage {name}": partial(table, name) for name in TABLES},
    "coverage problems": problems,
}
