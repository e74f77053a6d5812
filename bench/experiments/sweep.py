"""Each form of one layer at many sizes, measured and predicted.

Forward and backward of one linear layer with PEFT's LoRA, T from 16 to 8192, K and N from 128 to 2048, r from 1 to 256,
in float32 and with a bfloat16 base under float32 adapters: plain Inductor, and both forms asked for. Which of them
`auto` takes is reckoned, not compiled: activation form everywhere is plain Inductor's own graph.

  measured   median of the variants' seconds, taking turns; plain Inductor twice, for the noise
  predicted  by the price, with this machine's constants: python -m peft_fx calibrate
  regret     chosen form / best form, of the measured medians

One process for each layer, in which T is a dynamic size: one compile serves all T at which the same products read
activations in place. About 30 minutes on one core. With --threads 1, the default, what is measured is the time that the
thread ran, not that in which other processes had the core; memory is reused, never given back to the system between
steps.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import peft_fx
from bench import tables
from bench.experiment import Experiment, Request, Row, Say, Session, option
from bench.figures import figure_of, save
from peft_fx import machines
from peft_fx.measuring import clock_of
from peft_fx.passes.decide import price
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.decide.shapes import Shape
from zoo.models import BASES, Layer

TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
SIZES = (  # K, N, r
    (128, 128, 1),
    (128, 128, 16),
    (128, 512, 4),
    (512, 128, 64),
    (512, 512, 16),
    (512, 512, 256),
    (1024, 1024, 8),
    (512, 2048, 16),
    (2048, 512, 1),
    (2048, 2048, 64),
)
DTYPES = ("fp32", "peft")
VARIANTS = ("inductor", "inductor again", "peft_fx activation", "peft_fx weight")
INDUCTOR, AGAIN, ACTIVATION, WEIGHT = VARIANTS
NEAR = 1.05  # a form is as good as the best if it takes so much longer at most
SHORT = 0.02  # seconds of a step that is timed the second time
MOST = 25  # rounds of a cell
Step = Callable[[torch.Tensor, torch.Tensor], Any]


def shapes(layer: Layer, T: int) -> list[Shape]:
    """A layer's forward and its input gradient, as the passes describe them to the price."""
    sides, r = ((layer.K, layer.N), (layer.N, layer.K)), layer.r
    return [Shape(T, k, n, (((k, r), (r, n)),), BASES[layer.dtype], torch.float32) for k, n in sides]


# --------------------------------------------------------------------------------------------------- measuring


def sweep(request: Request, say: Say) -> Row:
    """All cells of one layer: seconds of each step of each variant, by T."""
    keep_memory()
    torch.set_num_threads(request["threads"])
    layer = Layer(**request["layer"])
    steps: dict[str, Step] = {}
    cells = []
    for regime in _regimes(layer, request["tokens"], Machine.from_dict(request["machine"])):
        for name in VARIANTS:
            say(f"compiling {name}")
            if name == AGAIN:
                steps[name] = steps[INDUCTOR]
            elif name != INDUCTOR or name not in steps:
                steps[name] = _compiled(layer, name, regime[-1])
        for T in regime:
            say(f"T = {T}")
            cells.append({"T": T, "times": _cell(layer, T, steps, request["seconds"])})
    return {"cells": cells}


def _regimes(layer: Layer, tokens: Sequence[int], machine: Machine) -> list[list[int]]:
    """T in groups for which the graphs are the same: a bf16 x is read in place where T is many times the rank."""
    if layer.dtype == "fp32":
        return [list(tokens)]

    def in_place(T: int) -> bool:
        return price.reads_in_place(machine, T, min(layer.K, layer.N), layer.r, torch.bfloat16, torch.float32)

    return [list(group) for _, group in itertools.groupby(tokens, in_place)]


