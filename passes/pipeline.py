"""The order of the passes, and what they found: one function, `run`, for a compile, for `explain` and for tests
alike."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Graph, Node

from peft_fx.passes import price
from peft_fx.passes.affine import Rows
from peft_fx.passes.algebra import Size
from peft_fx.passes.budget import Held
from peft_fx.passes.chunked_loss import ChunkedLoss, chunk_loss
from peft_fx.passes.factors import factored
from peft_fx.passes.flow import Flow, Roles
from peft_fx.passes.identities import without_detours, without_identities
from peft_fx.passes.keep import Keep
from peft_fx.passes.lossy import KeptInput, Lossy, compress, layer_inputs
from peft_fx.passes.machine import MACHINES, Machine
from peft_fx.passes.merged import merged_already
from peft_fx.passes.moments import Budget, Moments, from_moments
from peft_fx.passes.nodes import is_tensor, value
from peft_fx.passes.notation import scale_of, written
from peft_fx.passes.parts import Wholes
from peft_fx.passes.policies import POLICIES
from peft_fx.passes.quantised import Unfused
from peft_fx.passes.refusals import refusals
from peft_fx.passes.regimes import AtLeast, Regimes
from peft_fx.passes.regions import Region, regions, rewrite
from peft_fx.passes.rewrite import Rewriter
from peft_fx.passes.scaled_reads import scale_results
from peft_fx.passes.sites import ACTIVATION, NONE, WEIGHT, Analysis, Group, Refusal, Site
from peft_fx.passes.snapshots import snapshots
from peft_fx.passes.tokenwise import by_chunks
from peft_fx.passes.transients import read_in_place
from peft_fx.passes.verify import Contract, verify

log = logging.getLogger("peft_fx.passes")
UNNOTICED = 0.03  # of a layer's own products: what saving memory may cost more than the forms save


@dataclass(frozen=True)
class Settings:
    """What the passes are asked to do; the meaning of each value is that of the option of the same name. `kernels` is
    whether a graph on a GPU with Triton may use those of `peft_fx/kernels/`."""

    form: str = "auto"
    numerics: str = "default"
    rounding: str = "nearest"
    keep: str = "recompute"
    velora_group: int = 32
    keep_layers: tuple[str, ...] = ()
    keep_rounding: str = "nearest"
    chunk_loss: bool | str = "auto"
    memory_weight: float = 0.0
    adapter_grad: str = "auto"
    machine: Machine = MACHINES["cpu"]
    kernels: bool = True
    rebuild_random: bool = True


@dataclass
class Outcome:
    """What was found in one graph and done to it: `merged` are adapters in weight form as they were written, `factored`
    is whether vectors were taken out of sums, `rebuilt` how many values backward makes again; `spare` are the seconds
    of a step, by the price, that the forms save and that are too few to notice; `seconds` is the time of the passes
    themselves; `budget` is what was done for a memory budget, after the passes, where there is one."""

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    merged: list[Site] = field(default_factory=list)
    losses: list[ChunkedLoss] = field(default_factory=list)
    inputs: list[KeptInput] = field(default_factory=list)
    factored: bool = False
    rebuilt: int = 0
    spare: float = 0.0
    seconds: float = 0.0
    budget: Held | None = None


@dataclass
class _Adapter:
    """What one site is in forward and in the input gradient: groups of terms, or regions."""

    forward: Group | Region | None = None
    grad: Group | Region | None = None

    @property
    def either(self) -> Group | Region:
        found = self.forward or self.grad
        assert found is not None
        return found

    def has_grad(self, flow: Flow) -> bool:
        """Whether W multiplies anything in backward: an input gradient that was not found stays as it is."""
        if isinstance(self.either, Group) and self.either.product.gathered:
            return False  # numbers of rows have none, whatever else reads W
        seen: set[Node] = set()
        todo: list[Any] = [self.either.weight_node]
        while todo:
            node = todo.pop()
            if isinstance(node, Node) and node not in seen and node is not self.either.product_node:
                seen.add(node)
                todo += [u for u in node.users if flow.is_weight(u)]
                if any(u in flow.backward for u in node.users):
                    return True
        return False


def run(
    graph: Graph,
    roles: Roles,
    settings: Settings,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
    at_least: AtLeast | None = None,
) -> Outcome:
    """Rewrites a joint or inference graph in place. Raises on any failure of its own: the caller then uses the graph
    that it kept. `hint` gives a dynamic size as a number, `at_least` compares one and adds a guard."""
    start = time.perf_counter()
    regimes = Regimes(hint, at_least or (lambda size, n: hint(size) >= n))
    before = Contract.of(graph)
    outcome, added = Outcome(), []
    added += without_identities(graph, fake_mode) + without_detours(graph, fake_mode)
    flow = Flow(graph, roles)
    factors = factored(graph, flow, fake_mode)
    outcome.factored = bool(factors)
    added += factors
    wholes = Wholes(graph, roles, fake_mode)
    unfused = Unfused(graph, Flow(graph, roles) if factors or wholes.joined else flow, fake_mode)
    analysis = first = Analysis(graph, roles, strict=settings.numerics == "strict")
    inputs = layer_inputs(analysis.flow)
    rows = Rows(graph.nodes, analysis.flow)
    found, refused = regions(graph, rows, analysis)
    known = {r.name for r in refused}  # more is known of a region than of what is left over
    left = refusals(analysis, rows, {p for region in found if not region.backward for p in region.row.trained})
    outcome.refusals = [r for r in left if r.name not in known] + refused
    members = _refused_members(outcome.refusals, roles) | _members(found, analysis.flow)
    groups = [g for g in analysis.groups if not any(g.product_node in region.nodes for region in found)]
    maps, sums = (_priced(one, analysis.flow, settings, hint, outcome) for one in (found, groups))
    settled = _settled([*maps, *sums], settings, regimes)
    if found:
        ours = set(rewrite(graph, rows, _decided(maps, analysis.flow, regimes, outcome), fake_mode, settings.rounding))
        added += ours
        analysis = Analysis(graph, roles, strict=settings.numerics == "strict")
        # a region's own sums stay for its parameters' gradients: no sites, and no more are those that a W' is made of
        groups = [g for g in analysis.groups if (g.backward or g.root in analysis.flow.forward) and g.root not in ours]
        sums = _priced(groups, analysis.flow, settings, hint, outcome)
        _settled([c for c in sums if c[0].either.product_node not in settled], settings, regimes)
    chosen = _decided(sums, analysis.flow, regimes, outcome)
    outcome.sites = _numbered(_joined(outcome.sites))
    members = _members(groups, analysis.flow) | members  # of the same parameters, a region is the site
    outcome.merged = merged_already(first, members.keys(), hint)
    _log(outcome)
    rewriter = Rewriter(graph, fake_mode, settings.rounding, settings.kernels)
    rewriter.rewrite(sorted(chosen, key=lambda g: analysis.position[g.root]))
    added += rewriter.build.added + unfused.settle() + wholes.settle()
    training = bool(analysis.flow.backward)
    if training and settings.keep != "inductor" and (outcome.sites or outcome.refusals or settings.keep_layers):
        added += _for_backward(graph, roles, settings, fake_mode, hint, outcome, members, inputs)
    if settings.chunk_loss:
        worth, always = settings.memory_weight, settings.chunk_loss is True
        outcome.losses, unfit, new = chunk_loss(
            graph, Flow(graph, roles), settings.machine, fake_mode, hint, regimes.at_least, worth, always
        )
        outcome.refusals += unfit
        added += new
    added += snapshots(graph, fake_mode)
    verify(graph, before, added, fake_mode)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _for_backward(
    graph: Graph,
    roles: Roles,
    settings: Settings,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
    outcome: Outcome,
    members: dict[Node, str],
    inputs: frozenset[Node],
) -> list[Node]:
    """What the adapters' gradients are computed from, and what is kept for it; the nodes added."""
    default, is_lossy = settings.numerics == "default", settings.keep in POLICIES
    moments, added = Moments([]), []

    def analysed(rebuilt: frozenset[Node] = frozenset()) -> Keep:
        return Keep(graph, Flow(graph, roles), hint, settings.rebuild_random, moments.reading, rebuilt)

    def lossy(keep: Keep) -> Lossy:
        asked = settings.velora_group, settings.keep_rounding, settings.machine.name
        policies = {k: make(*asked) for k, make in POLICIES.items()}
        return compress(keep, members, inputs, fake_mode, policies, settings.keep, settings.keep_layers)

    if default and settings.adapter_grad != "low_rank":
        dense = settings.adapter_grad == "dense"
        priced = settings.form == "auto" and (outcome.sites or outcome.refusals)
        budget = Budget(outcome.spare, settings.memory_weight) if priced else None
        flow = Flow(graph, roles)
        moments = from_moments(graph, flow, fake_mode, hint, analysed, settings.machine, budget, is_lossy, dense)
        added += moments.added
    compressed = lossy(analysed()) if is_lossy else None
    added += compressed.added if compressed else []
    cheaper = _all_cheaper_as_written(outcome, settings)
    # then it is Inductor's graph, and no other
    as_written = cheaper and not moments.added and _on_a_gpu(graph) and _asks_for_time(settings)
    if default and not cheaper:
        added += read_in_place(graph, Flow(graph, roles), fake_mode, hint, settings.machine, settings.kernels)
        added += by_chunks(graph, Flow(graph, roles), fake_mode, settings.machine)
    if default and not as_written:
        added += scale_results(graph, Flow(graph, roles), fake_mode, hint, settings.machine)
    weights = {members.get(p, roles[p].name) for p in moments.weights}
    outcome.sites = [_with_dense_gradient(site, weights) for site in outcome.sites]
    keep = analysed(compressed.rebuilt if compressed else frozenset())
    outcome.inputs = (compressed or lossy(keep)).inputs
    if not as_written:
        outcome.rebuilt = keep.mark()
    return added


