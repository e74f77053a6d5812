"""Tables of rows: of each command, and of the report. Megabytes are 1e6 bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from bench.experiment import Row
from bench.results import request
from bench.variants import VARIANTS
from zoo.models import Setup

RELU = "frozen + ReLU outputs"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str, left: int = 1) -> str:
    """The first `left` columns are text, the others numbers."""
    align = ["left"] * left + ["right"] * (len(head) - left)
    return tabulate(rows, headers=head, tablefmt=style, disable_numparse=True, colalign=align if rows else None)


def of_columns(columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any], style: str, left: int = 1) -> str:
    """A column each: its head, and its cell of a row."""
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows], style, left)


def setup_in(row: Row) -> Setup:
    return Setup(**row["setup"])


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


# -------------------------------------------------------------------------------------------------------- memory


class BySetup:
    """Rows of one kind, each of one variant; those without adapters serve every setup that they are the floor of."""

    def __init__(self, rows: Iterable[Row], kind: str):
        self.kind = kind
        self.rows = {(setup_in(r), *r["variants"]): r for r in of_kind(rows, kind) if "error" not in r}

    def setups(self) -> list[Setup]:
        """Those of adapters, in the order measured."""
        return list(dict.fromkeys(setup for setup, _ in self.rows if setup.rank))

    def row(self, setup: Setup, name: str) -> Row | None:
        return self.rows.get((Setup(**request(self.kind, setup, [name])["setup"]), name))


class Memories(BySetup):
    """Rows of memory."""

    def __init__(self, rows: Iterable[Row]):
        super().__init__(rows, "memory")

    def samples(self, setup: Setup, name: str) -> list[dict[str, Any]]:
        """One sample for each depth, shallowest first; none where it was not measured, or failed."""
        return sorted((self.row(setup, name) or {}).get("samples", []), key=lambda s: s["layers"])

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
        return RELU, _slope(samples, lambda s: s["kept"] + more * _masks(s["tensors"], setup.ffn))


def _masks(tensors: Iterable[dict[str, Any]], width: int) -> int:
    """Elements of the bool tensors [..., width] among kept tensors: where a ReLU of that width keeps its sign alone."""
    return sum(t["bytes"] for t in tensors if t["dtype"] == "bool" and list(t["shape"][-1:]) == [width])


def _slope(samples: Sequence[dict[str, Any]], value: Any) -> float:
    if len(samples) < 2:
        return 0.0
    first, last = samples[0], samples[-1]
    return (value(last) - value(first)) / (last["layers"] - first["layers"])


def kept_table(memories: Memories, style: str) -> str:
    """Bytes kept per layer, as a ratio to the floor."""
    names, lines = _named(memories), []
    for setup in memories.setups():
        name, floor = memories.floor(setup)
        ratios = [_ratio(memories.per_layer(setup, n), floor) for n in names]
        lines.append([*_label(setup), name, _megabytes(floor), *ratios])
    return table(["model", "T", "dtype", "dropout", "floor", "floor, MB", *names], lines, style, left=5)


def peak_table(memories: Memories, style: str) -> str:
    """Most bytes allocated in a step at the larger depth, as a ratio to the frozen model's."""
    names, lines = _named(memories), []
    for setup in memories.setups():
        peaks = {n: s[-1]["peak"] for n in ("frozen", *names) if (s := memories.samples(setup, n))}
        floor = peaks.get("frozen", 0)
        lines.append([*_label(setup), _megabytes(floor), *(_ratio(peaks.get(n, 0), floor) for n in names)])
    return table(["model", "T", "dtype", "dropout", "frozen, MB", *names], lines, style, left=4)


def _named(memories: Memories) -> list[str]:
    present = {name for _, name in memories.rows}
    return [name for name in VARIANTS if name in present and name != "frozen"]


def _label(setup: Setup) -> tuple[str, ...]:
    size = f"{setup.model} {setup.layers}×{setup.hidden}" + (", attention" if setup.targets == "attention" else "")
    size += f", {setup.method}" if setup.method != "lora" else ""
    return size, str(setup.tokens * setup.batch), setup.dtype, f"{setup.dropout:g}"


def kept_tensors(memories: Memories, setup: Setup, name: str, style: str, most: int = 12) -> str:
    """What one more layer keeps, by dtype and shape: the difference between the two depths."""
    shallow, *_, deep = memories.samples(setup, name)
    layers = deep["layers"] - shallow["layers"]
    before = {(t["dtype"], tuple(t["shape"])): t for t in shallow["tensors"]}
    lines = []
    for t in deep["tensors"]:
        old = before.get((t["dtype"], tuple(t["shape"])), {"count": 0, "bytes": 0})
        count, size = (t["count"] - old["count"]) / layers, (t["bytes"] - old["bytes"]) / layers
        if size > 0.001 * deep["kept"] / layers:  # not the handful of single numbers
            lines.append((size, [t["dtype"], "×".join(map(str, t["shape"])), f"{count:g}", _megabytes(size)]))
    lines.sort(key=lambda line: -line[0])
    return table(["dtype", "shape", "a layer", "MB a layer"], [line for _, line in lines[:most]], style, left=2)


