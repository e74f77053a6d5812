"""Adapters that the model adds to the weight itself, `x·(W + s·A·B)`, as PEFT's `target_parameters` does to the weights
of experts: they are in weight form as they are written, and there is nothing to do for them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from torch.fx import Node

from peft_fx.passes.analyse import adapters
from peft_fx.passes.analyse.algebra import Matrix, Size, Term
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.analyse.sums import Sum, Sums
from peft_fx.passes.findings import NONE, WEIGHT, Site
from peft_fx.passes.graph.nodes import value

ALREADY = "already in weight form: the model adds to the weight itself"


def merged_already(analysis: Sums, placed: AbstractSet[Node], hint: Callable[[Size], int]) -> list[Site]:
    """The sites of sums `W + s·A·B` of weights, but for those of parameters that have their place elsewhere, as in the
    norm of a DoRA."""
    flow, found = analysis.flow, dict[str, Site]()
    for sum_ in analysis.sums:
        if sum_.root not in flow.forward or not flow.is_weight(sum_.root) or not _is_read(flow, sum_.root):
            continue
        weight, deltas = _parts(flow, sum_)
        trained = {p for t in deltas for f in t.factors for p in flow.parameters(f.name) if _is_learned(flow, p)}
        if weight is None or not trained or not placed.isdisjoint(trained):
            continue
        if all(adapters.adds(flow, weight, t.factors) for t in deltas):
            site = _site(flow, sum_.root, weight, deltas, bool(trained & flow.differentiated), hint)
            found.setdefault(site.name, site)
    return list(found.values())


def _is_learned(flow: Flow, parameter: Node) -> bool:
    """Whether an input is trained, or made of what is, in an earlier graph."""
    return flow.roles[parameter].trainable or parameter in flow.differentiated


def _parts(flow: Flow, sum_: Sum) -> tuple[Matrix | None, list[Term]]:
    """W, where one term of a sum is a parameter by itself, and the other terms, of several factors."""
    terms = [o.term for o in sum_.terms if o.term is not None]
    alone = [t.factors[0] for t in terms if len(t.factors) == 1 and flow.parameters(t.factors[0].name)]
    return alone[0] if len(alone) == 1 else None, [t for t in terms if len(t.factors) > 1]


def _is_read(flow: Flow, weight: Node) -> bool:
    """Whether forward reads a weight together with what is none, or hands it on to another graph."""
    seen, todo = {weight}, [weight]
    while todo:
        users = [u for u in todo.pop().users if u not in seen and (u in flow.forward or u.op == "output")]
        if any(u.op == "output" or not flow.is_weight(u) for u in users):
            return True
        seen.update(users)
        todo += users
    return False


def _site(
    flow: Flow, root: Node, weight: Matrix, deltas: list[Term], trained: bool, hint: Callable[[Size], int]
) -> Site:
    rows, cols = map(hint, weight.shape)
    backward = any(u in flow.backward for n in _made_of(flow, root) for u in n.users)
    nothing = {"before": 0, "after": 0}
    return Site(
        name=flow.site_name(weight, [f for t in deltas for f in t.factors]),
        method="low-rank",
        tokens=0,
        in_features=rows,
        out_features=cols,
        rank=max(hint(t.narrowest or 0) for t in deltas),
        dtype=str(value(root).dtype).removeprefix("torch."),
        forward=WEIGHT,
        input_grad=WEIGHT if backward else NONE,
        adapter_grad="dense" if trained else NONE,
        reason=ALREADY,
        flops=nothing,
        bytes=dict(nothing),
    )


def _made_of(flow: Flow, weight: Node) -> list[Node]:
    """A weight, and what is made of it alone."""
    found = [weight]
    for node in found:
        found += [u for u in node.users if u not in found and flow.is_weight(u)]
    return found