def _on_a_gpu(graph: Graph) -> bool:
    return any(is_tensor(n) and value(n).device.type == "cuda" for n in graph.find_nodes(op="placeholder"))


def _asks_for_time(settings: Settings) -> bool:
    """Whether what a kernel takes to start, which is most of it for few tokens on a GPU, is worth more than memory."""
    return settings.keep == "recompute" and not settings.memory_weight


def _all_cheaper_as_written(outcome: Outcome, settings: Settings) -> bool:
    """Whether the price left every adapter alone: then so are the products of their gradients.

    Few tokens make it so, of which copies are small, and reading in place costs more than the adapters do.
    """
    weight = any(WEIGHT in (s.forward, s.input_grad) for s in outcome.sites)
    priced = settings.form == "auto" or not outcome.sites
    return priced and not weight and not outcome.refusals


def _priced(
    found: Sequence[Group | Region], flow: Flow, settings: Settings, hint: Callable[[Size], int], outcome: Outcome
) -> list[Candidate]:
    """The adapters that groups or regions are of, but for those refused, each with what its price depends on."""
    refused = {r.name for r in outcome.refusals}
    adapters = [a for a in _adapters(found, flow) if a.either.site_name(flow) not in refused]
    return [(adapter, _Priced.of(adapter, flow, settings, hint)) for adapter in adapters]