def breakdown(memories: Memories, setups: Iterable[Setup], names: Iterable[str], style: str) -> Iterator[str]:
    """What a layer keeps, by tensor."""
    for setup in setups:
        for name in names:
            samples = memories.samples(setup, name)
            if len(samples) > 1 and "tensors" in samples[0]:
                size = f"{setup.model}, T = {setup.tokens}, {setup.dtype}"
                size += f", dropout {setup.dropout:g}" if setup.dropout else ""
                yield titled(f"What a layer keeps, {name}: {size}", kept_tensors(memories, setup, name, style), style)


# ---------------------------------------------------------------------------------------------------------- steps


def step_table(row: Row, style: str) -> str:
    """Memory, time and compile time of each variant of one row; ratios are medians of paired rounds."""
    setup, results = setup_in(row), row["results"]
    frozen, inductor = results.get("frozen", {}), results.get("inductor", results.get("inductor-loss", {}))
    lines = []
    for name, m in ((name, results[name]) for name in row["variants"]):
        if "error" in m:
            lines.append([name, m["error"], *[""] * 10])
            continue
        seconds = statistics.median(m["times"])
        own = frozen["peak"] + m["gradients"] if frozen else 0
        memory = [_megabytes(m["kept"]), _ratio(m["kept"], frozen.get("kept", 0)), _megabytes(m["peak"])]
        memory += [_ratio(m["peak"], frozen.get("peak", 0)), _ratio(m["peak"], own)]
        speed = [f"{1e3 * seconds:.0f}", _paired(m, frozen), _paired(m, inductor)]
        speed += [f"{setup.tokens * setup.batch / seconds:.0f}", f"{m['first_step_s']:.1f}"]
        lines.append([name, *memory, *speed, f"{m['passes_s']:.2f}" if "passes_s" in m else ""])
    head = ("", "kept, MB", "× frozen", "peak, MB", "× frozen", "× frozen + own gradients", "step, ms", "× frozen")
    return table([*head, "× inductor", "tokens/s", "first step, s", "our passes, s"], lines, style)


def beside_table(row: Row, base: str, told: str, *also: str) -> str:
    """Of a row of steps, for a page: memory kept, peak, and time, each beside the base's; `also` others' time."""
    results, lines = row["results"], []
    floor = results.get(base, {})
    for name, m in ((name, results[name]) for name in row["variants"] if "error" not in results[name]):
        sizes = [s for k in ("kept", "peak") for s in (f"{_megabytes(m[k])} MB", _ratio(m[k], floor.get(k, 0)))]
        ratios = [_paired(m, results.get(other, {})) for other in (base, *also)]
        lines.append([VARIANTS[name].title, *sizes, f"{1e3 * statistics.median(m['times']):.0f} ms", *ratios])
    return table(["", "kept", told, "peak", told, "step", told, *["× Inductor"] * len(also)], lines, "github")


def methods_table(rows: Iterable[Row]) -> str:
    """Of rows of steps of several methods, for a page: what Inductor and peft_fx keep, and peft_fx's time."""
    lines = []
    for row in rows:
        frozen, inductor, ours = (row["results"].get(name, {}) for name in ("frozen", "inductor", "peft_fx"))
        if all("times" in m for m in (frozen, inductor, ours)):
            memory = [_ratio(m[k], frozen[k]) for k in ("kept", "peak") for m in (inductor, ours)]
            times = [_paired(inductor, frozen), _paired(ours, frozen), _paired(inductor, ours)]
            lines.append([setup_in(row).method, *memory, *times])
    head = ["", "Inductor keeps", "peft_fx keeps", "Inductor's peak", "peft_fx's peak", "Inductor's step"]
    return table([*head, "peft_fx's step", "faster by"], lines, "github") if lines else ""


def step_title(row: Row) -> str:
    """What the step is of, for the line above the table."""
    s = setup_in(row)
    adapters = f"{s.method} of rank {s.rank} on {s.targets}, dropout {s.dropout:g}"
    return f"{s.model}, {s.layers} layers × {s.hidden}, T = {s.tokens * s.batch}, {s.dtype}, {adapters}, {s.optimizer}"


# ------------------------------------------------------------------------------------------------------- listings


def titled(title: str, body: str, style: str) -> str:
    return f"{'### ' if style == 'github' else ''}{title}\n\n{body}\n"


def of_steps(rows: Sequence[Row], style: str, tensors_of: Sequence[str] = ()) -> str:
    """Every table of rows of memory and of steps; what a layer keeps, of the first setup by `tensors_of` variants."""
    parts = []
    if memory := of_kind(rows, "memory"):
        memories = Memories(memory)
        parts.append(titled("Kept for backward per layer, × the floor", kept_table(memories, style), style))
        parts.append(titled("Peak of a step, × the frozen model", peak_table(memories, style), style))
        parts += breakdown(memories, memories.setups()[:1], tensors_of, style)
    for row in of_kind(rows, "step"):
        body = row["error"] if "error" in row else step_table(row, style)
        parts.append(titled(f"A step of {step_title(row)}", body, style))
    return "\n".join(parts)


def listing(rows: Sequence[Row], style: str) -> str:
    return of_steps(rows, style, ("inductor", "peft_fx", "frozen"))


def _paired(measured: dict[str, Any], other: dict[str, Any]) -> str:
    return f"{paired(measured['times'], other['times']):.2f}×" if "times" in other else ""


def paired(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two variants' seconds in the same round."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}" if size else "–"


def _ratio(size: float, floor: float) -> str:
    return f"{size / floor:.2f}×" if size and floor else "–"
