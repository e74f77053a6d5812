"""Adapter gradients without scaled copies of activations.

`y = xW + s(xA)B` is written with `s` on a tensor as long as the batch, so that backward makes a second `[T,N]` tensor,
`s·dy`, beside the dy that the layer's own gradient reads, for two products whose results are small:
`dB = zᵀ(s·dy)` and `dz = (s·dy)·Bᵀ`. A number can as well be multiplied to what comes out, `[r,N]` and `[T,r]`:

    mm(a, s·u)  ->  s·mm(a, u)

where `u` exists beside its copy, and the copy's pass over memory takes longer than those over the results. fp16 is left
alone: a product of unscaled gradients may fall out of its range.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import (
    CASTS,
    LAYOUTS,
    PRODUCTS,
    RESHAPES,
    TRANSPOSES,
    aten,
    expr,
    is_number,
    is_tensor,
    shape,
    value,
)

PASSED = RESHAPES | TRANSPOSES  # between the scaled tensor and a product


def scale_results(joint: Joint, settings: Settings) -> None:
    """Rewrites every such product of backward."""

    def seconds(node: Node) -> float:
        numbers = math.prod(map(joint.sizes.hint, shape(node)))
        return settings.machine.one_pass(2 * numbers * value(node).dtype.itemsize)

    flow = joint.flow
    for scaled in joint.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        u, number = scaled.args
        if scaled in flow.forward or not is_tensor(u) or not is_number(number) or not _is_plain(scaled, u):
            continue
        products = _products(scaled)
        if products and _exists_besides(u, scaled) and sum(map(seconds, products)) < seconds(scaled):
            for product in products:
                _unscale(joint.edit, product, scaled, number)


def _is_plain(scaled: Node, u: Node) -> bool:
    """Whether a tensor can stand for its scaled copy: of one dtype, and laid out alike, so that a view of one is a view
    of the other (`mul` makes rows that are cut out of a longer sequence dense)."""
    dtype = value(scaled).dtype
    if not dtype.is_floating_point or dtype != value(u).dtype or dtype == torch.float16:
        return False
    return [expr(n) for n in value(scaled).stride()] == [expr(n) for n in value(u).stride()]


def _products(scaled: Node) -> list[Node]:
    """The products that a tensor is read by, where nothing else reads it."""
    found: list[Node] = []
    todo = list(scaled.users)
    while todo:
        user = todo.pop()
        if user.target is aten.mm.default:
            found.append(user)
        elif user.target in PASSED:
            todo += user.users
        else:
            return []
    return sorted(set(found))


def _exists_besides(u: Node, scaled: Node) -> bool:
    """Whether a tensor is in memory whatever becomes of the scaled one: given, or another product's operand."""
    if u.op == "placeholder":
        return True
    todo = [n for n in u.users if n is not scaled]
    while todo:
        user = todo.pop()
        if user.target in LAYOUTS | CASTS:
            todo += user.users
        elif user.target in PRODUCTS:
            return True
    return False


def _unscale(edit: Editor, product: Node, scaled: Node, number: float) -> None:
    with edit.at(product):
        operands = [_without(edit, operand, scaled) for operand in product.args]  # type: ignore[arg-type]
        edit.replace(product, edit.times(edit.call(aten.mm.default, *operands), number))


def _without(edit: Editor, operand: Node, scaled: Node) -> Node:
    """An operand as it was laid out, of what was scaled."""
    way: list[Node] = []
    node = operand
    while node is not scaled:
        if node.target not in PASSED:
            return operand
        way.append(node)
        node = node.args[0]  # type: ignore[assignment]
    node = scaled.args[0]  # type: ignore[assignment]
    for step in reversed(way):
        node = edit.call(step.target, node, *step.args[1:])
    return node
