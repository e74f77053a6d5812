"""What of a loss is put in the loop: every value with a row of logits for each token, what reads one, what one is
computed from, and all between; and the one scalar that backward enters it through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import Flow, is_tangent, reachable
from peft_fx.passes.graph.nodes import CASTS, LAYOUTS, MATRIX_PRODUCTS, aten, factors_of, is_tensor, numel, shape
from peft_fx.passes.loss.chunking import Plan
from peft_fx.passes.loss.row_rules import FILLS, RowEffect, Unfit, treatments

CURE = (
    "return the loss alone: peft_fx.loss_only(model), or compile a function such as "
    "`lambda **batch: model(**batch).loss`"
)


@dataclass(frozen=True)
class Loop:
    """What is done for each chunk: nodes in order with what they make of rows, those that are read outside, and the
    scalar of backward that the loop takes 1 for."""

    nodes: Mapping[Node, RowEffect]
    outputs: Mapping[Node, RowEffect]
    scalar: Node | None


def loop_around(graph: Graph, flow: Flow, logits: Node, plan: Plan) -> Loop:
    """The loop that the logits ask for; `Unfit` where there is none."""
    region = _wide_region(flow, logits, plan)
    unfit = None
    small, entries = plan.dtype == torch.float16, list(_entries(graph, flow, region))
    for scalar in reversed(entries) if small else entries:  # what is 1 for the whole is next to nothing for a row
        try:
            loop = _loop(_hull(graph, region, scalar), plan, scalar)
        except Unfit as why:
            unfit = unfit or why
        else:
            if small and scalar is not None and _scalars_behind(graph, flow, region, scalar):
                raise Unfit("dtype", "a row's part of a mean is too small for float16 before the loss is scaled")
            return loop
    raise unfit or Unfit("nonlinear", "the gradient of the logits comes from more than one scalar")


def _wide_region(flow: Flow, logits: Node, plan: Plan) -> set[Node]:
    """All that is wide and connected with the logits, and all that reads it."""

    def is_wide(node: Node) -> bool:
        if node.op != "call_function" or not is_tensor(node) or node.target in FILLS:
            return False
        if flow.is_weight(node) and node.target is not aten.expand.default:
            return False
        elements = numel([n if isinstance(n, int) else plan.hinted if n == plan.rows else n for n in shape(node)])
        return not _sums_over_tokens(node, flow) and _exceeds(elements, plan)

    region, todo = {logits}, [logits]
    while todo:
        node = todo.pop()
        if is_wide(node):
            if any(u.op == "output" for u in node.users):
                raise Unfit(
                    "logits_returned",
                    f"the logits, {plan.hinted}×{plan.vocabulary}, are an output of the graph, so they are kept whole; "
                    + CURE,
                )
            near = [*node.users, *(n for n in node.all_input_nodes if is_wide(n))]
        else:
            near = [n for n in node.all_input_nodes if is_wide(n)]
        todo += [n for n in near if n not in region]
        region.update(near)
    return region


def _exceeds(elements: Size, plan: Plan) -> bool:
    """Whether a value has more than `wide` elements for each row."""
    ratio = elements / plan.hinted if isinstance(elements, int) else elements / plan.rows
    try:
        return bool(ratio > plan.wide)
    except TypeError:  # of sizes that have nothing to do with the rows
        return False


def _sums_over_tokens(node: Node, flow: Flow) -> bool:
    return node.target in MATRIX_PRODUCTS and not any(flow.is_weight(f) for f in factors_of(node))


def _entries(graph: Graph, flow: Flow, region: set[Node]) -> Iterator[Node | None]:
    """The scalars through each of which alone backward enters the region, from the tangent onwards: a mean's division
    among them, so that the last one is that of a row."""
    inside = region & flow.backward
    if not inside:
        yield None
        return
    cone = (leading_up(graph, inside) & flow.backward) - region
    for node in graph.nodes:
        if node in cone and is_tensor(node) and numel(shape(node)) == 1:
            around = reachable(graph, is_tangent, node)
            if not around & inside:
                yield node


def _scalars_behind(graph: Graph, flow: Flow, region: set[Node], scalar: Node) -> bool:
    """Whether the region is entered through scalars that are computed from that one."""
    following = reachable(graph, lambda n: n is scalar) & leading_up(graph, region & flow.backward)
    scalars = [n for n in following - region - {scalar} if is_tensor(n) and numel(shape(n)) == 1]
    return any(n.target not in CASTS | LAYOUTS for n in scalars)


def leading_up(graph: Graph, of: Iterable[Node], without: Node | None = None) -> set[Node]:
    found = set(of)
    for node in reversed(graph.nodes):
        if node in found and node is not without:
            found.update(node.all_input_nodes)
    return found


def _hull(graph: Graph, region: set[Node], scalar: Node | None) -> list[Node]:
    """The region and all between two of its nodes, the way through the scalar apart, in order."""
    between = reachable(graph, region.__contains__, scalar) & leading_up(graph, region, scalar)
    return [n for n in graph.nodes if n in between]


def _loop(nodes: list[Node], plan: Plan, scalar: Node | None) -> Loop:
    treated = treatments(nodes, plan.rows)
    outputs = {n: t for n, t in treated.items() if any(u not in treated for u in n.users)}
    return Loop(treated, outputs, scalar)


def has_loss(graph: Graph, logits: Node) -> bool:
    """Whether one number that is computed from the logits is an output."""
    (output,) = graph.find_nodes(op="output")
    following = reachable(graph, lambda n: n is logits)
    return any(is_tensor(n) and n in following and numel(shape(n)) == 1 for n in output.args[0])
