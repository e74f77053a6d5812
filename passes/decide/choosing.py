"""Which adapters get their weight form: candidates as adapters, priced, settled for all numbers of tokens, told as
sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.candidates import SumCandidate
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.decide import price
from peft_fx.passes.decide.candidates import Adapter, Found, adapters_of
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.decide.notation import scale_of, written
from peft_fx.passes.decide.regimes import Regimes
from peft_fx.passes.decide.shapes import Shape
from peft_fx.passes.findings import ACTIVATION, NONE, WEIGHT, Settings, Site
from peft_fx.passes.graph.joint import Joint

UNNOTICED = 0.03  # of a layer's own products: what saving memory may cost more than the forms save


Candidate = tuple[Adapter, "Priced"]


def decide(joint: Joint, settings: Settings) -> None:
    """Settles the numbers of tokens that all adapters are decided at, in one round; decides of maps."""
    notes = joint.notes
    notes.regimes = Regimes(joint.sizes.hint, joint.sizes.at_least)
    maps = _candidates(joint, settings, notes.maps)
    groups = [g for g in joint.sums.groups if not any(g.product_node in one.nodes for one in notes.maps)]
    consider(joint, settings, groups, maps)
    notes.chosen_maps = decided(joint, maps)


def consider(joint: Joint, settings: Settings, groups: list[SumCandidate], maps: Sequence[Candidate] = ()) -> None:
    """Notes sums to be decided, and settles the regimes of those not met yet, together with maps."""
    notes = joint.notes
    assert notes.regimes is not None, "nothing has been decided"
    notes.groups, notes.sums = groups, _candidates(joint, settings, groups)
    new = [one for one in (*maps, *notes.sums) if one[0].either.product_node not in notes.settled]
    if settings.form == "auto":
        notes.regimes.settle((adapter.either.tokens, prices.forms) for adapter, prices in new)
    notes.settled |= {adapter.either.product_node for adapter, _ in new}


def _candidates(joint: Joint, settings: Settings, found: Sequence[Found]) -> list[Candidate]:
    """The adapters that groups or regions are of, but for those refused, each with what its price depends on."""
    flow, refused = joint.flow, {r.name for r in joint.found.refusals}
    for one in found:
        own = {p for node in one.adapter_nodes for p in flow.parameters(node)}
        joint.notes.layers.update(p for p in flow.parameters(one.weight_node) if p not in own)
    adapters = [a for a in adapters_of(found, flow) if a.either.site_name(flow) not in refused]
    return [(adapter, Priced.of(adapter, flow, settings, joint.sizes.hint)) for adapter in adapters]


def decided(joint: Joint, asked: Sequence[Candidate]) -> list[Any]:
    """Tells of a site for each adapter; those of its groups or regions that are to be in weight form."""
    chosen, regimes = list[Any](), joint.notes.regimes
    assert regimes is not None, "nothing has been decided"
    for adapter, prices in asked:
        tokens = regimes.tokens(adapter.either.tokens)
        site, weight_form = _decide(adapter, joint.flow, prices, tokens)
        joint.found.sites.append(site)
        joint.found.spare += prices.spare(tokens)
        chosen += weight_form
    return chosen


@dataclass(frozen=True)
class Priced:
    """What the price of an adapter's forms depends on."""

    settings: Settings
    forward: Shape | None
    grad: Shape | None
    training: bool
    trained: bool

    @classmethod
    def of(cls, adapter: Adapter, flow: Flow, settings: Settings, hint: Callable[[Size], int]) -> Priced:
        forward, grad = (f.sizes(hint) if f else None for f in (adapter.forward, adapter.grad))
        if not settings.kernels or settings.rounding != "nearest":
            forward, grad = (s and replace(s, fused=False) for s in (forward, grad))
        training = bool(flow.backward)
        parameters = {p for node in adapter.either.adapter_nodes for p in flow.parameters(node)}
        trained = training and any(flow.is_trained(p) for p in parameters & flow.differentiated)
        return cls(settings, forward, grad, training, trained)

    def decision(self, T: int) -> price.Decision:
        """The forms at so many tokens."""
        settings = self.settings
        in_place = self.trained and settings.keep != "inductor" and settings.numerics == "default"
        now = max(1, next(s.T for s in (self.forward, self.grad) if s))
        forward, grad = (s and replace(s, T=s.T * T // now) for s in (self.forward, self.grad))  # a stride has two
        return price.decide(settings.machine, forward, grad, self.training, settings.form, in_place)

    def spare(self, T: int) -> float:
        """Seconds that the forms save at so many tokens, and the part of the layer's own products' that is no loss."""
        found = self.decision(T)
        chosen = found.seconds.get((found.forward, found.input_grad), 0.0)
        written = next((v for k, v in found.seconds.items() if WEIGHT not in k), chosen)
        own = sum(price.base(self.settings.machine, s).seconds for s in (self.forward, self.grad) if s)
        return written - chosen + UNNOTICED * own

    def forms(self, T: int) -> tuple[str, str]:
        found = self.decision(T)
        return found.forward, found.input_grad


def _decide(adapter: Adapter, flow: Flow, priced: Priced, T: int) -> tuple[Site, list[Any]]:
    forward, grad, trained = priced.forward, priced.grad, priced.trained
    decision = priced.decision(T)
    forms = (decision.forward, decision.input_grad)
    chosen = [f for f, form in zip((adapter.forward, adapter.grad), forms, strict=True) if f and form == WEIGHT]
    shape = forward or grad
    assert shape is not None
    cost = _cost(priced.settings.machine, [forward, grad], forms, trained)
    site = Site(
        name=adapter.either.site_name(flow),
        method=adapter.either.method,
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
        algebra=_algebra(adapter, forms),
    )
    return site, chosen


def _algebra(adapter: Adapter, forms: tuple[str, str]) -> dict[str, list[str]]:
    """What is computed, as written and as chosen."""
    found = {}
    for direction, one, form in zip(("forward", "input_grad"), (adapter.forward, adapter.grad), forms, strict=True):
        if one is not None:
            before, merged = written(one)
            found[direction] = [before, merged if form == WEIGHT else before]
    scale = scale_of(adapter.either)
    return found | ({"where": [scale]} if scale else {})


def _cost(
    machine: Machine, shapes: list[Shape | None], forms: tuple[str, str], trained: bool
) -> dict[str, price.Price]:
    """FLOPs and bytes moved in one step by all products of a site, as written and as chosen."""
    costs = {}
    for label, chosen in (("before", (ACTIVATION, ACTIVATION)), ("after", forms)):
        total = price.Price()
        for shape, form, grad in zip(shapes, chosen, (False, True), strict=True):
            if shape is not None:
                total += price.base(machine, shape)
                weight = price.merge(machine, shape)
                total += weight if form == WEIGHT else price.activation(machine, shape, trained, grad)
        for shape in shapes:
            if trained and shape is not None:  # u·A for the gradients, and the gradients themselves
                total += price.first_products(machine, shape) + price.first_products(machine, shape)
        costs[label] = total
    return costs


def joined(sites: list[Site]) -> list[Site]:
    """Where the forward is a region and the input gradient a sum of terms, they are one site."""
    found: list[Site] = []
    for site in sites:
        half = site.forward == NONE
        i = next((i for i, s in enumerate(found) if _is_half_of(site, s)), None) if half else None
        if i is None:
            found.append(site)
            continue
        flops, bytes = (
            {k: n + b[k] for k, n in a.items()} for a, b in ((found[i].flops, site.flops), (found[i].bytes, site.bytes))
        )
        algebra = site.algebra | found[i].algebra
        found[i] = replace(found[i], input_grad=site.input_grad, flops=flops, bytes=bytes, algebra=algebra)
    return found


def _is_half_of(site: Site, region: Site) -> bool:
    return (site.name, site.forward, region.method, region.input_grad) == (region.name, NONE, "affine", ACTIVATION)


def numbered(sites: list[Site]) -> list[Site]:
    """Calls of one layer are told apart by a number."""
    seen: Counter[str] = Counter()
    named = []
    for site in sites:
        seen[site.name] += 1
        n = seen[site.name]
        named.append(site if n == 1 else replace(site, name=f"{site.name}#{n}"))
    return named