def _settled(candidates: Sequence[Candidate], settings: Settings, regimes: Regimes) -> set[Node]:
    """Settles the regimes that adapters are decided in; their base products, which tell them apart."""
    if settings.form == "auto":
        regimes.settle((adapter.either.tokens, prices.forms) for adapter, prices in candidates)
    return {adapter.either.product_node for adapter, _ in candidates}


def _decided(candidates: Sequence[Candidate], flow: Flow, regimes: Regimes, outcome: Outcome) -> list[Any]:
    """Adds a site for each adapter to the outcome; those of its groups or regions that are to be in weight form."""
    chosen: list[Any] = []
    for adapter, prices in candidates:
        site, weight_form = _decide(adapter, flow, prices, regimes.tokens(adapter.either.tokens))
        outcome.sites.append(site)
        outcome.spare += prices.spare(regimes.tokens(adapter.either.tokens))
        chosen += weight_form
    return chosen


def _members(found: Sequence[Group | Region], flow: Flow) -> dict[Node, str]:
    """The parameters of adapters, frozen ones too, and what is trained below their modules, with the adapter's name."""
    own = {p: one.site_name(flow) for one in found for node in one.adapter_nodes for p in flow.parameters(node)}
    trained = {p: role.name for p, role in flow.roles.items() if role.trainable and p not in own}
    below = {p: site for p, name in trained.items() for site in own.values() if name.startswith(f"{site}.")}
    return below | own


