"""Adapters that are no sums of products: regions of row-wise affine ops with a frozen product and trained parameters.

A *region* is what lies between a source u and a value y = u·W' + b' of it, or between u and several addends of one sum
of a backward graph. What `sums.py` reads as terms is left to it: there W' is shared between forward and backward, and
the sum keeps its spelling.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.adapters import are_small
from peft_fx.passes.analyse.algebra import MANTISSA, Size, coarser
from peft_fx.passes.analyse.candidates import MapCandidate
from peft_fx.passes.analyse.dims import Token, in_order
from peft_fx.passes.analyse.maps import AffineMap, AffineMaps, fresh
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.findings import Refusal
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import (
    CASTS,
    COPIES,
    PRODUCTS,
    RESHAPES,
    SCALINGS,
    SUMS,
    TRANSPOSES,
    aten,
    factors_of,
    is_read_twice,
    is_rounded,
    is_tensor,
    numel,
    shape,
    value,
)


def regions(joint: Joint) -> tuple[list[MapCandidate], list[Refusal]]:
    """The regions that no group of terms accounts for, the largest ones, in graph order; and those refused."""
    graph, rows, analysis = joint.graph, joint.maps, joint.sums
    every: list[MapCandidate] = []
    covered: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in covered or node not in rows.of:
            continue
        for ends in _ends(node, rows):
            region = _region(ends, rows)
            if region is None:
                continue
            own = {n for n in region.nodes if _is_arithmetic(n, rows)}  # siblings share casts and layouts of u
            if covered.isdisjoint(own):
                covered |= own
                every.append(region)
    ours = {region.key for region in every if not _read_as_terms(region, rows, analysis)}
    found, refused = [], []
    for region in reversed([r for r in every if r.key in ours]):  # forward and backward alike
        refusal = _refusal(region, rows, analysis)
        if refusal is None:
            found.append(region)
        elif not region.backward:
            refused.append(refusal)
    return found, refused


def _ends(node: Node, rows: AffineMaps) -> Iterator[tuple[Node, ...]]:
    """What may be the ends of a region: a value in which arithmetic ends; or addends of a sum that share a source."""
    row = rows.of[node]
    if row.source is not node:
        if _is_arithmetic(node, rows) or _puts_in_order(node, rows):
            yield (node,)
        return
    by_source: dict[Node, list[Node]] = defaultdict(list)
    for end in _addends(node, rows):
        if shape(end) == shape(node) and rows.of[end].source is not end and _has_one_reader(end):
            by_source[rows.of[end].source].append(end)
    yield from (tuple(ends) for ends in by_source.values() if len(ends) > 1)


def _addends(node: Node, rows: AffineMaps) -> Iterator[Node]:
    """The addends of a sum of several sources, through the sums that serve it alone."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return
    for operand in node.args[:2]:
        if not (is_tensor(operand) and operand in rows.of):
            continue
        if rows.of[operand].source is operand and operand.target is aten.add.Tensor and _has_one_reader(operand):
            yield from _addends(operand, rows)
        else:
            yield operand


def _has_one_reader(node: Node) -> bool:
    """Whether nobody but the sum reads an addend, and that once: what is merged with others is there no more."""
    return len(node.users) == 1 and not is_read_twice(node)


def _is_arithmetic(node: Node, rows: AffineMaps) -> bool:
    """Whether an op does more than to lay out, cast or scale by a number: what follows it is not the adapter's."""
    trained, _ = rows.brought(node)
    inside = [n for n in rows.operands(node) if n in rows.of]
    return bool(trained) or len(inside) > 1 or node.target in PRODUCTS


def _puts_in_order(node: Node, rows: AffineMaps) -> bool:
    """Whether the tokens come first again here, which they did not where the arithmetic ended."""
    start = node
    layouts = RESHAPES | COPIES | CASTS | TRANSPOSES
    while start.target in layouts and rows.of[start].source is not start and in_order(rows.of[node].dims):
        (start,) = rows.operands(start)
        if not in_order(rows.of[start].dims):
            return True
    return False


