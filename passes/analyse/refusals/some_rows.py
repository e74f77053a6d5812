"""Adapters of some rows: added to, multiplied to or put in the place of a part of the batch or of a table. A W' would
be for these rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

import torch
from torch.fx import Node

from peft_fx.passes.analyse.adapters import are_low_rank, stands_beside
from peft_fx.passes.analyse.algebra import Matrix
from peft_fx.passes.analyse.linear_rules import Product, through
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.analyse.refusals.ways import (
    READS,
    is_beside,
    is_matrix,
    narrow_operand,
    reached,
    values_read,
)
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.findings import Refusal
from peft_fx.passes.graph.nodes import (
    CASTS,
    LAYOUTS,
    SCALINGS,
    SUMS,
    argument,
    aten,
    is_random,
    is_tensor,
    numel,
    shape,
    value,
)

REPLACING = {aten.index_put.default, aten.index_copy.default, aten.slice_scatter.default, aten.select_scatter.default}
TAKING = {  # some rows of a value
    aten.index.Tensor,
    aten.index_select.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
}
PUTTING = REPLACING | {  # rows among others
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.index_add.default,
    aten.scatter_add.default,
    aten.scatter.src,
}
DROPPED = "the adapter reads a dropped-out copy of the base's input: no single W' exists"
BETWEEN = "something between the products of an adapter of some rows is not linear"
SOME_ROWS = "the adapter is added to some rows of what its layer gives: a W' would be for these alone"
SCALED_ROWS = "a vector multiplies some rows alone: a W' would be for these"
REPLACED = "rows of the weight are replaced by trained ones, before any product: already in weight form"


def of_some_rows(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """Products `u·A·B` of two narrow matrices that are put among a layer's rows, of which u are some: a sub-batch's, or
    some tokens'."""
    flow, layers = analysis.flow, _Layers(analysis)
    for node in (n for n in analysis.position if n in flow.forward and n not in flow.backward):
        for last, B in analysis.weighted(node):
            inner = last.right if last.left is B else last.left
            for first, A in _first_factors(analysis, inner):
                parameters = [*flow.parameters(A), *flow.parameters(B)]
                if not are_low_rank(shape(A)[-2:], shape(B)[-2:]) or not placed.isdisjoint(parameters):
                    continue
                linear = (first, A) in analysis.weighted(through(inner))
                read = list(_rows_read(analysis, first, A))
                weight = layers.weight_of_rows(node, read, parameters, linear)
                if weight is not None:
                    found = ("shape", SOME_ROWS) if linear else ("nonlinear", BETWEEN)
                    found = ("dropout", DROPPED) if any(map(is_random, read)) else found
                    yield Refusal(flow.site_name(weight, [Matrix(A, 0), Matrix(B, 0)]), *found)


def is_of_rows(node: Node, ops: Set[object] = TAKING | PUTTING) -> bool:
    """Whether an op takes some rows of a value, or puts some among others; parts of the features are another thing."""
    if node.target not in ops:
        return False
    try:
        dim = argument(node, "dim")
    except KeyError:  # of all dimensions
        return True
    ndim = next(value(n).ndim for n in node.all_input_nodes if is_tensor(n))
    return bool(dim % ndim != ndim - 1)


def _first_factors(analysis: Sums, start: Node) -> Iterator[tuple[Product, Node]]:
    """The nearest products with a weight that a value comes from, through whatever acts on each number by itself."""

    def read(n: Node) -> Iterable[Node]:
        passed = n.target in READS or torch.Tag.pointwise in getattr(n.target, "tags", ())
        return values_read(analysis, n) if passed else ()

    for node in reached(start, read):
        yield from analysis.weighted(node)


def _rows_read(analysis: Sums, product: Product, weight: Node) -> Iterator[Node]:
    """What a product reads, and the values that this is some rows of, or with a mask."""

    def read(n: Node) -> Iterable[Node]:
        passed = n.target in READS or is_of_rows(n) or is_random(n)
        return values_read(analysis, n) if passed else ()

    return reached(product.right if product.left is weight else product.left, read)


