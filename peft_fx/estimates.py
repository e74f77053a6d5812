"""What a training step takes, by variant and number of tokens: as data, as a table, as JSON, as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

PARTS = ("weight_bytes", "adapter_grad_bytes", "optimizer_bytes", "kept_bytes", "transient_bytes")


@dataclass(frozen=True)
class Row:
    """A training step of one variant at `tokens` tokens: bytes, and seconds by the machine's model.

    `adapter_grad_bytes` are the gradients of all that is trained, `kept_bytes` what forward leaves for backward,
    `components` the same by what reads it there. `transient_bytes` is the step's peak above all of these; below zero
    where they are never all alive, as when gradients of a whole model are made while what forward kept is let go of.
    """

    name: str
    tokens: int
    weight_bytes: int
    adapter_grad_bytes: int
    optimizer_bytes: int
    kept_bytes: int
    transient_bytes: int
    seconds: float
    components: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class Estimate:
    """What training takes: a row for each variant and number of tokens. `left_out` says why a variant has none.

    `frontier` are the choices that there are between memory and time, of the variants that have several: rows of one
    name and number of tokens.
    """

    rows: list[Row]
    machine: str
    left_out: dict[str, str] = field(default_factory=dict)
    frontier: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        told = {"machine": self.machine, "variants": [r.to_dict() for r in self.rows], "left_out": self.left_out}
        return told | ({"frontier": [r.to_dict() for r in self.frontier]} if self.frontier else {})

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Estimate:
        """An equal one, of what `to_dict` gives."""
        names = {field.name for field in fields(Row)}
        rows, frontier = (
            [Row(**{k: v for k, v in row.items() if k in names}) for row in told.get(key, ())]
            for key in ("variants", "frontier")
        )
        return cls(rows, told["machine"], dict(told["left_out"]), frontier)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def within(self, bytes_: float) -> Estimate:
        """With a row for each variant of the frontier and number of tokens: the quickest step whose peak is within so
        many bytes; the one that takes least where none is."""
        of: dict[tuple[int, str], list[Row]] = {}
        for row in self.frontier:
            of.setdefault((row.tokens, row.name), []).append(row)
        plain = [r for r in self.rows if (r.tokens, r.name) not in of]
        rows = sorted([*plain, *(_within(rows, bytes_) for rows in of.values())], key=lambda r: r.tokens)
        return replace(self, rows=rows)

    def largest(self, bytes_: float) -> dict[str, int]:
        """The most tokens whose peak is within so many bytes, by variant: in a straight line between the lengths
        estimated, and past the last two of them; 0 where not even the first fits."""
        least = self.within(0)
        return {name: _largest(points, bytes_) for name, points in least._series().items()}

    def crossover(self, name: str = "inductor", other: str = "full") -> int | None:
        """The fewest tokens, of those estimated, at which one variant's peak is above another's."""
        peaks = self._series()
        pairs = zip(peaks.get(name, []), peaks.get(other, []), strict=False)
        return next((tokens for (tokens, mine), (_, theirs) in pairs if mine > theirs), None)

    def _series(self) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for row in sorted(self.rows, key=lambda r: r.tokens):
            found.setdefault(row.name, []).append((row.tokens, row.peak_bytes))
        return found

    def __str__(self) -> str:
        parts = []
        for tokens in dict.fromkeys(r.tokens for r in self.rows):
            rows = [r for r in self.rows if r.tokens == tokens]
            unit, size = unit_of(r.peak_bytes for r in rows)
            head = (f"T = {tokens}, {unit}", "peak", "weights", "gradients", "optimiser", "kept", "transient", "step")
            lines = [(r.name, *(f"{n / size:.2f}" for n in _sizes(r)), duration(r.seconds)) for r in rows]
            align = ("left", *["right"] * 7)
            parts.append(tabulate(lines, headers=head, disable_numparse=True, colalign=align))
        parts += [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        parts.append(f"Seconds by the model of {self.machine}.")
        return "\n\n".join(parts)

    def save_figure(self, path: str | Path) -> None:
        """Draws peak and seconds against T, or the parts of the peak where there is one T alone; needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        several = len({r.tokens for r in self.rows}) > 1
        panels = 1 + (several or bool(self.frontier))
        figure, axes = pyplot.subplots(1, panels, figsize=(11, 4), layout="constrained", squeeze=False)
        (_draw_lines if several else _draw_bars)(self, axes[0])
        if self.frontier and not several:
            _draw_frontier(self, axes[0, 1])
        figure.savefig(path, dpi=150, metadata={"Software": None})
        pyplot.close(figure)


def _sizes(row: Row) -> tuple[int, ...]:
    return (row.peak_bytes, *(getattr(row, part) for part in PARTS))