def _region(ends: tuple[Node, ...], rows: AffineMaps) -> MapCandidate | None:
    flow = rows.flow
    row = functools.reduce(AffineMap.joined, (rows.of[end] for end in ends))
    bases = [n for n in row.products if not set(rows.brought(n)[1]).isdisjoint(row.frozen)]
    if not bases or not rows.is_adapted(row) or any(not in_order(rows.of[end].dims) for end in ends):
        return None
    if len(ends) == 1 and _is_scaled_adapter(ends[0], rows):
        return None
    start = [a for dim in fresh(row.source).dims for a in dim]
    if not any(isinstance(a, Token) for a in start) or not isinstance(start[-1], int):
        return None  # a single token, or a single feature
    source = _start(row.source, frozenset(rows.between(ends, row.source)), rows)
    own = rows.from_source(ends, source)
    row = functools.reduce(AffineMap.joined, (own.of[end] for end in ends))
    nodes = frozenset(rows.between(ends, source))
    backward = ends[0] in flow.backward
    K, N = shape(row.source)[-1], row.width
    base = max(bases, key=lambda n: _likeness(n, row, {K, N}, rows))
    if 2 * min(_weight_sizes(base, rows)) < min(K, N):
        return None  # no product of full width: an adapter without its base
    if any(_is_a_layer(n, base, row, rows, (K, N)) for n in row.products):
        return None  # another layer before this one, or behind it
    behind = {n for n in nodes - set(ends) if base in rows.of[n].products}
    readers = {u for n in behind for u in rows.users(n) if backward or u in flow.forward}
    if not readers <= nodes:
        return None  # the base product's result is used elsewhere, too
    if any(_goes_on(end, base, rows) for end in ends) or _is_beside(base, nodes, rows):
        return None  # part of an adapter whose base is elsewhere
    diagonal = frozenset(n for n in own.of if own.of[n].source is source and own.of[n].diagonal is not None)
    return MapCandidate(ends, row, nodes, diagonal, base, backward)


def _is_a_layer(product: Node, base: Node, row: AffineMap, rows: AffineMaps, sizes: tuple[Size, Size]) -> bool:
    """Whether a trained product is no small part of the whole map: one beside the base's, by itself, with as large a
    weight; one before it or behind it, also if it gives the map a width that the layer has not."""
    trained, _ = rows.brought(product)
    if not trained:
        return False
    if base not in rows.of[product].products and product not in rows.of[base].products:
        others = [p for p in row.products if p is not product]
        alone = not any(p in rows.of[product].products or product in rows.of[p].products for p in others)
        return alone and any(numel(shape(p)) >= numel(sizes) for p in trained)
    frozen = {n for p in row.products if not rows.brought(p)[0] for n in _weight_sizes(p, rows)}
    return not are_small(trained, sizes) or not frozen.issuperset({*sizes} & {*_weight_sizes(product, rows)})


def _is_scaled_adapter(end: Node, rows: AffineMaps) -> bool:
    """Whether a value is an adapter's, times a vector: that vector is no part of it."""
    while end.target in COPIES | CASTS:
        (end,) = rows.operands(end)
    scaled = rows.operands(end) if end.target in SCALINGS else []
    return len(scaled) == 1 and rows.is_adapted(rows.of[scaled[0]]) and bool(rows.of[scaled[0]].frozen)


def _start(source: Node, nodes: frozenset[Node], rows: AffineMaps) -> Node:
    """Where the ways to the ends part: a norm's scale or a rounding that all of the region reads its input through is
    the input's own."""
    while True:
        after = [n for n in source.users if n in nodes]
        if len(after) != 1 or after[0].target not in COPIES | CASTS | SCALINGS:
            return source
        if rows.brought(after[0])[0] and not any(rows.brought(n)[0] for n in nodes - {after[0]}):
            return source
        if coarser(value(after[0]).dtype, value(source).dtype) != value(after[0]).dtype:
            return source
        (source,) = after


