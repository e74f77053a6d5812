"""Sums over tokens of something linear in u times something linear in dy: what of them can be had from `G = uᵀ·dy`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import MANTISSA, Size, finer
from peft_fx.passes.analyse.dims import Token, in_order, plain
from peft_fx.passes.analyse.maps import AffineMap, AffineMaps
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.nodes import (
    CAST,
    CASTS,
    COPIES,
    RESHAPES,
    SUMS,
    aten,
    is_tensor,
    numel,
    shape,
    tensor_arg,
    value,
)
from peft_fx.passes.keep.half_products import MIXED

Met = tuple[Node, Node, Node]  # a sum over tokens, and what of forward and of backward it multiplies


@dataclass(frozen=True)
class Contraction:
    """A sum over tokens: `Σ_t read·other`, elementwise, or `readᵀ·other`, and what G is made of, `u` and `dy`; `source`
    and `origin` hold these in the layout and the dtype that read and other are computed from."""

    node: Node
    read: Node
    other: Node
    u: Node
    dy: Node
    source: Node
    origin: Node

    @property
    def is_matrix(self) -> bool:
        return self.node.target is aten.mm.default


def by_itself(met: Met, rows: AffineMaps, narrow: int | None) -> Contraction | None:
    """A contraction that reads a product's result, as one with the gradient of that."""
    node, read, other = met
    source = _narrowest(read, rows, narrow) if rows.of[read].products else None
    origin = _untransposed(other) if node.target is aten.mm.default else uncast(other)
    if source is None or (node.target is aten.mm.default and not _is_linear(node, origin, other, rows)):
        return None
    return Contraction(node, read, other, source, origin, source, origin)


def shared(
    met: Met, made: Iterable[Contraction], rows: AffineMaps, hint: Callable[[Size], int], machine: Machine
) -> Contraction | None:
    """A matrix's gradient both of whose operands are computed from what a vector's G is made of, where that costs
    less than what it reads of all tokens."""
    node, read, other = met
    for one in made:
        source, origin = _start(one.u, rows.of[read].source), _start(one.dy, rows.of[other].source)
        if node.target is not aten.mm.default or one.is_matrix or shape(one.dy)[-1] != rows.of[one.read].width:
            continue
        if (rows.of[read].source, rows.of[other].source) != (rows.of[source].source, rows.of[origin].source):
            continue
        held = held_in(one.u, one.dy, machine)
        if finer(held, value(node).dtype) != held:
            continue  # G rounds what the gradient does not: where u and dy are bf16, and a product of theirs is
        if _leads_to(source, read, rows) and _is_linear(node, origin, other, rows):
            K, N = (int(shape(n)[-1]) for n in (source, origin))
            cheaper = hint(numel(shape(source))) // K * (K + N) >= K * N
            return Contraction(node, read, other, one.u, one.dy, source, origin) if cheaper else None
    return None


def held_in(u: Node, dy: Node, machine: Machine) -> torch.dtype:
    """The dtype of G: that of the finer one; fp32 where a device has products of half-precision matrices in fp32, or
    multiplies fp32 sooner than these, and of fp16, as the sum may leave its range where the gradient that is made of it
    does not."""
    dtype = finer(value(uncast(u)).dtype, value(dy).dtype)
    mixed = dtype == torch.bfloat16 and (value(u).device.type in MIXED or not machine.has_units_of(dtype))
    return torch.float32 if mixed or dtype == torch.float16 else dtype


def multiplied_in(u: Node, dy: Node, machine: Machine) -> torch.dtype:
    """The dtype of what is multiplied for G: that of u and dy where the device's products give a wider one."""
    dtype = finer(value(uncast(u)).dtype, value(dy).dtype)
    return dtype if value(u).device.type in MIXED else held_in(u, dy, machine)


def _is_linear(node: Node, origin: Node, other: Node, rows: AffineMaps) -> bool:
    """Whether what is summed over tokens is linear in a value of theirs, nothing constant being added."""
    if not _leads_to(origin, other, rows):
        return False
    biased = SUMS | {aten.addmm.default, aten.baddbmm.default}
    row = rows.from_source([other], origin).of[other]
    return not any(n.target in biased for n in rows.between([other], origin)) and _sums_over_tokens(node, other, row)


