"""Adapter gradients without full-size copies in the adapter's dtype.

With a bf16 base and fp32 adapters, each product of an adapter's gradient, `dA = xᵀ(dy·Bᵀ)` and `dB = (x·A)ᵀdy`, reads
an fp32 copy of a bf16 tensor as long as the batch, and several are alive at once. The copy holds no more than the
tensor itself. So the product reads that, and its other factor, narrow and in fp32, as the sum of two bf16 matrices,
`hi = cast(F)` and `lo = cast(F - hi)`, side by side:

    x32·F  ->  y[:, :r] + y[:, r:]   with   y = x16·[hi | lo]

16 bits of the factor are kept that way. The result is fp32 where a device multiplies half-precision matrices into
fp32 (CUDA, XPU). A CPU rounds it, so there what the rounded result lacks is computed as a second one, `y + (x16·F -
y)`: 16 bits again. Products that the model's own outputs need are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.algebra import MANTISSA, Matrix, Scale, Size, coarser
from peft_fx.passes.flow import Flow
from peft_fx.passes.rewrite import Builder, erase_unused
from peft_fx.passes.transfer import Layout, Reader, aten, numel, shape, tensor_arg, value

MIXED = {"cuda", "xpu"}  # devices with a product of half-precision matrices that is not rounded to their dtype
NARROW = 8  # the other factor is at most an eighth of the copy


def read_in_place(
    graph: Graph, flow: Flow, fake_mode: AbstractContextManager[Any], hint: Callable[[Size], int]
) -> list[Node]:
    """Rewrites every such product in place; returns the nodes added."""
    reader, build = Reader(graph), Builder(graph, fake_mode)
    products = [n for n in graph.nodes if n.target is aten.mm.default and n not in flow.forward]
    found = {
        n: (left, copied) for n in products for left in (False, True) if (copied := _copied(reader, n, left, hint))
    }
    for node, (left, copied) in found.items():
        _replace(graph, build, node, left, *copied)
    return build.added


def _operands(node: Node, left: bool) -> tuple[Node, Node]:
    """The operand looked at, and the other one."""
    a, b = tensor_arg(node, 0), tensor_arg(node, 1)
    return (a, b) if left else (b, a)


def _copied(reader: Reader, node: Node, left: bool, hint: Callable[[Size], int]) -> tuple[Matrix, Scale] | None:
    """The tensor that a product's operand is a wider and much larger copy of; its `precision` is what it can be read
    in."""
    operand, other = _operands(node, left)
    term = reader.term(operand, Layout(1, shape(operand)[-1]))
    source, dtype = term.factors[0], value(operand).dtype
    if len(term.factors) > 1 or not isinstance(source.name, Node) or term.scale.names:
        return None
    is_copy = source.precision in MANTISSA and source.precision != dtype and coarser(source.precision, dtype) != dtype
    small, large = (hint(numel(shape(n))) for n in (other, operand))
    return (source, term.scale) if is_copy and large >= NARROW * small > 0 else None


def _replace(graph: Graph, build: Builder, node: Node, left: bool, wide: Matrix, scale: Scale) -> None:
    operand, other = _operands(node, left)
    build.like = node
    with graph.inserting_before(node):
        dtype = wide.precision
        plain = build.like_2d(wide, operand, dtype)
        hi = build.cast(other, dtype)
        lo = build.cast(build.call(aten.sub.Tensor, other, build.cast(hi, value(other).dtype)), dtype)
        both = build.call(aten.cat.default, [hi, lo], 1 if left else 0)
        dim, r = (1, shape(other)[1]) if left else (0, shape(other)[0])
        results = _products(build, *((plain, both) if left else (both, plain)))
        halves = [
            build.cast(build.call(aten.slice.Tensor, result, dim, i * r, (i + 1) * r), value(node).dtype)
            for result in results
            for i in range(2)
        ]
        new = functools.reduce(lambda a, b: build.call(aten.add.Tensor, a, b), halves)
        if scale.number != 1:
            new = build.call(aten.mul.Tensor, new, scale.number)
    node.replace_all_uses_with(new)
    erase_unused(graph, node)


def _products(build: Builder, a: Node, b: Node) -> list[Node]:
    """The product of two half-precision matrices, as the sum of these: one fp32 result, or what a first result lacks
    as a second."""
    if value(a).device.type in MIXED:
        return [build.call(aten.mm.dtype, a, b, torch.float32)]
    first = build.call(aten.mm.default, a, b)
    return [first, build.call(aten.addmm.default, first, a, b, beta=-1)]