def keep_memory() -> None:
    """glibc maps a large buffer anew each time, and pays for its pages; which variant pays depends on whose turn it
    was before."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _compiled(layer: Layer, name: str, hint: int) -> Step:
    """A step (x, dy) -> gradients of x, A and B, compiled for any T as for `hint`."""
    model = layer.build()
    form = name.removeprefix("peft_fx ")
    ours: dict[str, Any] = {"backend": peft_fx.backend, "options": {"peft_fx.form": form}}
    call = torch.compile(model, **(ours if form in price.FORMS else {}))
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(x: torch.Tensor, dy: torch.Tensor) -> Any:
        return torch.autograd.grad(call(x), [x, *trained], dy)

    x, dy = layer.batch(hint)
    torch._dynamo.mark_dynamic(x, 0)
    step(x, dy)
    return step


def _cell(layer: Layer, T: int, steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Seconds of each step of each variant, in rounds of another order each. A short step is timed the second time, as
    in a loop of its own: the first one finds the caches full of another variant's code and buffers."""
    x, dy = layer.batch(T)
    clock, order = clock_of(x.device), random.Random(0)
    start = clock()
    for step in steps.values():
        step(x, dy)
    short = clock() - start < SHORT * len(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for i in range(MOST):
        for name in order.sample(list(steps), len(steps)):
            if short:
                steps[name](x, dy)
            start = clock()
            steps[name](x, dy)
            times[name].append(float(f"{clock() - start:.4g}"))
        if i >= 4 and time.perf_counter() > end:
            break
    return times


# -------------------------------------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class Cell:
    """One layer at one T: seconds measured, in medians, and predicted by the price, of a step in each form;
    `chosen` is what `auto` takes."""

    layer: Layer
    T: int
    measured: dict[str, float]
    ratio: float  # of the weight form to plain Inductor, the median over the rounds
    noise: float  # the same of plain Inductor to itself
    predicted: dict[str, float]
    chosen: str
    machine: str = ""  # that predicts

    @property
    def taken(self) -> float:
        """The chosen form's time as a ratio to plain Inductor's; of a mix, which is not measured, the worse form's."""
        return {"weight": self.ratio, "activation": 1.0}.get(self.chosen, max(self.ratio, 1.0))

    @property
    def regret(self) -> float:
        return self.taken / min(self.ratio, 1.0)


def cells_of(rows: Sequence[Row], machine: Machine) -> list[Cell]:
    found = []
    for row in rows:
        layer = Layer(**row["layer"])
        for cell in row.get("cells", ()):
            times, T = cell["times"], cell["T"]
            measured = {name: statistics.median(taken) for name, taken in times.items()}
            ratio, noise = (tables.paired(times[name], times[INDUCTOR]) for name in (WEIGHT, AGAIN))
            found.append(Cell(layer, T, measured, ratio, noise, *predicted(layer, T, machine), machine.name))
    return found


def predicted(layer: Layer, T: int, machine: Machine) -> tuple[dict[str, float], str]:
    """Seconds of a step in each form: what differs between the forms, and what does not; and the form chosen."""
    decision = price.decide(machine, *shapes(layer, T), training=True, in_place=True)
    same = price.Price()
    for shape in shapes(layer, T):
        same += price.base(machine, shape)
        if shape.base_dtype == shape.adapter_dtype:  # else the decision has them
            same += price.reads(machine, shape, in_place=False)
    forms = {decision.forward, decision.input_grad}
    seconds = {form: decision.seconds[form, form] + same.seconds for form in price.FORMS}
    return seconds, forms.pop() if len(forms) == 1 else "mix"


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks."""
    return statistics.correlation(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each among all, equal ones sharing the mean of theirs."""
    return [sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values]


# --------------------------------------------------------------------------------------------------- reporting


def _measured(args: Namespace, session: Session) -> list[Row]:
    machines.check(args.machine)
    machine = machines.resolve(args.machine, torch.device("cpu"))
    fields = {"tokens": list(args.tokens), "threads": args.threads, "seconds": args.seconds}
    fields |= {"machine": machine.to_dict(), "variants": list(VARIANTS)}
    layers = [asdict(Layer(*sizes, dtype)) for sizes in SIZES[: args.layers] for dtype in args.dtype]
    requests = [{"kind": "sweep", "layer": layer, **fields} for layer in layers]
    return session.measure(requests, only=requests)


def _read(args: Namespace, rows: Sequence[Row]) -> list[Cell]:
    """Predicted by the machine that is named, or else the one that they were measured for."""
    if args.machine == "auto":
        return cells_of(rows, Machine.from_dict(rows[-1]["machine"]))
    return cells_of(rows, machines.resolve(args.machine, torch.device("cpu")))


COLUMNS = {
    "dtype": lambda c: c.layer.dtype,
    "K": lambda c: str(c.layer.K),
    "N": lambda c: str(c.layer.N),
    "r": lambda c: str(c.layer.r),
    "T": lambda c: str(c.T),
    "Inductor, ms": lambda c: f"{1e3 * c.measured[INDUCTOR]:.2f}",
    "activation, ms": lambda c: f"{1e3 * c.measured[ACTIVATION]:.2f}",
    "weight, ms": lambda c: f"{1e3 * c.measured[WEIGHT]:.2f}",
    "predicted: activation": lambda c: f"{1e3 * c.predicted['activation']:.2f}",
    "weight": lambda c: f"{1e3 * c.predicted['weight']:.2f}",
    "weight / Inductor": lambda c: f"{c.ratio:.3f}",
    "Inductor / itself": lambda c: f"{c.noise:.3f}",
    "auto": lambda c: c.chosen,
    "regret": lambda c: f"{c.regret:.3f}",
}


def table(cells: Sequence[Cell], style: str = "simple") -> str:
    return tables.of_columns(COLUMNS, cells, style)


def summary(cells: Sequence[Cell]) -> str:
    """What must hold of all cells, and how far it does."""
    near = sum(c.regret <= NEAR for c in cells)
    slower = [c for c in cells if c.taken > NEAR]
    noise = sorted(abs(c.noise - 1) for c in cells)
    measured = [c.measured[name] for c in cells for name in (INDUCTOR, WEIGHT)]
    guessed = [c.predicted[form] for c in cells for form in ("activation", "weight")]
    seconds = spearman(guessed, measured)
    ratios = spearman([c.predicted["weight"] / c.predicted["activation"] for c in cells], [c.ratio for c in cells])
    return f"""\
{len(cells)} cells, predicted by {cells[0].machine}
chosen form within 5 % of the best: {near} cells, {100 * near / len(cells):.1f} %
slower than plain Inductor by more than 5 %: {len(slower)} cells, the worst by \
{100 * (max(c.taken for c in cells) - 1):.1f} %
Spearman correlation, seconds: {seconds:.3f}; weight / Inductor: {ratios:.3f}
Inductor against itself: off by {100 * statistics.median(noise):.1f} % in the median, \
{100 * noise[int(0.95 * len(noise))]:.1f} % in one of 20, {100 * noise[-1]:.1f} % at most"""


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Maps of weight over activation form, measured above predicted: a column for each dtype, a row of cells for each
    layer, T along x; a line where each crosses 1."""
    dtypes = list(dict.fromkeys(c.layer.dtype for c in cells))
    shown = {"measured": lambda c: c.ratio, "predicted": lambda c: c.predicted["weight"] / c.predicted["activation"]}
    figure, axes = figure_of(2, len(dtypes), (5.5 * len(dtypes), 7.5))
    for column, dtype in enumerate(dtypes):
        mine = [c for c in cells if c.layer.dtype == dtype]
        layers, tokens = list(dict.fromkeys(c.layer for c in mine)), sorted({c.T for c in mine})
        for row, (title, value) in zip(axes, shown.items(), strict=True):
            grid = [[float("nan")] * len(tokens) for _ in layers]
            for c in mine:
                grid[layers.index(c.layer)][tokens.index(c.T)] = math.log2(value(c))
            panel = row[column]
            image = panel.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
            panel.plot(*_crossing(grid), color="black", linewidth=1.5)
            panel.set_title(f"{title}, {dtype}", fontsize=10)
            panel.set_xticks(range(len(tokens)), map(str, tokens), fontsize=8)
            panel.set_yticks(range(len(layers)), [f"{l.K}×{l.N}, r={l.r}" for l in layers], fontsize=8)
            panel.set_xlabel("T, tokens")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["½", "1", "2"])
    bar.set_label("seconds of a step: weight form / plain Inductor")
    save(figure, path)


def _crossing(grid: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """For each layer the T from which on the weight form is cheaper, as places between columns."""
    x, y = [], []
    for i, row in enumerate(grid):
        last = max((j for j, v in enumerate(row) if v > 0), default=-1)
        x += [last + 0.5, last + 0.5]
        y += [i - 0.5, i + 0.5]
    return x, y


SWEEP = Experiment(
    name="sweep",
    text=__doc__,
    arguments=(
        option("--tokens", type=int, nargs="+", default=TOKENS, metavar="T", help="(default: 16 to 8192)"),
        option("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="(default: both)"),
        option("--layers", type=int, default=len(SIZES), metavar="N", help="only the first N sizes"),
        option("--threads", type=int, default=1, metavar="N", help="(default: 1)"),
        option("--seconds", type=float, default=1.5, metavar="S", help="for each cell (default: 1.5)"),
        option("--machine", default="auto", help="as the option peft_fx.machine (default: auto)"),
    ),
    measured=_measured,
    read=_read,
    tables={"": table},
    more=lambda args, cells: [summary(cells)],
    figure=draw,
    kinds={"sweep": sweep},
)
