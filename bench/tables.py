"""Tables of rows: of each command, and of the report. Megabytes are 1e6 bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from bench import kept
from bench.models import Setup
from bench.results import request
from bench.variants import VARIANTS

Row = dict[str, Any]
RELU = "frozen + ReLU outputs"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str, left: int = 1) -> str:
    """The first `left` columns are text, the others numbers."""
    align = ["left"] * left + ["right"] * (len(head) - left)
    return tabulate(rows, headers=head, tablefmt=style, disable_numparse=True, colalign=align if rows else None)


def setup_in(row: Row) -> Setup:
    return Setup(**row["setup"])


# -------------------------------------------------------------------------------------------------------- memory


class Memories:
    """Rows of the `memory` command, found by setup and variant."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = {(setup_in(r), *r["variants"]): r for r in rows if r["kind"] == "memory"}

    def setups(self) -> list[Setup]:
        """Those of adapters, in the order measured."""
        return list(dict.fromkeys(setup for setup, *_ in self.rows if setup.rank))

    def samples(self, setup: Setup, name: str) -> list[dict[str, Any]]:
        """One sample for each depth, shallowest first; none where it was not measured, or failed."""
        asked = Setup(**request("memory", setup, [name])["setup"])
        found = self.rows.get((asked, name), {}).get("samples", [])
        return sorted(found, key=lambda s: s["layers"])

    def per_layer(self, setup: Setup, name: str) -> float:
        """Bytes that one more layer keeps for backward; 0 where not known."""
        return _slope(self.samples(setup, name), lambda sample: sample["kept"])

    def floor(self, setup: Setup) -> tuple[str, float]:
        """Name and bytes per layer of the least that an adapted layer can keep.

        That is what the frozen model keeps; but an adapter after a ReLU needs its input [T, K], of which the frozen
        model keeps only the sign: there the input stands in place of the mask, an element of the base's dtype for a
        byte.
        """
        samples = self.samples(setup, "frozen")
        if not (setup.family.relu and setup.targets == "all-linear"):
            return "frozen", _slope(samples, lambda s: s["kept"])
        more = setup.itemsize - 1
        return RELU, _slope(samples, lambda s: s["kept"] + more * kept.masks(s["tensors"], setup.ffn))


def _slope(samples: Sequence[dict[str, Any]], value: Any) -> float:
    if len(samples) < 2:
        return 0.0
    first, last = samples[0], samples[-1]
    return (value(last) - value(first)) / (last["layers"] - first["layers"])


def kept_table(memories: Memories, style: str = "simple") -> str:
    """Bytes kept per layer, as a ratio to the floor."""
    names = _named(memories)
    rows = []
    for setup in memories.setups():
        name, floor = memories.floor(setup)
        ratios = [_ratio(memories.per_layer(setup, n), floor) for n in names]
        rows.append([*_label(setup), name, _megabytes(floor), *ratios])
    return table(["model", "T", "dtype", "dropout", "floor", "floor, MB", *names], rows, style, left=5)


def peak_table(memories: Memories, style: str = "simple") -> str:
    """Most bytes allocated in a step at the larger depth, as a ratio to the frozen model's."""
    names = _named(memories)
    rows = []
    for setup in memories.setups():
        peaks = {n: s[-1]["peak"] for n in ("frozen", *names) if (s := memories.samples(setup, n))}
        floor = peaks.get("frozen", 0)
        rows.append([*_label(setup), _megabytes(floor), *(_ratio(peaks.get(n, 0), floor) for n in names)])
    return table(["model", "T", "dtype", "dropout", "frozen, MB", *names], rows, style, left=4)


def _named(memories: Memories) -> list[str]:
    present = {name for _, name in memories.rows}
    return [name for name in VARIANTS if name in present and name != "frozen"]


def _label(setup: Setup) -> tuple[str, ...]:
    size = f"{setup.model} {setup.layers}×{setup.hidden}" + (", attention" if setup.targets == "attention" else "")
    size += f", {setup.method}" if setup.method != "lora" else ""
    return size, str(setup.tokens * setup.batch), setup.dtype, f"{setup.dropout:g}"


def kept_tensors_table(memories: Memories, setup: Setup, name: str, style: str = "simple", most: int = 12) -> str:
    """What one more layer keeps, by dtype and shape: the difference between the two depths."""
    shallow, *_, deep = memories.samples(setup, name)
    layers = deep["layers"] - shallow["layers"]
    before = {(t["dtype"], tuple(t["shape"])): t for t in shallow["tensors"]}
    none = {"count": 0, "bytes": 0}
    rows = []
    for t in deep["tensors"]:
        old = before.get((t["dtype"], tuple(t["shape"])), none)
        count, size = (t["count"] - old["count"]) / layers, (t["bytes"] - old["bytes"]) / layers
        if size > 0.001 * deep["kept"] / layers:  # not the handful of single numbers
            rows.append((size, [t["dtype"], "×".join(map(str, t["shape"])), f"{count:g}", _megabytes(size)]))
    rows.sort(key=lambda row: -row[0])
    return table(["dtype", "shape", "a layer", "MB a layer"], [row for _, row in rows[:most]], style, left=2)


