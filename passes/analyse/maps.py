"""AffineMap-wise affine maps: values each of whose rows is `u·M + c` of the same row of one source `u`.

A LoRA is a sum of products and is read as such (`linear_rules.py`). Other adapters scale, rotate, pool, permute or
transform features on the way: `((u·A)*d)·B`, `(u·W)*l`, `rotate(u)·W`. They need no words of their own. Where every op
between u and y treats all rows alike and is linear in u, y = u·W' + b', and running the same ops on the rows of an
identity matrix in place of the tokens gives W', on a row of zeros b': `W' = f(I) - f(0)`, `b' = f(0)`. The identity is
not multiplied: `I·W` is W, `(I*d)·W` is `d[:, None]*W`.

The same holds for a gradient that is a sum over tokens of something linear in u times something linear in dy: it
depends on `G = uᵀ·dy` alone, so running its ops on the rows of I and of G in place of the tokens gives the same sum.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.affine_rules import AFFINE, held
from peft_fx.passes.analyse.algebra import coarser
from peft_fx.passes.analyse.dims import Dims, Token, regroup
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.graph.columns import SPLITS, Columns, is_constant, is_zero, part_of
from peft_fx.passes.graph.nodes import (
    CASTS,
    COPIES,
    PRODUCTS,
    RESHAPES,
    SCALINGS,
    SQUEEZES,
    SUMS,
    aten,
    is_tensor,
    numel,
    shape,
    tensor_arg,
    value,
)

ROOTS = {aten.sqrt.default, aten.rsqrt.default}
PASSED = RESHAPES | SQUEEZES | COPIES | CASTS | SCALINGS | SUMS | {aten.reciprocal.default}


@dataclass(frozen=True)
class AffineMap:
    """What is known of a value: its source, its dimensions, the parameters met on the way.

    `products` are the matrix products by a weight, `frozen` the untrained weights among their operands; `precision`
    is the coarsest dtype on the way from the source to here, and `read` those in which a product read the source.
    `diagonal` are the source's features, [start, end), that a row holds one by one, scaled; None where it does not.
    """

    source: Node
    dims: Dims
    trained: frozenset[Node] = frozenset()
    frozen: frozenset[Node] = frozenset()
    products: frozenset[Node] = frozenset()
    precision: torch.dtype = torch.float32
    read: frozenset[torch.dtype] = frozenset()
    diagonal: Columns | None = None

    @property
    def width(self) -> int:
        """The features of a row."""
        return int(numel([a for dim in self.dims for a in dim if isinstance(a, int)]))

    def joined(self, other: AffineMap) -> AffineMap:
        """What is known of a sum of two values with the same dimensions."""
        return replace(
            self,
            trained=self.trained | other.trained,
            frozen=self.frozen | other.frozen,
            products=self.products | other.products,
            precision=coarser(self.precision, other.precision),
            read=self.read | other.read,
            diagonal=self.diagonal if self.diagonal == other.diagonal else None,
        )


def fresh(node: Node) -> AffineMap:
    """A value as a source of its own: its last dimension are features, the others count tokens."""
    *tokens, features = shape(node) or (1,)
    dims = tuple((Token(i, n),) if n != 1 else () for i, n in enumerate(tokens))
    diagonal = (0, features) if isinstance(features, int) else None
    return AffineMap(
        node, (*dims, (features,) if features != 1 else ()), precision=value(node).dtype, diagonal=diagonal
    )


class AffineMaps:
    """The rows of the activations of a graph, or of what follows one node of it. Pure."""

    def __init__(self, nodes: Iterable[Node], flow: Flow, source: Node | None = None):
        self.flow = flow
        self._frozen: dict[Node, frozenset[Node]] = {}
        self.of: dict[Node, AffineMap] = {} if source is None else {source: fresh(source)}
        for node in nodes:
            if is_tensor(node) and not flow.is_weight(node) and node.op in ("placeholder", "call_function"):
                self.of.setdefault(node, self._row(node) or fresh(node))
        self._position = {node: i for i, node in enumerate(self.of)}

    def from_source(self, ends: Iterable[Node], source: Node) -> AffineMaps:
        """The same of the nodes between a source and the ends alone."""
        between = self.between(ends, source) & self.of.keys()
        return AffineMaps(sorted(between, key=self._position.__getitem__), self.flow, source)

    def _row(self, node: Node) -> AffineMap | None:
        rule = AFFINE.get(node.target)
        if rule is None:
            return None
        operands = self.operands(node)
        rows = [self.of[n] for n in operands if n in self.of]
        if len(rows) != len(operands) or not rows:
            return None
        trained, frozen = self.brought(node)
        if trained and node.target in SCALINGS and self._is_normalised(operands[0]):
            return None  # a norm's own scale: no adapter's
        rows = [self._cut(n, r, trained, frozen) for n, r in zip(operands, rows, strict=True)]
        if len({r.source for r in rows}) != 1:
            return None
        known = dict(zip(operands, rows, strict=True))
        dims = rule(node, lambda n: known[n].dims if isinstance(n, Node) and n in known else None)
        if dims is None:
            return None
        row = functools.reduce(AffineMap.joined, rows)
        dtype = value(node).dtype
        read = frozenset({row.precision}) if node.target in PRODUCTS and not row.products else frozenset()
        return replace(
            row,
            dims=dims,
            trained=row.trained | trained,
            frozen=row.frozen | frozen,
            products=row.products | ({node} if node.target in PRODUCTS else set()),
            precision=coarser(row.precision, dtype) if dtype.is_floating_point else row.precision,
            read=row.read | read,
            diagonal=held(node, [known[n].diagonal for n in operands], dims),
        )

    def brought(self, node: Node) -> tuple[frozenset[Node], frozenset[Node]]:
        """Of the weights that an op multiplies a value by: the trained parameters behind them, or a frozen one."""
        if node.target in SUMS:
            return frozenset(), frozenset()
        read = node.args[-2:] if node.target in PRODUCTS else node.all_input_nodes
        weights = [n for n in read if isinstance(n, Node) and self.flow.is_weight(n)]
        parameters = [p for w in weights for p in self.flow.parameters(w)]
        trained = frozenset(p for p in parameters if self.flow.roles[p].trainable)
        frozen = frozenset() if trained or node.target not in PRODUCTS else frozenset(parameters[:1])
        return trained, frozen

    def _is_normalised(self, node: Node) -> bool:
        """Whether a value is another one scaled, row by row, by a number that is computed from it alone; or feature by
        feature, by what a running variance is the root of."""
        while node.target in CASTS | COPIES:
            node = tensor_arg(node, 0)
        if is_scaled_by_a_root(node):
            return True
        if node.target not in SCALINGS or len(operands := self.operands(node)) != 2:
            return False
        scale, scaled = sorted(operands, key=lambda n: numel(shape(n)[-1:]) != 1)
        if numel(shape(scale)[-1:]) != 1 or numel(shape(scaled)[-1:]) == 1:
            return False
        return not self._inputs(scale).isdisjoint({scaled} | self._inputs(scaled))

    def _inputs(self, node: Node) -> set[Node]:
        """What a value is computed from without any weight, a few steps back."""
        found: set[Node] = set()
        todo = [node]
        while todo and len(found) < 16:
            n = todo.pop(0)
            new = [i for i in n.all_input_nodes if i not in found]
            if not any(self.flow.is_weight(i) and value(i).ndim for i in new if is_tensor(i)):
                found.update(new)
                todo += new
        return found

    def _cut(self, node: Node, row: AffineMap, trained: frozenset[Node], frozen: frozenset[Node]) -> AffineMap:
        """A layer ends where the next begins: the result of an adapted layer is a source to a weight of another."""
        new = trained | frozen
        if not new or not row.trained:
            return row
        met = self._frozen_met(row)

        def has_part_of_it(parameters: frozenset[Node]) -> bool:
            return any(self.in_one_module(p, f) for p in parameters for f in met)

        if not has_part_of_it(row.trained) or has_part_of_it(new):
            return row
        layouts = [node]
        while layouts[-1].target in COPIES | CASTS | RESHAPES:
            before = tensor_arg(layouts[-1], 0)
            if shape(before)[-1:] != shape(node)[-1:]:
                break
            layouts.append(before)
        start = max(reversed(layouts), key=lambda n: len(shape(n)))  # the one that tells most tokens apart
        dims = regroup(fresh(start).dims, shape(node))
        return replace(fresh(start), dims=dims, precision=row.precision) if dims is not None else row

    def _frozen_met(self, row: AffineMap) -> frozenset[Node]:
        """The frozen parameters behind a value's products, those that a weight shares with trained ones as well; the
        tables of indices that spread a trained parameter over a matrix (OFT's) are no layer's."""
        return row.frozen.union(*map(self._frozen_behind, row.products))

    def _frozen_behind(self, product: Node) -> frozenset[Node]:
        if product not in self._frozen:
            weights = (n for n in product.args[-2:] if isinstance(n, Node) and self.flow.is_weight(n))
            behind = {p for w in weights for p in self.flow.parameters(w) if value(p).is_floating_point()}
            self._frozen[product] = frozenset(p for p in behind if not self.flow.roles[p].trainable)
        return self._frozen[product]

    def is_adapted(self, row: AffineMap) -> bool:
        """Whether a trained parameter of the same module acts beside a frozen weight."""
        return any(self.in_one_module(t, f) for t in row.trained for f in row.frozen)

    def in_one_module(self, parameter: Node, frozen: Node) -> bool:
        """Whether a parameter belongs to the module that holds a weight, itself (`W`) or in a layer (`base.weight`)."""
        return self.flow.roles[parameter].name.startswith(self._module(self.flow.roles[frozen].name))

    def _module(self, name: str) -> str:
        """The adapted module of a weight: the weight's own, where that holds trained parameters beside a bias, or the
        one around it."""
        own = name[: name.rfind(".") + 1]
        if own in self.flow.adapted_modules:
            return own
        return own[: own.rstrip(".").rfind(".") + 1]

    @functools.cached_property
    def products_of(self) -> dict[Node, list[Node]]:
        """The products by a weight, by the source of what they multiply."""
        found: dict[Node, list[Node]] = {}
        for node, row in self.of.items():
            if node in row.products:
                found.setdefault(row.source, []).append(node)
        return found

    def operands(self, node: Node) -> list[Node]:
        """The activations that a node's value is computed from; a copy's target lends its shape alone, and a constant
        of a dynamic size is none."""
        found = part_of(node)
        if found is not None:
            read: Iterable[Any] = [found[1]]
        else:
            read = node.args[1:2] if node.target is aten.copy.default else node.all_input_nodes
        return [n for n in read if is_tensor(n) and not (self.flow.is_weight(n) or is_constant(n) or is_zero(n))]

    def users(self, node: Node) -> Iterator[Node]:
        """The nodes that read a value: of a split, its results; not where a copy asks for the shape alone."""
        for user in node.users:
            read = [u for u in user.users if u.target is not aten.copy.default or u.args[1] is user]
            if user.target in SPLITS:
                yield from user.users
            elif read or not user.users:
                yield user

    def between(self, ends: Iterable[Node], source: Node) -> set[Node]:
        """The nodes on the way from a source to the ends; none that comes before it."""
        found: set[Node] = set()
        todo = list(ends)
        start = self._position.get(source, -1)
        while todo:
            node = todo.pop()
            if node is not source and node not in found and self._position.get(node, start) >= start:
                found.add(node)
                todo += self.operands(node)
        return found


def is_scaled_by_a_root(node: Node) -> bool:
    """Whether a value is scaled by one over the root of a variance and a number, as by batch norm: of a graph input in
    evaluation, of what the batch gives in training."""
    for operand in node.all_input_nodes if node.target in SCALINGS else ():
        rooted = False
        while operand.target in ROOTS | PASSED and len(operand.all_input_nodes) == 1:
            rooted |= operand.target in ROOTS
            (operand,) = operand.all_input_nodes
        if rooted and (operand.op == "placeholder" or operand.target is operator.getitem):
            return True
    return False