def _untransposed(node: Node) -> Node:
    """A value before it was cast to a finer dtype and transposed."""
    while True:
        start, node = node, uncast(node)
        if node.target is aten.permute.default and list(node.args[1]) == [1, 0]:  # type: ignore[arg-type]
            node = tensor_arg(node, 0)
        if node is start:
            return node


def _start(node: Node, source: Node) -> Node:
    """A value before it was cast to any dtype, and its tokens laid out anew; `source` where that is the same value."""

    def before(node: Node, width: Any) -> Node:
        while node.target in CASTS | COPIES | RESHAPES and width in (None, shape(tensor_arg(node, 0))[-1]):
            node = tensor_arg(node, 0)
        return node

    width = shape(node)[-1]
    is_source = shape(source)[-1] == width and before(node, None) is before(source, None)
    return source if is_source else before(node, width)


def contractions(graph: Graph, rows: AffineMaps) -> Iterator[Met]:
    """The sums over tokens in backward of a value of forward times one of backward."""
    backward = rows.flow.backward
    for node in graph.nodes:
        if node not in backward:
            continue
        a, b = _factors(node)
        for read, other in ((a, b), (b, a)):
            if read is None or other is None or other not in backward or read in backward:
                continue
            if read in rows.of and _sums_over_tokens(node, read, rows.of[read]):
                yield node, read, other


def _factors(node: Node) -> tuple[Node | None, Node | None]:
    """What is multiplied and then summed over tokens."""
    if node.target is aten.mm.default:
        return tensor_arg(node, 0), tensor_arg(node, 1)
    if node.target is aten.sum.dim_IntList:
        product = uncast(tensor_arg(node, 0))
        operands = [n for n in product.args[:2] if is_tensor(n)] if product.target is aten.mul.Tensor else []
        if len(operands) == 2 and shape(operands[0]) == shape(operands[1]):
            return operands[0], operands[1]
    return None, None


def uncast(node: Node) -> Node:
    """A value before it was cast to a finer dtype: the same numbers."""
    while node.target is CAST and MANTISSA.get(value(tensor_arg(node, 0)).dtype, 99) <= MANTISSA[value(node).dtype]:
        node = tensor_arg(node, 0)
    return node


def _sums_over_tokens(node: Node, read: Node, row: AffineMap) -> bool:
    tokens = [i for i, dim in enumerate(row.dims) if any(isinstance(a, Token) for a in dim)]
    if not tokens or any(isinstance(a, int) for i in tokens for a in row.dims[i]):
        return False
    if node.target is aten.mm.default:
        return tokens == [1 if node.args[0] is read else 0]
    dims = {d % len(row.dims) for d in node.args[1]}  # type: ignore[union-attr, operator]
    return in_order(row.dims) and set(tokens) <= dims and all(shape(read)[d] == 1 for d in dims - set(tokens))


def _narrowest(read: Node, rows: AffineMaps, narrow: int | None) -> Node | None:
    """The value of fewest features that a product's wide result is computed from, and nothing else is; none where the
    result has one part in `narrow` of its features."""
    row, node = rows.of[read], read
    found: list[Node] = []
    while node is not row.source:
        operands = {n for n in rows.operands(node) if n in rows.of}
        if len(operands) != 1:
            node = row.source  # several ways lead here: they meet at the source
        else:
            (node,) = operands
        one_piece = plain(rows.of[node].dims) and shape(node)[-1] == rows.of[node].width
        if rows.of[node].products < row.products and one_piece:
            found.append(node)
    leading = (n for n in sorted(found, key=lambda n: rows.of[n].width) if _leads_to(n, read, rows))
    best = next(leading, None)
    if best is None or (narrow is not None and narrow * rows.of[read].width <= rows.of[best].width):
        return None
    return best


def _leads_to(source: Node, read: Node, rows: AffineMaps) -> bool:
    """Whether a value tells the tokens apart that a later one has: flattened, it does not say where they part."""
    row = rows.from_source([read], source).of.get(read)
    return row is not None and row.source is source
