"""Adapter gradients a few tokens at a time, where they read copies of activations.

`dA = uᵀ·(dy·Bᵀ)` and `dB = (u·A)ᵀ·dy` read u [T,K] and dy [T,N] in the adapter's dtype. Where a product cannot read a
coarser tensor in place (`in_place_reads.py`), it reads a copy, wider than the tensor itself, and several are alive at
once, those of siblings with one input among them. All of this treats each token by itself, and ends in sums over
tokens: so it is done for a chunk of tokens after the other,

    dA = Σ_i uᵢᵀ·(dyᵢ·Bᵀ)      dB = Σ_i (uᵢ·A)ᵀ·dyᵢ

and no more than a chunk's copies are alive. The sums are those of the whole in another order, in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.algebra import MANTISSA, is_held_by
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import (
    CASTS,
    LAYOUTS,
    MATRIX_PRODUCTS,
    RESHAPES,
    SCALINGS,
    SUMS,
    aten,
    is_random,
    is_tensor,
    key_of,
    shape,
    tensor_arg,
    value,
)
from peft_fx.passes.loss.row_rules import SIZED, RowDims, RowEffect, Unfit, treatments

LEAST = 4  # a pass over a chunk's copy takes about as many times what a kernel takes to start, no less than half of it
ON_A_GPU = 2  # times that: so many kernels are started anew for a chunk, and take turns there
MOST = 4  # chunks: each is all of the ops anew, to compile as well


def by_chunks(joint: Joint, settings: Settings) -> None:
    """Does so wherever a copy is large enough. With a dynamic number of tokens, copies are made whole."""
    for group in _groups(joint, settings.machine):
        try:
            region = _Region.of(group)
        except Unfit:
            continue
        _rewrite(joint.edit, region)
        for i, node in enumerate(region.following):
            group.position[node] = group.position[region.place] + (i + 1) / (len(region.following) + 1)


@dataclass(frozen=True)
class _Reading:
    """A product that reads copies: the ways from the casts that make them to the product; `tokens` is T, `bytes` are
    the largest copy's, and `is_sum` says whether it sums over tokens, as a gradient does."""

    node: Node
    ways: tuple[tuple[Node, ...], ...]
    tokens: int
    bytes: int
    is_sum: bool


@dataclass(frozen=True)
class _Group:
    """Products that read copies of the same values, the last of them in backward, and their place in the graph."""

    members: tuple[_Reading, ...]
    position: dict[Node, float]
    backward: frozenset[Node] | set[Node]
    chunks: int


