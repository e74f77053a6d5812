"""What a step takes, of graphs that were split in two: bytes by component and at the highest points, and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch.fx import GraphModule

from peft_fx.components import by_component
from peft_fx.lengths import Sized, on
from peft_fx.passes.analyse.flow import is_tangent
from peft_fx.passes.decide.machine import Machine
from peft_fx.step.fusion import Fused, outputs
from peft_fx.step.halves import gradients_of
from peft_fx.step.memory import Walk, walk
from peft_fx.step.seconds import kernel_seconds


@dataclass(frozen=True)
class Part:
    """One graph of a step: bytes kept, by component; its two halves, and seconds of both."""

    components: dict[str, int]
    forward: Walk
    backward: Walk
    seconds: float = 0.0

    @property
    def kept(self) -> int:
        return sum(self.components.values())


@dataclass
class Halves:
    """One graph of a step as a variant has it, as it was split: `kept` are the components of the values that forward
    hands to backward, by their places among its results; `handed_on` the inputs that an earlier graph made, and `lent`
    those of backward that the caller has too, by name. `part` is what it takes."""

    graphs: tuple[GraphModule, GraphModule]
    kept: dict[int, str]
    handed_on: Set[str]
    lent: Set[str]
    machine: Machine
    sized: Sized
    part: Part = Part({}, Walk(), Walk())

    def reckoned(self, hint: Any = int) -> Part:
        """What the graph takes, by the sizes that its values have."""
        forward, backward = (gm.graph for gm in self.graphs)
        first, second = Fused(forward, hint), Fused(backward, hint)
        inputs = forward.find_nodes(op="placeholder")
        given = {n.name for n in inputs} - self.handed_on
        made = [n for n in backward.find_nodes(op="placeholder") if n.name not in given]
        there = walk(first, [n for n in inputs if n.name in self.handed_on], outputs(forward), self.machine)
        lent, held = [n for n in made if n.name in self.lent], gradients_of([n for n in made if is_tangent(n)], hint)
        back = walk(second, made, outputs(backward), self.machine, lent, held)
        (results,) = forward.find_nodes(op="output")
        kept = by_component((name, first.size(results.args[0][i])) for i, name in self.kept.items())
        seconds = (kernel_seconds(half, kernel, self.machine) for half in (first, second) for kernel in half.kernels)
        return Part(kept, there, back, math.fsum(seconds))

    def between(self, other: Halves, share: Fraction) -> Halves | None:
        """The graph at a length so far between those of two traces; None where these differ in more than sizes."""
        same = (self.kept, self.handed_on, self.lent) == (other.kept, other.handed_on, other.lent)
        layouts = self.sized.between(other.sized, share) if same else None
        if layouts is None:
            return None
        on(self.graphs, layouts)
        return replace(self, part=self.reckoned())


@dataclass
class Step:
    """What the graphs of a step take: bytes kept, by component; bytes at the highest point of forward, of backward and
    of backward's second half, and the same without memory that waits to be used again; seconds."""

    components: dict[str, float] = field(default_factory=dict)
    peaks: tuple[float, ...] = (0.0, 0.0, 0.0)
    planned: tuple[float, ...] = (0.0, 0.0, 0.0)
    seconds: float = 0.0

    def extended(self, deeper: Step, layers: int) -> Step:
        """So many layers more, each of which costs what the last one of `deeper` does. Memory that waits in one layer
        to be used by the next is there once, however many there are."""

        def more(a: float, b: float) -> float:
            return a + (b - a) * layers

        names = dict.fromkeys((*self.components, *deeper.components))
        components = {k: more(self.components.get(k, 0), deeper.components.get(k, 0)) for k in names}
        planned = tuple(map(more, self.planned, deeper.planned))
        grown = [b - a for a, b in zip(self.planned, deeper.planned, strict=True)]
        peaks = tuple(
            b + min(b - a, most) * (layers - 1) for a, b, most in zip(self.peaks, deeper.peaks, grown, strict=True)
        )
        return Step(components, peaks, planned, more(self.seconds, deeper.seconds))


def step_of(parts: Sequence[Part]) -> Step:
    """Forward through all graphs, each on top of what those before it keep; then backward."""
    step, before = Step(), 0
    for part in parts:
        peaks = (part.forward.peak, part.backward.peak, part.backward.late)
        planned = (part.forward.planned, part.backward.planned, part.backward.planned_late)
        step.peaks = tuple(max(a, before + b) for a, b in zip(step.peaks, peaks, strict=True))
        step.planned = tuple(max(a, before + b) for a, b in zip(step.planned, planned, strict=True))
        before += part.kept
        step.seconds += part.seconds
        for k, n in part.components.items():
            step.components[k] = step.components.get(k, 0) + n
    return step
