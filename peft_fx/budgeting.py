"""The memory budget: what a user may write, how many bytes of it a step may take, and the choice for one joint graph.

A budget is of everything that training holds on the device, or of a step alone. Of everything, the weights and the
optimiser's states are there all the time; the step is what is allocated from the start of forward to the end of
backward, its gradients among it.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import Roles, returned
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.pipeline import without_collection
from peft_fx.sharing import Around
from peft_fx.sources import between_layers
from peft_fx.step.budget import Choices, Held
from peft_fx.step.kinds import bytes_of
from peft_fx.step.repeats import base_of

log = logging.getLogger("peft_fx")

UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}
OF = ("total", "step")
OPTIMIZERS = {"adamw": 2, "adam": 2, "lion": 1, "momentum": 1, "sgd": 0}  # bytes of state for a byte of a parameter
MARGIN = 0.05  # of a device's memory, which "auto" leaves to others


def parse_budget(chosen: Any) -> int | float | str:
    """Bytes; a part of the device's memory, from above 0 to 1; or "auto". ValueError for anything else."""
    if chosen == "auto":
        return "auto"
    amount = chosen
    if isinstance(chosen, str) and (found := re.fullmatch(r"\s*([0-9.]+(?:[eE]\d+)?)\s*(\w*)\s*", chosen)):
        unit = {name.lower(): n for name, n in UNITS.items()}.get(found[2].lower() or "b")
        amount = _number(found[1], unit, bool(found[2]))
    if isinstance(amount, (int, float)) and not isinstance(amount, bool) and 0 < amount < float("inf"):
        return float(amount) if amount <= 1 else int(amount)
    units = ", ".join(UNITS)
    raise ValueError(
        f"'peft_fx.memory_budget' cannot be {chosen!r}; valid values: bytes, a number with a unit ({units}) such as "
        "'22GB', a part of the device's memory such as 0.9, 'auto'"
    )


def _number(text: str, unit: int | None, named: bool) -> float | int | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if unit is None or (named and number * unit <= 1) else number * unit


def resolved(budget: int | float | str, device: torch.device) -> int:
    """A budget as bytes on a device; ValueError where its memory is not known here. "auto" is what was free when the
    first graph was compiled."""
    if isinstance(budget, int):
        return budget
    total, free = _memory(str(device))
    return int(free - MARGIN * total) if isinstance(budget, str) else int(budget * total)


@functools.cache
def _memory(device: str) -> tuple[int, int]:
    """Bytes of a device in all, and bytes free when this was asked first."""
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("'peft_fx.memory_budget' must be given in bytes for a GPU that is not there")
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return total, free
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


@dataclass(frozen=True)
class Asked:
    """A budget as it was asked for one graph: bytes, of what, and bytes of the optimiser's state for one of a
    parameter; whether the weights are there already and not in it; and what there is around the graph."""

    bytes: int
    of: str = "total"
    states: int = 2
    beside_weights: bool = False
    around: Around = field(default_factory=Around)

    def fixed(self, roles: Roles) -> dict[str, int]:
        """What is there while the graph runs, by what it is."""
        before = {"kept by graphs before": self.around.kept} if self.around.kept else {}
        if self.of == "step":
            return before
        weights = sum(bytes_of(n, int) for n, role in roles.items() if role.static) + self.around.weights
        trained = sum(bytes_of(n, int) for n, role in roles.items() if role.trainable) + self.around.trained
        return {"weights": 0 if self.beside_weights else weights, "optimiser states": self.states * trained, **before}


def why_not(held: Held) -> str:
    """What to say where a budget cannot be held: the least, what takes it, and what would help."""
    peak, kept = held.peak["after"], held.kept["after"]
    least = peak + sum(held.fixed.values())
    takes = {**held.fixed, "values kept": kept, "results returned": held.results}
    takes["one layer's own values"] = max(0, peak - kept - held.results)
    told = ", ".join(f"{what} {readable(n)}" for what, n in sorted(takes.items(), key=lambda t: -t[1]) if n)
    helps = ["a larger budget"]
    if held.budget > 0:
        helps.append(f"a batch of {held.budget / peak:.0%} of this one's tokens")
    if held.results > peak / 10:
        helps.append("returning the loss alone (peft_fx.loss_only)")
    if (weights := held.fixed.get("weights", 0)) > least / 4:
        helps.append(f"4-bit weights ({readable(weights * 3 // 4)} less, of 16 bits)")
    return (
        f"peft_fx cannot hold a memory budget of {readable(held.asked)}: the least that it finds, and takes "
        f"now, is {readable(least)} ({told}). What would help: {'; '.join(helps)}"
    )


def hold(
    graph: Graph, values: list[Node], roles: Roles, asked: Asked, machine: Machine, hint: Callable[[Size], int]
) -> tuple[Held, list[Node]]:
    """What was done for the budget in a joint graph, and what its partitioner is to keep, which would keep these
    `values` by itself."""
    fixed = asked.fixed(roles)
    budget = asked.bytes - sum(fixed.values())
    with without_collection():
        choices = choices_in(graph, values, hint, machine, times := asked.around.times)
        before, after = choices.of(frozenset(choices.before)), choices.within(budget)
    kept = (("before", before.kept), ("after", after.kept))
    sizes = {k: int(times * sum(bytes_of(n, hint) for n in nodes)) for k, nodes in kept}
    peaks = {"before": before.peak, "after": after.peak}
    results = sum(bytes_of(n, hint) for n in returned(graph)[0] if isinstance(n, Node))
    rebuilt = len(after.rebuilt - before.rebuilt)
    held = Held(asked.bytes, budget, fixed, peaks, sizes, results, after.seconds, rebuilt, times)
    log.debug("memory budget: %s", held)
    return held, values if after is before else saved(choices, after.kept)


def within_share(
    graph: Graph, values: list[Node], share: float, machine: Machine, hint: Callable[[Size], int]
) -> list[Node]:
    """What the partitioner is to keep of a joint graph, which would keep these `values` by itself: no more than so much
    of their bytes, as PyTorch's activation_memory_budget asks."""
    with without_collection():
        choices = choices_in(graph, values, hint, machine)
        before, after = choices.of(frozenset(choices.before)), choices.keeping(share)
    return values if after is before else saved(choices, after.kept)


def along(
    graph: Graph, values: list[Node], prices: Sequence[float], machine: Machine, hint: Callable[[Size], int]
) -> list[list[Node]]:
    """What the partitioner is to keep of a joint graph, which would keep these `values` by itself, where a byte kept
    costs so many seconds: at each of several prices, the least first."""
    with without_collection():
        choices = choices_in(graph, values, hint, machine)
        return [saved(choices, choices.at(price)) for price in prices]


def choices_in(
    graph: Graph, values: Iterable[Node], hint: Callable[[Size], int], machine: Machine, times: float = 1.0
) -> Choices:
    """The choices for a joint graph whose partitioner keeps those values by itself, of a step that takes so many times
    what the graph does."""
    before = {n for v in values if (n := base_of(v)).op == "call_function"}
    return Choices(graph, before, hint, machine, times, frozenset(map(base_of, between_layers(graph))))


def saved(choices: Choices, kept: Set[Node]) -> list[Node]:
    """What the partitioner is to hand backward: what is kept, and the graph's inputs that backward reads."""
    read = choices.sides.reads.union(*(n.all_input_nodes for n in choices.sides.rebuilt(kept)))
    return [n for n in choices.graph.nodes if n in kept or (n in read and n.op == "placeholder")]


def readable(n: int) -> str:
    """Bytes with a unit."""
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if n >= s or u == "kB")
    return f"{n / size:.1f} {unit}"
