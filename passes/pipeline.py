"""The order of the passes, and what they found: one function, `run`, for a compile, for `explain` and for tests
alike."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Graph, Node

from peft_fx.passes import price
from peft_fx.passes.algebra import Size
from peft_fx.passes.flow import Flow, Roles
from peft_fx.passes.keep import Keep
from peft_fx.passes.refusals import refusals
from peft_fx.passes.rewrite import Rewriter
from peft_fx.passes.sites import ACTIVATION, NONE, WEIGHT, Analysis, Group, Refusal, Site
from peft_fx.passes.transients import read_in_place
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

    @property
    def group(self) -> Group:
        group = self.forward or self.grad
        assert group is not None
        return group

    def has_grad(self, flow: Flow) -> bool:
        """Whether W multiplies anything in backward: an input gradient without a group of its own stays as it is."""
        seen: set[Node] = set()
        todo: list[Any] = [self.group.weight.name]
        while todo:
            node = todo.pop()
            if isinstance(node, Node) and node not in seen:
                seen.add(node)
                todo += [u for u in node.users if flow.is_weight(u)]
                if any(u in flow.backward for u in node.users):
                    return True
        return False

    def name(self, flow: Flow) -> str:
        return flow.site_name(self.group.weight, self.group.adapter_factors)


def run(
    graph: Graph,
    roles: Roles,
    settings: Settings,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
) -> Outcome:
    """Rewrites a joint or inference graph in place. Raises on any failure of its own: the caller then uses the graph
    that it kept."""
    start = time.perf_counter()
    before = Contract.of(graph)
    analysis = Analysis(graph, roles, strict=settings.numerics == "strict")
    training = bool(analysis.flow.backward)
    outcome = Outcome(refusals=refusals(analysis))
    chosen: list[Group] = []
    refused = {r.name for r in outcome.refusals}
    for adapter in _adapters(analysis.groups):
        if adapter.forward is None and adapter.name(analysis.flow) in refused:
            continue
        site, groups = _decide(adapter, analysis.flow, settings, hint, training)
        outcome.sites.append(site)
        chosen += groups
    outcome.sites = _numbered(outcome.sites)
    _log(outcome)
    rewriter = Rewriter(graph, fake_mode)
    rewriter.rewrite(sorted(chosen, key=lambda g: analysis.position[g.root]))
    added = rewriter.build.added
    if training and settings.keep == "recompute" and (outcome.sites or outcome.refusals):
        if settings.numerics == "default":
            added += read_in_place(graph, Flow(graph, roles), fake_mode, hint)
        outcome.rebuilt = Keep(graph, Flow(graph, roles), hint, settings.rebuild_random).mark()
    verify(graph, before, added, fake_mode)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _log(outcome: Outcome) -> None:
    for s in outcome.sites:
        log.debug("%s: forward %s, input gradient %s (%s)", s.name, s.forward, s.input_grad, s.reason)
    for r in outcome.refusals:
        log.debug("%s: refused, %s (%s)", r.name, r.code, r.detail)


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
    adapter: _Adapter, flow: Flow, settings: Settings, hint: Callable[[Size], int], training: bool
) -> tuple[Site, list[Group]]:
    forward, grad = (_shape(g, hint) if g else None for g in (adapter.forward, adapter.grad))
    decision = price.decide(settings.machine, forward, grad, training=training, form=settings.form)
    forms = (decision.forward, decision.input_grad)
    groups = [g for g, f in zip((adapter.forward, adapter.grad), forms, strict=True) if g and f == WEIGHT]
    shape = forward or grad
    assert shape is not None
    trained = training and any(flow.is_trained(f.name) for f in adapter.group.adapter_factors)
    cost = _cost(settings.machine, [forward, grad], forms, trained)
    site = Site(
        name=adapter.name(flow),
        method="low-rank" if all(len(t.factors) > 1 for t in adapter.group.remainders) else "dense delta",
        tokens=shape.T,
        in_features=shape.K if forward else shape.N,
        out_features=shape.N if forward else shape.K,
        rank=shape.rank,
        dtype=str(shape.base_dtype).removeprefix("torch."),
        forward=decision.forward,
        input_grad=decision.input_grad if adapter.grad or not adapter.has_grad(flow) else ACTIVATION,
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
    weight = group.weight
    return price.shape_of(
        group.tokens, weight.shape, group.remainders, group.product.dtype, hint, weight.batch, group.right
    )


def _numbered(sites: list[Site]) -> list[Site]:
    """Calls of one layer are told apart by a number."""
    seen: Counter[str] = Counter()
    named = []
    for site in sites:
        seen[site.name] += 1
        n = seen[site.name]
        named.append(site if n == 1 else replace(site, name=f"{site.name}#{n}"))
    return named