def unit_of(sizes: Iterable[int]) -> tuple[str, float]:
    """GB for what is large, else MB."""
    return ("GB", 1e9) if max(sizes, default=0) >= 1e9 else ("MB", 1e6)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def joined(found: Sequence[Estimate]) -> Estimate:
    """One of several: their rows one after the other."""
    rows, frontier = ([row for e in found for row in getattr(e, kind)] for kind in ("rows", "frontier"))
    left_out = {name: why for e in found for name, why in e.left_out.items()}
    return Estimate(rows, next((e.machine for e in found if e.rows), ""), left_out, frontier)


def _within(rows: Sequence[Row], bytes_: float) -> Row:
    """On the line through the choices that are quickest for their memory. Between two of them some layers are as in the
    one and the others as in the other."""
    (last, *line) = quickest(rows)
    for row in line:
        if last.peak_bytes <= bytes_:
            return last
        if row.peak_bytes <= bytes_:
            return _between(last, row, (last.peak_bytes - bytes_) / (last.peak_bytes - row.peak_bytes))
        last = row
    return last


def quickest(rows: Iterable[Row]) -> list[Row]:
    """Of choices those from the quickest to the one with the lowest peak, of which none takes as long, or more, as some
    layers by one of the others and the rest by another would."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.seconds, r.peak_bytes)):
        if found and row.peak_bytes >= found[-1].peak_bytes:
            continue
        while len(found) > 1 and _slope(found[-2], row) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(row)
    return found


def _slope(a: Row, b: Row) -> float:
    """Seconds that a byte less takes."""
    return (b.seconds - a.seconds) / (a.peak_bytes - b.peak_bytes)


def _between(a: Row, b: Row, share: float) -> Row:
    def mixed(x: float, y: float) -> float:
        return x + (y - x) * share

    names = dict.fromkeys((*a.components, *b.components))
    parts = {k: round(mixed(a.components.get(k, 0), b.components.get(k, 0))) for k in names}
    kept = sum(parts.values())
    rest = math.floor(mixed(a.peak_bytes, b.peak_bytes)) - (a.peak_bytes - a.transient_bytes - a.kept_bytes) - kept
    seconds = mixed(a.seconds, b.seconds)
    return replace(a, kept_bytes=kept, transient_bytes=rest, seconds=seconds, components=parts)


def _largest(points: list[tuple[int, int]], bytes_: float) -> int:
    if not points or points[0][1] > bytes_:
        return 0
    if len(points) == 1:
        return points[0][0]
    after = next((i for i, (_, peak) in enumerate(points) if peak > bytes_), len(points) - 1)
    (t, low), (u, high) = points[after - 1 : after + 1]
    return int(t + (bytes_ - low) / (high - low) * (u - t)) if high > low else u


def _draw_lines(estimate: Estimate, panels: Any) -> None:
    unit, size = unit_of(r.peak_bytes for r in estimate.rows)
    for name in dict.fromkeys(r.name for r in estimate.rows):
        rows = sorted((r for r in estimate.rows if r.name == name), key=lambda r: r.tokens)
        tokens = [r.tokens for r in rows]
        style = {"frozen": "k--", "full": "k:"}.get(name, "o-")
        panels[0].plot(tokens, [r.peak_bytes / size for r in rows], style, label=name, markersize=3)
        panels[1].plot(tokens, [r.seconds for r in rows], style, markersize=3)
    for panel, text in zip(panels, (f"peak of a step, {unit}", "seconds of a step"), strict=True):
        panel.set(xlabel="T, tokens", ylabel=text, yscale="log")
        panel.set_xscale("log", base=2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)


def _draw_frontier(estimate: Estimate, panel: Any) -> None:
    """Seconds against memory: variants as points, the choices of one as a line."""
    unit, size = unit_of(r.peak_bytes for r in (*estimate.rows, *estimate.frontier))
    lines = dict.fromkeys(r.name for r in estimate.frontier)
    for row in (r for r in estimate.rows if r.name not in lines):
        panel.plot(row.peak_bytes / size, row.seconds, "o", markersize=4)
        panel.annotate(row.name, (row.peak_bytes / size, row.seconds), fontsize=7)
    for name in lines:
        rows = quickest(r for r in estimate.frontier if r.name == name)
        panel.plot([r.peak_bytes / size for r in rows], [r.seconds for r in rows], ".-", label=name)
    panel.set(xlabel=f"peak of a step, {unit}", ylabel="seconds of a step")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)


def _draw_bars(estimate: Estimate, panels: Any) -> None:
    unit, size = unit_of(r.peak_bytes for r in estimate.rows)
    names = [r.name for r in estimate.rows]
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [max(0, getattr(r, part)) / size for r in estimate.rows]
        panels[0].barh(names, widths, left=left, label=part.removesuffix("_bytes").replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panels[0].invert_yaxis()
    panels[0].set(xlabel=unit)
    panels[0].legend(frameon=False, fontsize=8)