def _likeness(product: Node, row: AffineMap, sizes: set[Size], rows: AffineMaps) -> tuple[Any, ...]:
    """How much a product looks like the base's: its weight beside the trained parameters, of the whole map's size, and
    the source itself read by it; of equals the last in the graph."""
    own = any(rows.in_one_module(t, f) for t in row.trained for f in _weights(product, rows)[:1])
    weight = _weight_sizes(product, rows)
    return own, set(weight) == sizes, -len(rows.of[product].products), numel(weight), product


def _goes_on(end: Node, base: Node, rows: AffineMaps) -> bool:
    """Whether another weight of the base's module acts on the result, or on what is added to it."""
    todo, seen = [end], {end}
    while todo:
        node = todo.pop()
        for user in rows.users(node):
            if user in seen or user not in rows.of or (user in rows.flow.backward) != (end in rows.flow.backward):
                continue
            seen.add(user)
            beside = {p for n in user.all_input_nodes if n in rows.of and n not in seen for p in rows.of[n].frozen}
            if user.target in SUMS and _in_module(beside, base, rows):
                return True
            if user.target in PRODUCTS and _in_module(_weights(user, rows), base, rows):
                return True
            if rows.of[user].source is rows.of[end].source and user.target not in PRODUCTS:
                todo.append(user)
    return False


def _is_beside(base: Node, nodes: frozenset[Node], rows: AffineMaps) -> bool:
    """Whether a larger frozen weight of the base's module reads the same source, on its own."""
    size = numel(_weight_sizes(base, rows))
    return any(
        node not in nodes and numel(_weight_sizes(node, rows)) > size and _in_module(rows.brought(node)[1], base, rows)
        for node in rows.products_of.get(rows.of[base].source, [])
    )


def _in_module(parameters: Iterable[Node], base: Node, rows: AffineMaps) -> bool:
    return any(rows.in_one_module(p, f) for p in parameters for f in _weights(base, rows)[:1])


def _weights(product: Node, rows: AffineMaps) -> list[Node]:
    return [p for n in factors_of(product) if rows.flow.is_weight(n) for p in rows.flow.parameters(n)]


def _weight_sizes(product: Node, rows: AffineMaps) -> list[int]:
    *batch, k, n = shape(next(n for n in factors_of(product) if n not in rows.of))
    return [int(m) for m in (*(m for m in batch if m != 1), k, n)]


def _read_as_terms(region: MapCandidate, rows: AffineMaps, analysis: Sums) -> bool:
    """Whether a group of terms accounts for every use of a trained parameter in a region."""
    group = analysis.group_of.get(region.base)
    uses = sum(bool(rows.brought(n)[0]) for n in region.nodes)
    return group is not None and uses <= sum(analysis.flow.is_trained(f.name) for f in group.adapter_factors)


def _refusal(region: MapCandidate, rows: AffineMaps, analysis: Sums) -> Refusal | None:
    row = region.row
    name = region.site_name(rows.flow)
    reads = sorted(row.read, key=lambda d: MANTISSA.get(d, 0))
    base = _precision(region, rows)
    if reads and MANTISSA.get(reads[-1], 0) > MANTISSA.get(base, 0):
        finer, own = (str(d).removeprefix("torch.") for d in (reads[-1], base))
        return Refusal(name, "dtype", f"the adapter reads its input in {finer}, the base product in {own}")
    dtypes = {value(n).dtype for n in row.products}
    real = {d for d in dtypes if not d.is_complex}
    if not real <= MANTISSA.keys():
        return Refusal(name, "dtype", f"products in {' and '.join(sorted(map(str, dtypes)))}")
    base, side = value(region.base).dtype, analysis.flow.side_of(region.base)
    unrounded = [end for end in region.ends if not is_rounded(end, base, side)]
    if unrounded:
        held, own = (str(d).removeprefix("torch.") for d in (value(unrounded[0]).dtype, base))
        return Refusal(name, "dtype", f"the adapter's result is {held}, W·x is {own}, and nothing rounds it")
    if analysis.strict and len(real) > 1:
        return Refusal(name, "dtype", "strict numerics, and the products are written in different dtypes")
    return None


def _precision(region: MapCandidate, rows: AffineMaps) -> torch.dtype:
    x = next(n for n in factors_of(region.base) if n in rows.of)
    return rows.of[x].precision