def _groups(joint: Joint, machine: Machine) -> Iterator[_Group]:
    """Neighbours in backward that share a copy, with what of forward they read that is made of copies too."""
    graph, flow, number = joint.graph, joint.flow, joint.numbers
    least = machine.bandwidth * LEAST * machine.launch * (1 if machine.is_cpu else ON_A_GPU)
    products = [n for n in graph.nodes if n.target is aten.mm.default and n not in flow.forward]
    found = {r.node: r for n in products if (r := _reading(n, flow)) is not None}
    if all(r.bytes <= least for r in found.values()):
        return
    position = {n: float(i) for i, n in enumerate(graph.nodes)}
    copies = {r: {(number[_source(way[0])], value(way[0]).dtype) for way in r.ways} for r in found.values()}
    groups: list[set[_Reading]] = []
    for reading in (r for n, r in found.items() if n in flow.backward):
        own = {reading, *(found[n] for n in _read_by(reading) if n in found)}
        read = set().union(*(copies[r] for r in own))
        near = next(
            (i for i, g in enumerate(groups[-2:]) if not all(read.isdisjoint(copies[r]) for r in g) or own & g), None
        )
        if near is not None:  # siblings, of which the one between has met in no copy yet
            start = len(groups[-2:]) - near
            own |= set().union(*groups[-start:])
            del groups[-start:]
        groups.append(own)
    for group in groups:
        if not any(r.is_sum for r in group):
            continue  # a layer's own product, or the logits', which are done by chunks with their loss
        members = sorted(group, key=lambda r: position[r.node])
        tokens = members[0].tokens
        count = min(MOST, tokens, math.ceil(max(r.bytes for r in members) / least) if least else MOST)
        count = next((n for n in range(count, count // 2, -1) if tokens % n == 0), count)
        if count > 1 and all(r.tokens == tokens for r in members):
            yield _Group(tuple(members), position, flow.backward, count)


def _reading(node: Node, flow: Flow) -> _Reading | None:
    """What a product reads of copies; None where that is nothing."""
    ways = [way for i in (0, 1) if (way := _way(tensor_arg(node, i), flow))]
    (m, k), (_, n) = (shape(tensor_arg(node, i)) for i in (0, 1))
    weights = [flow.is_weight(tensor_arg(node, i)) for i in (0, 1)]
    tokens = k if not any(weights) else n if weights[0] else m
    if not ways or all(weights) or not all(isinstance(size, int) for size in (m, k, n)):
        return None
    size = max(value(way[0]).numel() * value(way[0]).dtype.itemsize for way in ways)
    return _Reading(node, tuple(map(tuple, ways)), int(tokens), size, not any(weights))


def _way(node: Node, flow: Flow) -> list[Node]:
    """From a cast to a finer dtype down to an operand, through layouts and factors: numbers, a vector, a mask."""
    if node.op != "call_function" or flow.is_weight(node):
        return []
    if node.target in CASTS:
        return [node] if is_held_by(value(tensor_arg(node, 0)).dtype, value(node).dtype) else []
    if node.target in LAYOUTS - {aten.expand.default} or node.target in SCALINGS:
        read = [n for n in node.args[:2] if is_tensor(n) and value(n).numel() == value(node).numel()]
        way = next((way for n in read if (way := _way(n, flow))), [])
        return [*way, node] if way else []
    return []


def _source(cast: Node) -> Node:
    """What a copy is of, however that is laid out."""
    node = tensor_arg(cast, 0)
    while node.target in LAYOUTS - {aten.expand.default} and is_tensor(node.args[0]):
        node = node.args[0]
    return node


def _read_by(reading: _Reading) -> set[Node]:
    """The products that give what a product multiplies its copies by."""
    ends = {way[-1] for way in reading.ways}
    start = {n for n in reading.node.all_input_nodes if n not in ends}
    passed = LAYOUTS | CASTS | SCALINGS | SUMS
    return _reached(start, lambda n: n.all_input_nodes if n.target in passed else ())


@dataclass(frozen=True)
class _Region:
    """What is done by chunks: nodes in the graph's order with what they make of tokens, those among them that are read
    outside; the node that the chunks are put behind, and what follows from these before it."""

    nodes: dict[Node, RowEffect]
    outputs: list[Node]
    place: Node
    following: list[Node]
    tokens: int
    chunks: int

    @classmethod
    def of(cls, group: _Group) -> _Region:
        """`Unfit` where tokens cannot be told apart, or where the chunks have no place in the graph's order."""
        products, ways = {r.node for r in group.members}, {n for r in group.members for way in r.ways for n in way}
        between = _hull(products, group.position) - products
        if not all(n.target in LAYOUTS | CASTS | SCALINGS | SUMS for n in between):
            raise Unfit("nonlinear", "more than an adapter lies between its products")
        nodes = sorted(products | ways | between, key=group.position.__getitem__)
        tokens = group.members[0].tokens
        treated = treatments(nodes, tokens)
        sums = (value(n).dtype for n, how in treated.items() if how.rows is None)
        if any(MANTISSA.get(dtype, 0) < MANTISSA[torch.float32] for dtype in sums):
            raise Unfit("dtype", "a sum over tokens is rounded, and would be in each chunk")
        summed = _reached({r.node for r in group.members}, lambda n: (u for u in n.users if u in treated))
        outputs = [n for n in nodes if n in summed and any(u not in treated for u in n.users)]
        place = max((nodes[-1], *_others(group, treated)), key=group.position.__getitem__)
        end = group.position[place]

        def early(n: Node) -> Iterator[Node]:
            return (u for u in n.users if u not in treated and group.position.get(u, end) <= end)

        following = _reached({u for n in outputs for u in early(n)}, early)
        if place in following or any(is_random(n) or n.op != "call_function" for n in following):
            raise Unfit(
                "shape", "a product that reads the same gradient is computed from a result, or something random"
            )
        late = sorted(following, key=group.position.__getitem__)
        return cls(treated, outputs, place, late, tokens, group.chunks)


def _others(group: _Group, inside: dict[Node, RowEffect]) -> Iterator[Node]:
    """The layers' own products that read the same gradients. Behind them a gradient is in memory, and a chunk's copy is
    made of that: before, Inductor makes every chunk's in the kernel that makes the gradient, and keeps them all."""
    for source in {_source(way[0]) for r in group.members for way in r.ways if r.node in group.backward}:
        same = _reached({source}, lambda n: (u for u in n.users if u.target in LAYOUTS | CASTS))
        readers = (u for n in same for u in n.users if u.target in MATRIX_PRODUCTS and u not in inside)
        yield from (u for u in readers if u in group.backward)


def _reached(start: set[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    found, todo = set(start), list(start)
    while todo:
        new = [n for n in step(todo.pop()) if n not in found]
        found.update(new)
        todo += new
    return found


def _hull(start: set[Node], position: dict[Node, float]) -> set[Node]:
    """Nodes, and all that lies between two of them."""
    end = max(map(position.__getitem__, start))
    after = _reached(start, lambda n: (u for u in n.users if position.get(u, end + 1) <= end))
    return _reached(start, lambda n: (i for i in n.all_input_nodes if i in after))


def _rewrite(edit: Editor, region: _Region) -> None:
    """Puts the chunks in the place of a region's nodes."""
    _read_sources(edit, region)
    each = math.ceil(region.tokens / region.chunks)
    results: dict[Node, list[Node]] = {n: [] for n in region.outputs}
    with edit.at(region.place, after=True):
        end = edit.call(aten.alias.default, region.place)  # what follows comes behind this place
    for node in reversed(region.following):
        edit.move(node, after=end)
    with edit.at(end):
        flat = _flat(edit, region)
        for start in range(0, region.tokens, each):
            _chunk(edit, region, flat, (start, min(start + each, region.tokens)), results)
        for node, parts in results.items():
            whole, rows = parts[-1], region.nodes[node].rows
            with edit.provenance(node):
                if rows is not None:
                    whole = edit.reshape(edit.call(aten.cat.default, parts, rows.start), shape(node))
                whole = edit.laid_out(whole, value(node).stride())
            edit.reroute(node, whole, only=lambda u: u not in region.nodes)
    edit.erase(end)
    inputs = {n for node in region.nodes for n in node.all_input_nodes if n not in region.nodes}
    for node in (*reversed(region.nodes), *inputs):
        if not node._erased:
            edit.drop(node)  # what else reads a copy has it whole


def _read_sources(edit: Editor, region: _Region) -> None:
    """A copy that is rounded back is what it is a copy of."""
    for copy in [n for n in region.nodes if n.target in CASTS]:
        source = tensor_arg(copy, 0)
        for back in [u for u in copy.users if u.target in CASTS and value(u).dtype == value(source).dtype]:
            edit.reroute(back, source)
            edit.erase(back)


def _flat(edit: Editor, region: _Region) -> dict[tuple[Node, RowDims], Node]:
    """What the region reads of tokens, these in one dimension."""
    found: dict[tuple[Node, RowDims], Node] = {}
    for node, how in region.nodes.items():
        for i, rows in how.operands.items():
            n = tensor_arg(node, i)
            if n not in region.nodes and (n, rows) not in found:
                with edit.provenance(node):
                    found[n, rows] = edit.reshape(n, rows.sizes(shape(n), [region.tokens]))
    return found


def _chunk(
    edit: Editor,
    region: _Region,
    flat: dict[tuple[Node, RowDims], Node],
    bounds: tuple[int, int],
    results: dict[Node, list[Node]],
) -> None:
    """The region's nodes for some tokens. Of sums over tokens the result is the sum so far, of others what they are for
    these tokens."""
    start, stop = bounds
    made: dict[Any, Node] = {}

    def once(target: Any, *args: Any, **kwargs: Any) -> Node:
        key = key_of((target, args, kwargs), lambda n: n)
        if key not in made:
            made[key] = edit.reshape(*args) if target in RESHAPES else edit.call(target, *args, **kwargs)
        return made[key]

    def done(node: Node, how: RowEffect) -> Node:
        args: list[Any] = list(node.args)
        for i, arg in enumerate(args):
            if isinstance(arg, Node) and arg in region.nodes:
                args[i] = made[arg]
            elif i in how.operands:
                rows = how.operands[i]
                part = once(aten.slice.Tensor, flat[arg, rows], rows.start, start, stop)
                args[i] = once(aten.reshape.default, part, rows.part(shape(arg), stop - start))
        if node.target in SIZED:
            assert how.rows is not None
            args[1] = how.rows.part(shape(node), stop - start)
        if how.rows is not None or not results[node]:
            return once(node.target, *args, **node.kwargs)
        if node.target is aten.mm.default:
            return edit.call(aten.addmm.default, results[node][-1], *args)
        return edit.add(results[node][-1], edit.call(node.target, *args, **node.kwargs))

    for node, how in region.nodes.items():
        with edit.provenance(node):
            new = made[node] = done(node, how)
            if node in results:
                rows = how.rows
                whole = new if rows is None else edit.reshape(new, rows.sizes(shape(new), [stop - start]))
                results[node].append(whole)
    ends = {parts[-1] for parts in results.values()}
    for new in reversed([n for n in made.values() if n not in ends]):
        edit.drop(new)  # what was reshaped again