def _refused_members(refused: Sequence[Refusal], roles: Roles) -> dict[Node, str]:
    """Of adapters without a weight form: what is below their module, and what is trained beside their weight."""
    found = {}
    for r in sorted(refused, key=lambda r: len(r.name)):  # an inner module's after that of one around it
        for p, role in roles.items():
            module, beside = role.name.rpartition(".")[0], r.name.rpartition(".")[0]
            if role.name.startswith(f"{r.name}.") or (role.trainable and module == beside and p not in found):
                found[p] = r.name
    return found


def _with_dense_gradient(site: Site, weights: set[str]) -> Site:
    """The site, whose adapter's gradients come from xᵀ·dy where that is said of its weight."""
    name = site.name.partition("#")[0]
    dense = any(w == name or w.startswith(f"{name}.") for w in weights)
    return replace(site, adapter_grad="dense") if dense else site


def _log(outcome: Outcome) -> None:
    for s in outcome.sites:
        log.debug("%s: forward %s, input gradient %s (%s)", s.name, s.forward, s.input_grad, s.reason)
    for r in outcome.refusals:
        log.debug("%s: refused, %s (%s)", r.name, r.code, r.detail)


def _adapters(found: Sequence[Group | Region], flow: Flow) -> list[_Adapter]:
    """By adapter. A weight used twice has as many adapters: backward meets the uses in the reverse order."""
    adapters: dict[Any, list[_Adapter]] = {}
    for one in found:
        if not one.backward:
            adapters.setdefault(one.key, []).append(_Adapter(forward=one))
    for one in reversed([f for f in found if f.backward]):
        same = adapters.setdefault(one.key, [])
        free = next((a for a in same if a.grad is None), None)
        if free is None:
            same.append(_Adapter(grad=one))
        else:
            free.grad = one
    return _paired([a for same in adapters.values() for a in same], flow)


def _paired(adapters: list[_Adapter], flow: Flow) -> list[_Adapter]:
    """Forward and backward may compute the same weight each for itself, from one parameter."""

    def alone(direction: str) -> dict[Any, list[_Adapter]]:
        found: dict[Any, list[_Adapter]] = {}
        for a in adapters:
            other = {"forward": "grad", "grad": "forward"}[direction]
            if getattr(a, direction) is not None and getattr(a, other) is None:
                found.setdefault(frozenset(flow.parameters(a.either.weight_node)), []).append(a)
        return found

    grads = alone("grad")
    for parameters, (first, *others) in alone("forward").items():
        matching = grads.get(parameters, [])
        if parameters and not others and len(matching) == 1:
            first.grad = matching[0].grad
            adapters.remove(matching[0])
    return adapters


@dataclass(frozen=True)
class _Priced:
    """What the price of an adapter's forms depends on."""

    settings: Settings
    forward: price.Shape | None
    grad: price.Shape | None
    training: bool
    trained: bool

    @classmethod
    def of(cls, adapter: _Adapter, flow: Flow, settings: Settings, hint: Callable[[Size], int]) -> _Priced:
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


Candidate = tuple[_Adapter, _Priced]


def _decide(adapter: _Adapter, flow: Flow, priced: _Priced, T: int) -> tuple[Site, list[Any]]:
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


def _algebra(adapter: _Adapter, forms: tuple[str, str]) -> dict[str, list[str]]:
    """What is computed, as written and as chosen."""
    found = {}
    for direction, one, form in zip(("forward", "input_grad"), (adapter.forward, adapter.grad), forms, strict=True):
        if one is not None:
            before, merged = written(one)
            found[direction] = [before, merged if form == WEIGHT else before]
    scale = scale_of(adapter.either)
    return found | ({"where": [scale]} if scale else {})


def _cost(
    machine: Machine, shapes: list[price.Shape | None], forms: tuple[str, str], trained: bool
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


def _joined(sites: list[Site]) -> list[Site]:
    """Where the forward is a region and the input gradient a sum of terms, they are one site."""
    found: list[Site] = []
    for site in sites:
        i = next((i for i, s in enumerate(found) if _is_half_of(site, s)), None)
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


def _numbered(sites: list[Site]) -> list[Site]:
    """Calls of one layer are told apart by a number."""
    seen: Counter[str] = Counter()
    named = []
    for site in sites:
        seen[site.name] += 1
        n = seen[site.name]
        named.append(site if n == 1 else replace(site, name=f"{site.name}#{n}"))
    return named
