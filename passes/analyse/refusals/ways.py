"""The ways in a graph that all who look for adapters without a weight form go: up to what a value is made of, down to
what reads it; and what they ask of a node on the way."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator

from torch.fx import Node

from peft_fx.passes.analyse.linear_rules import products_in
from peft_fx.passes.analyse.maps import is_scaled_by_a_root
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.graph.nodes import CASTS, LAYOUTS, SCALINGS, aten, is_tensor, shape, value

NEAR = 80  # nodes: farther away than this, nothing is part of one layer's adapter
READS = LAYOUTS | CASTS | SCALINGS | {operator.getitem}  # what an adapter reads its input through, besides a mask


def reached(start: Node, step: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """The nodes near one, in the order of the steps to them."""
    seen, todo = {start}, [start]
    while todo and len(seen) < NEAR:
        node = todo.pop(0)
        yield node
        new = [n for n in step(node) if n not in seen]
        seen.update(new)
        todo += new


def values_read(analysis: Sums, node: Node) -> list[Node]:
    """What a node reads besides weights."""
    return [n for n in node.all_input_nodes if not analysis.flow.is_weight(n)]


def narrow_operand(analysis: Sums, node: Node) -> Node | None:
    """The trained weight that a node multiplies a value by, a vector or a matrix that is not square."""
    if node.target is aten.mul.Tensor:
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        found = [n for n in operands if analysis.flow.is_weight(n) and value(n).ndim and analysis.flow.is_trained(n)]
        same = all(analysis.flow.is_weight(n) for n in operands)  # a product of weights reads nothing
        of_a_norm = any(is_scaled_by_a_root(n) for n in operands)
        return found[0] if len(operands) == 2 and len(found) == 1 and not (same or of_a_norm) else None
    for product in products_in(node):
        weights = analysis.flow.is_weight(product.left) and analysis.flow.is_weight(product.right)
        if weights or product.gathered:  # a trained table is no adapter of what its rows are added to
            continue
        for operand in (product.left, product.right):
            rows, cols = shape(operand)[:2] if product.window is not None else shape(operand)[-2:]
            if rows != cols and analysis.flow.is_weight(operand) and analysis.flow.is_trained(operand):
                return operand
    return None


def is_matrix(node: Node) -> bool:
    """Whether a value is longer than one along more than one dimension: a norm's scale `[1,C,1,1]` is a vector."""
    return bool(sum(n != 1 for n in shape(node)) > 1)


def is_beside(analysis: Sums, weight: Node, kernel: Node) -> bool:
    """Whether a trained parameter of a weight is in the module around a kernel's own."""
    roles = analysis.flow.roles
    own = next(iter(analysis.flow.parameters(kernel)), None)
    if own is None:  # numbers that the graph makes itself are in no module
        return False
    module = roles[own].name.split(".")[:-2]
    return any(
        roles[p].trainable and roles[p].name.split(".")[: len(module)] == module
        for p in analysis.flow.parameters(weight)
    )


def trained_in(analysis: Sums, nodes: Iterable[Node]) -> list[Node]:
    """The trained parameters that some nodes read."""
    flow = analysis.flow
    weights = {n for node in nodes for n in node.all_input_nodes if flow.is_weight(n)}
    return sorted({p for w in weights for p in flow.parameters(w) if flow.roles[p].trainable}, key=str)