class _Layers:
    """The layers near a value, looked for once for each."""

    def __init__(self, analysis: Sums):
        self.analysis = analysis
        self._near: dict[Node, list[tuple[Matrix, set[Node], set[Node]]]] = {}

    def weight_of_rows(self, product: Node, read: list[Node], parameters: list[Node], linear: bool) -> Matrix | None:
        """The weight of the layer among whose rows a product is put, if that reads the rows that the product reads."""
        flow, number = self.analysis.flow, self.analysis.reader.number
        same_rows = {number[n] for n in read}

        def put(n: Node) -> Iterable[Node]:
            return (u for u in n.users if u in flow.forward and _is_passed(u))

        for end in reached(product, put):
            for weight, own, rows in self._beside(end):
                same = own.isdisjoint(parameters) and not rows.isdisjoint(same_rows)
                if same and stands_beside(flow, weight, parameters, same, linear):
                    return weight
        return None

    def _beside(self, end: Node) -> list[tuple[Matrix, set[Node], set[Node]]]:
        """The weights of products that a value is made of: each with its parameters and the rows that it is read
        with."""
        analysis = self.analysis

        def beside(n: Node) -> Iterable[Node]:
            return values_read(analysis, n) if _is_passed(n) else ()

        if end not in self._near:
            found = [pair for node in reached(end, beside) for pair in analysis.weighted(node)]
            self._near[end] = [
                (
                    Matrix(W, shape(W)[-1], rows=shape(W)[-2]),
                    set(analysis.flow.parameters(W)),
                    {analysis.reader.number[n] for n in _rows_read(analysis, base, W)},
                )
                for base, W in found
            ]
        return self._near[end]


def _is_passed(node: Node) -> bool:
    return node.target in READS | SUMS or is_of_rows(node)


def of_scaled_rows(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """Trained vectors that multiply some rows of what a frozen layer gives, or of what it reads."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n in flow.forward):
        vector = narrow_operand(analysis, node) if node.target is aten.mul.Tensor else None
        if vector is None or is_matrix(vector) or not placed.isdisjoint(flow.parameters(vector)):
            continue
        for way, ops in _ways_to_layers(analysis, node):
            weights = (W for n in way for _, W in analysis.weighted(n) if not flow.is_trained(W))
            W = next((W for W in weights if is_beside(analysis, vector, W)), None)
            if W is not None and any(is_of_rows(n, ops) for n in way):
                yield Refusal(flow.site_name(Matrix(W, 0), [Matrix(vector, 0)]), "shape", SCALED_ROWS)
                break


def _ways_to_layers(analysis: Sums, node: Node) -> Iterator[tuple[list[Node], Set[object]]]:
    """What a value is made of, up to products with weights, and where it is put; then, down to them, what reads it.

    Each with the ops by which it is of some rows alone: of a value of all rows, some may be read (a norm's, in front of
    a head that reads the last token).
    """
    flow = analysis.flow

    def passed(n: Node) -> bool:
        if n.target in SCALINGS and sum(not flow.is_weight(i) for i in n.all_input_nodes) > 1:
            return False  # a norm, or a gate
        return n in flow.forward and (n.target in READS | SUMS or is_of_rows(n))

    def before(n: Node) -> Iterable[Node]:
        return values_read(analysis, n) if n is node or passed(n) else ()

    def put(n: Node) -> Iterable[Node]:
        return (u for u in n.users if u in flow.forward) if n is node or n.target in LAYOUTS | CASTS else ()

    def after(n: Node) -> Iterable[Node]:
        return (u for u in n.users if passed(u) or any(analysis.weighted(u))) if n is node or passed(n) else ()

    yield [*reached(node, before), *reached(node, put)], TAKING | PUTTING
    yield list(reached(node, after)), PUTTING


def of_replaced_rows(analysis: Sums, rows: AffineMaps, placed: Set[Node]) -> Iterator[Refusal]:
    """AffineMaps of a frozen weight that trained ones are put in the place of, as in a table of words."""
    flow = analysis.flow
    for node in (n for n in analysis.position if n.target in REPLACING and n in flow.forward and flow.is_weight(n)):
        weight, *others = (n for n in node.all_input_nodes if is_tensor(n))
        trained = [p for n in others for p in flow.parameters(n) if flow.roles[p].trainable]
        if not trained or flow.parameters(weight)[:1] == [] or not placed.isdisjoint(trained):
            continue
        table = flow.parameters(weight)[0]
        if not flow.roles[table].trainable and all(numel(shape(p)) < numel(shape(table)) for p in trained):
            yield Refusal(flow.site_name(Matrix(table, 0), [Matrix(p, 0) for p in trained]), "shape", REPLACED)
