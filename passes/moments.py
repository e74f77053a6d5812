"""Parameter gradients that read a product's result, from `G = uᵀ·dy` instead.

The gradient of a vector behind a layer, `dl = Σ_t dy·(u·W)`, and of a matrix behind it, `(u·W)ᵀ·dz`, read u·W: a tensor
that the frozen model does not keep, and that takes the layer's own product to compute again. Both are sums over tokens
of something linear in u times something linear in dy, so they depend on `G = uᵀ·dy` alone (see `affine.py`):
`dl = Σ_k W·G`, `Wᵀ·(uᵀ·dz)`. G costs what u·W costs, is no larger than W, and several gradients of a layer share it. u
is the narrowest value on the way: where the product is `z·B` with z = x·A of rank r, G = zᵀ·dy has r rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes import price
from peft_fx.passes.affine import Row, Rows, Token, in_order, plain
from peft_fx.passes.algebra import MANTISSA, Size, finer
from peft_fx.passes.flow import Flow
from peft_fx.passes.keep import Keep
from peft_fx.passes.nodes import CAST, aten, is_tensor, numel, shape, tensor_arg, value
from peft_fx.passes.replay import Replay
from peft_fx.passes.rewrite import Builder, erase_unused
from peft_fx.passes.transients import MIXED

FEW = 8  # with an eighth as many tokens as G has rows, a result is kept for a vector's gradient
NARROW = 4  # a product with a quarter of its input's columns is computed again


@dataclass(frozen=True)
class Contraction:
    """A sum over tokens: `Σ_t read·other`, elementwise, or `readᵀ·other`; `source` is what read is computed from."""

    node: Node
    read: Node
    other: Node
    source: Node


@dataclass
class Moments:
    """What was done: the nodes added, those among them that read activations, and the weights whose products are not
    computed again, trained ones where no frozen one is met."""

    added: list[Node]
    reading: frozenset[Node] = frozenset()
    weights: frozenset[Node] = frozenset()


def from_moments(
    graph: Graph,
    flow: Flow,
    fake_mode: AbstractContextManager[Any],
    hint: Callable[[Size], int],
    without: Callable[[], Keep],
    lossy: bool = False,
    dense: bool = False,
) -> Moments:
    """Replaces such gradients in place, where that pays beside what is kept `without`.

    A `lossy` policy keeps less than that: what it keeps of a matrix's input is read, not made again by a product; and a
    layer's result is not kept for a vector. `dense` does so wherever it can be done.
    """
    rows, build = Rows(graph.nodes, flow), Builder(graph, fake_mode)
    contractions = list(_contractions(graph, rows, flow, narrow=None if dense else NARROW))
    if not contractions:
        return Moments([])
    keep = without()
    shared: dict[Any, Node] = {}
    weights: set[Node] = set()
    for found in contractions:
        is_matrix = found.node.target is aten.mm.default
        if is_matrix and lossy:
            continue
        at_hand = not lossy and keep.costs_nothing(found.read)
        if not dense and (at_hand or not _pays(found, rows.of[found.source].width, hint, keep)):
            continue
        with graph.inserting_before(found.node):
            new = _Gradient(build, rows, found, shared).gradient()
        found.node.replace_all_uses_with(new)
        erase_unused(graph, found.node)
        row = rows.of[found.read]
        is_input = found.source is row.source or not rows.of[found.source].products
        weights |= (row.frozen or row.trained) if is_input else set()
    return Moments(build.added, frozenset(shared.values()), frozenset(weights))


def _pays(found: Contraction, width: int, hint: Callable[[Size], int], keep: Keep) -> bool:
    """Not for few tokens, nor where x would be kept in the place of less, of x·A where A is frozen."""
    tokens = hint(numel(shape(found.source))) // width if width else 0
    if not tokens or tokens < (width if found.node.target is aten.mm.default else width / FEW):
        return False
    read, source = (hint(numel(shape(n))) for n in (found.read, found.source))
    return read >= source or keep.cost(found.source) <= keep.bytes(found.read)


def _contractions(graph: Graph, rows: Rows, flow: Flow, narrow: int | None) -> Iterator[Contraction]:
    for node in graph.nodes:
        if node not in flow.backward:
            continue
        a, b = _factors(node)
        for read, other in ((a, b), (b, a)):
            if read is None or other is None or other not in flow.backward or read in flow.backward:
                continue
            row = rows.of.get(read)
            source = _narrowest(read, rows, narrow) if row is not None and row.products else None
            if row is not None and source is not None and _sums_over_tokens(node, read, row):
                yield Contraction(node, read, other, source)


def _factors(node: Node) -> tuple[Node | None, Node | None]:
    """What is multiplied and then summed over tokens."""
    if node.target is aten.mm.default:
        return tensor_arg(node, 0), tensor_arg(node, 1)
    if node.target is aten.sum.dim_IntList:
        product = _uncast(tensor_arg(node, 0))
        operands = [n for n in product.args[:2] if is_tensor(n)] if product.target is aten.mul.Tensor else []
        if len(operands) == 2 and shape(operands[0]) == shape(operands[1]):
            return operands[0], operands[1]
    return None, None


def _uncast(node: Node) -> Node:
    """A value before it was cast to a finer dtype: the same numbers."""
    while node.target is CAST and MANTISSA.get(value(tensor_arg(node, 0)).dtype, 99) <= MANTISSA[value(node).dtype]:
        node = tensor_arg(node, 0)
    return node


def _sums_over_tokens(node: Node, read: Node, row: Row) -> bool:
    tokens = [i for i, dim in enumerate(row.dims) if any(isinstance(a, Token) for a in dim)]
    if not tokens or any(isinstance(a, int) for i in tokens for a in row.dims[i]):
        return False
    if node.target is aten.mm.default:
        return tokens == [1 if node.args[0] is read else 0]
    dims = {d % len(row.dims) for d in node.args[1]}  # type: ignore[union-attr, operator]
    return in_order(row.dims) and set(tokens) <= dims and all(shape(read)[d] == 1 for d in dims - set(tokens))


def _narrowest(read: Node, rows: Rows, narrow: int | None) -> Node | None:
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


def _leads_to(source: Node, read: Node, rows: Rows) -> bool:
    """Whether a value tells the tokens apart that a later one has: flattened, it does not say where they part."""
    return rows.from_source([read], source).of[read].source is source


class _Gradient:
    """One gradient from G."""

    def __init__(self, build: Builder, rows: Rows, found: Contraction, shared: dict[Any, Node]):
        self.build, self.rows, self.found, self.shared = build, rows, found, shared
        build.like = found.node

    def gradient(self) -> Node:
        node, read, source = self.found.node, self.found.read, self.found.source
        count, dtype = self.rows.of[source].width, price.merge_dtype(value(source).dtype)
        if node.target is aten.mm.default:  # a product in fp64 takes longer than what it is instead of
            dtype = finer(torch.float32, value(node).dtype)
        self.build.rebuild = True
        replay = Replay(self.build, self.rows.from_source([read], source), source, count, dtype)
        if node.target is aten.mm.default:
            rows, constant = replay.written(read), replay.value(read).constant
        else:
            rows, constant = replay.matrix(read)
        self.build.rebuild = False
        if node.target is aten.mm.default:
            result = self._product(rows, constant, dtype)
        else:
            result = self.build.call(aten.mul.Tensor, rows, self._second(dtype))
            result = self.build.call(aten.sum.dim_IntList, result, [0])
            if constant is not None:
                total = self.build.call(aten.mul.Tensor, constant, self._first(dtype))
                result = self.build.call(aten.add.Tensor, result, self.build.call(aten.squeeze.dim, total, 0))
        result = self.build.reshape(result, list(shape(node)))
        return self.build.cast(result, value(node).dtype)

    def _product(self, rows: Node, constant: Node | None, dtype: Any) -> Node:
        """`readᵀ·other`, read being rows of features: `[N, K]·[K, M]`; or `otherᵀ·read`."""
        left = self.found.node.args[0] is self.found.read
        G, total = self._second(dtype), (None if constant is None else self._first(dtype))
        if not left:
            G = self.build.flip(G)
        result = self.build.call(aten.mm.default, *((rows, G) if left else (G, rows)))
        if constant is not None and total is not None:
            total = total if left else self.build.flip(total)
            outer = self.build.call(aten.mul.Tensor, constant, total)
            result = self.build.call(aten.add.Tensor, result, outer)
        return result

    def _tokens(self) -> tuple[Node, Node]:
        """u as [T,K] and what it meets as [T,M], in one dtype, that of the coarser unless they hold more."""
        node, source = self.found.node, self.found.source
        other = _uncast(self.found.other)
        if node.target is aten.mm.default and node.args[0] is not self.found.read:
            other = self.build.flip(other)
        u = _uncast(source)
        dtype = finer(value(u).dtype, value(other).dtype)
        M = shape(other)[-1] if node.target is aten.mm.default else self.rows.of[self.found.read].width
        u = self.build.reshape(u, [-1, self.rows.of[source].width])
        other = self.build.reshape(other, [-1, M])
        return self.build.cast(u, dtype), self.build.cast(other, dtype)

    def _second(self, dtype: Any) -> Node:
        """G = uᵀ·dy [K,M]."""
        key = "G", self.found.source, _uncast(self.found.other), self.found.node.target
        if key not in self.shared:
            u, dy = self._tokens()
            self.shared[key] = self._over_tokens(self.build.flip(u), dy)
        return self.build.cast(self.shared[key], dtype)

    def _over_tokens(self, u: Node, dy: Node) -> Node:
        """In fp32 of fp16: the sum may leave its range where the gradient that is made of it does not."""
        if value(u).dtype != torch.float16:
            return self.build.call(aten.mm.default, u, dy)
        if value(u).device.type in MIXED:
            return self.build.call(aten.mm.dtype, u, dy, torch.float32)
        return self.build.call(aten.mm.default, *(self.build.cast(n, torch.float32) for n in (u, dy)))

    def _first(self, dtype: Any) -> Node:
        """Σ_t dy [1,M]: what a constant beside u·W meets."""
        key = "sum", _uncast(self.found.other), self.found.node.target
        if key not in self.shared:
            _, dy = self._tokens()
            self.shared[key] = self.build.call(aten.sum.dim_IntList, self.build.cast(dy, dtype), [0], True)
        return self.build.cast(self.shared[key], dtype)
