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
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.algebra import Size
from peft_fx.passes.flow import Flow
from peft_fx.passes.machine import Machine
from peft_fx.passes.nodes import (
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
from peft_fx.passes.rewrite import Builder, erase_unused

PASSED = RESHAPES | TRANSPOSES  # between the scaled tensor and a product


def scale_results(
    graph: Graph, flow: Flow, fake_mode: AbstractContextManager[Any], hint: Callable[[Size], int], machine: Machine
) -> list[Node]:
    """Rewrites every such product of backward in place; returns the nodes added."""

    def seconds(node: Node) -> float:
        return machine.one_pass(2 * math.prod(map(hint, shape(node))) * value(node).dtype.itemsize)

    build = Builder(graph, fake_mode)
    for scaled in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        u, number = scaled.args
        if scaled in flow.forward or not is_tensor(u) or not is_number(number) or not _is_plain(scaled, u):
            continue
        products = _products(scaled)
        if products and _exists_besides(u, scaled) and sum(map(seconds, products)) < seconds(scaled):
            for product in products:
                _unscale(build, product, scaled, number)
    return build.added


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


def _unscale(build: Builder, product: Node, scaled: Node, number: float) -> None:
    build.like = product
    with build.graph.inserting_before(product):
        operands = [_without(build, operand, scaled) for operand in product.args]  # type: ignore[arg-type]
        new = build.call(aten.mul.Tensor, build.call(aten.mm.default, *operands), number)
    product.replace_all_uses_with(new)
    erase_unused(build.graph, product)


def _without(build: Builder, operand: Node, scaled: Node) -> Node:
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
        node = build.call(step.target, node, *step.args[1:])
    return node
