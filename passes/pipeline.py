"""The order of the passes, and what they found: one function, `run`, for a compile, for `explain` and for tests alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes import price
from peft_fx.passes.algebra import MANTISSA, Size, finer
from peft_fx.passes.keep import Keep
from peft_fx.passes.rewrite import Rewriter
from peft_fx.passes.sites import ACTIVATION, NONE, WEIGHT, Analysis, Group, Refusal, Roles, Site
from peft_fx.passes.transfer import is_tensor, value
from peft_fx.passes.verify import Contract, verify

log = logging.getLogger("peft_fx.passes")


@dataclass(frozen=True)
class Settings:
    """What the passes are asked to do; the meaning of each value is that of the option of the same name."""

    form: str = "auto"
    numerics: str = "default"
    keep: str = "recompute"
    machine: price.Machine = price.MACHINES["cpu"]
    rebuild_random: bool = True


@dataclass
class Outcome:
    """What was found in one graph and done to it; `seconds` is the time of the passes themselves."""

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    rebuilt: int = 0
    seconds: float = 0.0


@dataclass
class _Adapter:
    """The groups of one site."""

    forward: Group | None = None
    grad: Group | None = None


def run(
    graph: Graph,
    roles: Roles,
    settings: Settings,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
) -> Outcome:
    """Rewrites a joint or inference graph in place. Raises on any failure of its own: the caller then uses the graph that it kept."""
    start = time.perf_counter()
    before = Contract.of(graph)
    analysis = Analysis(graph, roles, strict=settings.numerics == "strict")
    training = bool(analysis.tangent)
    outcome = Outcome(refusals=list(analysis.refusals))
    chosen: list[Group] = []
    for adapter in _adapters(analysis.groups):
        site, groups = _decide(adapter, analysis, settings, hint, training)
        log.debug("%s: forward %s, input gradient %s (%s)", site.name, site.forward, site.input_grad, site.reason)
        outcome.sites.append(site)
        chosen += groups
    for refusal in outcome.refusals:
        log.debug("%s: refused, %s (%s)", refusal.name, refusal.code, refusal.detail)
    _name_apart(outcome)
    added: list[Node] = []
    if chosen:
        rewriter = Rewriter(graph, analysis, fake_mode)
        rewriter.rewrite(sorted(chosen, key=lambda g: analysis.position[g.root]))
        added = rewriter.build.added
    if training and settings.keep == "recompute" and (outcome.sites or outcome.refusals):
        after = Analysis(graph, roles) if chosen else analysis
        outcome.rebuilt = Keep(graph, after.tangent, after.depends, hint, settings.rebuild_random).mark()
    verify(graph, before, added, fake_mode)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _adapters(groups: list[Group]) -> list[_Adapter]:
    """Groups by adapter. A weight used twice has as many adapters: backward meets the uses in the reverse order."""
    found: dict[Any, list[_Adapter]] = {}
    for group in groups:
        if not group.backward:
            found.setdefault(group.key, []).append(_Adapter(forward=group))
    for group in reversed([g for g in groups if g.backward]):
        same = found.setdefault(group.key, [])
        free = next((a for a in same if a.grad is None), None)
        if free is None:
            same.append(_Adapter(grad=group))
        else:
            free.grad = group
    return [a for same in found.values() for a in same]


def _decide(
    adapter: _Adapter, analysis: Analysis, settings: Settings, hint: Callable[[Size], int], training: bool
) -> tuple[Site, list[Group]]:
    shapes = [g and _shape(g, hint) for g in (adapter.forward, adapter.grad)]
    decision = price.decide(settings.machine, *shapes, training=training, form=settings.form)
    forms = (decision.forward, decision.input_grad)
    groups = [g for g, form in zip((adapter.forward, adapter.grad), forms, strict=True) if g and form == WEIGHT]
    group = adapter.forward or adapter.grad
    shape = shapes[0] or shapes[1]
    assert group is not None and shape is not None
    K, N = (shape.K, shape.N) if adapter.forward else (shape.N, shape.K)
    factors = [f for t in group.remainders for f in t.factors]
    trained = training and any(_is_trained(f.name, analysis) for f in factors)
    cost = _cost(settings.machine, shapes, forms, trained)
    site = Site(
        name=analysis.name_of(group.weight, factors),
        method="low-rank" if all(len(t.factors) > 1 for t in group.remainders) else "dense delta",
        tokens=shape.T,
        in_features=K,
        out_features=N,
        rank=shape.rank,
        dtype=str(shape.base_dtype).removeprefix("torch."),
        forward=forms[0] if adapter.forward else NONE,
        input_grad=forms[1] if adapter.grad else NONE,
        adapter_grad="low_rank" if trained else NONE,
        reason=decision.reason,
        flops={k: p.flops for k, p in cost.items()},
        bytes={k: p.bytes for k, p in cost.items()},
    )
    return site, groups


def _cost(
    machine: price.Machine, shapes: list[price.Shape | None], forms: tuple[str, str], trained: bool
) -> dict[str, price.Price]:
    """FLOPs and bytes moved in one step by all products of a site, as written and as chosen."""
    costs = {}
    for label, chosen in (("before", (ACTIVATION, ACTIVATION)), ("after", forms)):
        total = price.Price()
        for shape, form in zip(shapes, chosen, strict=True):
            if shape is not None:
                total += price.base(machine, shape)
                weight = price.merge(machine, shape)
                total += weight if form == WEIGHT else price.activation(machine, shape, skip_first=trained)
        for shape in shapes:
            if trained and shape is not None:  # u·A for the gradients, and the gradients themselves
                total += price.first_products(machine, shape) + price.first_products(machine, shape)
        costs[label] = total
    return costs


def _shape(group: Group, hint: Callable[[Size], int]) -> price.Shape:
    product = group.base.product
    assert product is not None
    return price.shape_of(
        group.tokens, group.weight.shape, group.remainders, product.dtype, hint, group.weight.batch, group.right
    )


def _is_trained(node: Any, analysis: Analysis) -> bool:
    return analysis._trained(node)


def _name_apart(outcome: Outcome) -> None:
    """Sites of one module that hold several weights are told apart by a number; calls of one weight, too."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    for i, site in enumerate(outcome.sites):
        seen[site.name] = n = seen.get(site.name, 0) + 1
        if n > 1:
            outcome.sites[i] = replace(site, name=f"{site.name}#{n}")


__all__ = ["MANTISSA", "Outcome", "Settings", "finer", "is_tensor", "run", "torch", "value"]