# ---------------------------------------------------------------------------------------------------------- time


def step_table(row: Row, style: str = "simple") -> str:
    """Memory, time and compile time of each variant of one `time` row; ratios are medians of paired rounds."""
    setup, results = setup_in(row), row["results"]
    frozen, inductor = results.get("frozen", {}), results.get("inductor", results.get("inductor-loss", {}))
    rows = []
    for name in row["variants"]:
        measured = results[name]
        if "error" in measured:
            rows.append([name, measured["error"], *[""] * 10])
            continue
        seconds = statistics.median(measured["times"])
        peak, kept_bytes = measured["peak"], measured["kept"]
        own = frozen.get("peak", 0) + measured["gradients"]
        rows.append(
            [
                name,
                _megabytes(kept_bytes),
                _ratio(kept_bytes, frozen.get("kept", 0)),
                _megabytes(peak),
                _ratio(peak, frozen.get("peak", 0)),
                _ratio(peak, own if frozen else 0),
                f"{1e3 * seconds:.0f}",
                _paired(measured, frozen),
                _paired(measured, inductor),
                f"{setup.tokens * setup.batch / seconds:.0f}",
                f"{measured['first_step_s']:.1f}",
                f"{measured['passes_s']:.2f}" if "passes_s" in measured else "",
            ]
        )
    head = ("", "kept, MB", "× frozen", "peak, MB", "× frozen", "× frozen + own gradients", "step, ms", "× frozen")
    return table([*head, "× inductor", "tokens/s", "first step, s", "our passes, s"], rows, style)


def headline_table(row: Row) -> str:
    """Of a `time` row, for a page: memory kept, peak, and time, each with its ratio."""
    results = row["results"]
    frozen, inductor = results.get("frozen", {}), results.get("inductor", {})
    lines = []
    for name in row["variants"]:
        m = results[name]
        if "error" in m:
            continue
        kept_ratio, peak_ratio = (_ratio(m[k], frozen.get(k, 0)) for k in ("kept", "peak"))
        times = f"{1e3 * statistics.median(m['times']):.0f} ms"
        sizes = [f"{_megabytes(m['kept'])} MB", kept_ratio, f"{_megabytes(m['peak'])} MB", peak_ratio]
        lines.append([VARIANTS[name].title, *sizes, times, _paired(m, frozen), _paired(m, inductor)])
    head = ["", "kept", "× frozen", "peak", "× frozen", "step", "× frozen", "× Inductor"]
    return table(head, lines, "github")


def loss_table(row: Row) -> str:
    """Of a `step` row of losses, for a page: memory kept, peak, and time, each beside Inductor alone."""
    results = row["results"]
    plain = results["inductor-loss"]
    lines = []
    for name in row["variants"]:
        m = results[name]
        if "error" not in m:
            sizes = [text for k in ("kept", "peak") for text in (f"{_megabytes(m[k])} MB", _ratio(m[k], plain[k]))]
            times = [f"{1e3 * statistics.median(m['times']):.0f} ms", _paired(m, plain)]
            lines.append([VARIANTS[name].title, *sizes, *times])
    return table(["", "kept", "× Inductor", "peak", "× Inductor", "step", "× Inductor"], lines, "github")


def methods_table(rows: Iterable[Row]) -> str:
    """Of `time` rows of several methods, for a page: what Inductor and peft_fx keep, and peft_fx's time."""
    lines = []
    for row in rows:
        frozen, inductor, ours = (row["results"].get(name, {}) for name in ("frozen", "inductor", "peft_fx"))
        if not all("times" in m for m in (frozen, inductor, ours)):
            continue
        memory = [_ratio(m[k], frozen[k]) for k in ("kept", "peak") for m in (inductor, ours)]
        lines.append([setup_in(row).method, *memory, _paired(inductor, frozen), _paired(ours, frozen)])
        lines[-1].append(_paired(inductor, ours))
    head = ["", "Inductor keeps", "peft_fx keeps", "Inductor's peak", "peft_fx's peak", "Inductor's step"]
    return table([*head, "peft_fx's step", "faster by"], lines, "github") if lines else ""


def step_title(row: Row) -> str:
    """What the step is of, for the line above the table."""
    s = setup_in(row)
    adapters = f"{s.method} of rank {s.rank} on {s.targets}, dropout {s.dropout:g}"
    return f"{s.model}, {s.layers} layers × {s.hidden}, T = {s.tokens * s.batch}, {s.dtype}, {adapters}, {s.optimizer}"


def _paired(measured: dict[str, Any], other: dict[str, Any]) -> str:
    """Median over the rounds of the ratio of two variants' seconds in the same round."""
    if "times" not in other:
        return ""
    return f"{paired(measured['times'], other['times']):.2f}×"


def paired(mine: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}" if size else "–"


def _ratio(size: float, floor: float) -> str:
    return f"{size / floor:.2f}×" if size and floor else "–"
