"""Adapters of parts of a layer's result, as one adapter of the whole of it: queries, keys and values of one product.

    q, k, v = split(x·W)              y = x·W + [x·A·B, 0, x·C·D]
    q + x·A·B, k, v + x·C·D     ->    q, k, v = split(y)

In backward dy is made of what arrives at the parts, and their adapters read that: then they read it as parts of dy.
So W' is one matrix, with the deltas in their columns. What no W' came of is put back as it was.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from peft_fx.passes.analyse.flow import is_tangent, reachable
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.columns import SPLITS, Columns, columns, is_zero, put_at
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import aten, expr, is_random, is_read_twice, is_tensor, numel, shape, tensor_arg, value

Pair = tuple[Node, Node]  # what the graph read before, and what it reads in its place


@dataclass(frozen=True)
class Adapted:
    """A layer's result, the nodes that are columns of it, and of some of them the sum with an adapter's result, and
    that; `source` is the layer's input."""

    whole: Node
    source: Node
    parts: dict[Columns, list[Node]]
    sums: dict[Columns, tuple[Node, Node]]


class Wholes:
    """The sums of whole results, which the graph uses in the place of those of their parts until `settle`."""

    def __init__(self, joint: Joint):
        self.joint, self.graph, self.edit = joint, joint.graph, joint.edit
        self._position = {node: float(i) for i, node in enumerate(joint.graph.nodes)}
        self._totals: list[tuple[Node, list[Pair]]] = []
        self._gradients: list[tuple[Pair, list[Pair]]] = []
        self._seen: set[Node] = set()
        while found := list(self._found()):
            for adapted in found:
                self._join(adapted)
            if not self._sorted():
                self.settle()
                break

    def _found(self) -> Iterator[Adapted]:
        """The values of which a part and an adapter are a sum; of several sums in a row the first."""
        wholes = [n for n in self.graph.nodes if any(_is_summed(p) for ps in _columns(n).values() for p in ps)]
        if not wholes:
            return
        flow, rows = self.joint.flow, self.joint.maps
        for whole in (n for n in wholes if n in flow.forward):
            parts = {c: [p for p in ps if p in flow.forward] for c, ps in _columns(whole).items()}
            parts = {c: parts[c] for c in sorted(parts) if parts[c]}
            starts, ends = [c[0] for c in parts], [c[1] for c in parts]
            every = {p for ps in parts.values() for p in ps}
            alone = all(u.target in SPLITS or u in every for u in whole.users if u in flow.forward)
            sums = {c: s for c, ps in parts.items() if (s := _sum_with_adapter(ps, whole, rows)) is not None}
            dtypes = {(value(q).dtype, value(d).dtype) for q, d in sums.values()}
            trained = any(rows.of[d].trained for _, d in sums.values())
            if alone and trained and len(dtypes) == 1 and all(a <= b for a, b in zip(ends, starts[1:], strict=False)):
                yield Adapted(whole, rows.of[whole].source, parts, sums)

    def _join(self, adapted: Adapted) -> None:
        whole, dim = adapted.whole, value(adapted.whole).ndim - 1
        last = max((q for q, _ in adapted.sums.values()), key=self._position.__getitem__)
        with self.edit.at(last):
            sizes = self._sizes(whole, adapted.source)
            delta = self._side_by_side({c: d for c, (_, d) in adapted.sums.items()}, sizes, last)
            total = self._call(last, aten.add.Tensor, whole, delta)
            pairs: list[Pair] = []
            for columns, parts in adapted.parts.items():
                now = self._call(last, aten.slice.Tensor, total, dim, *columns)
                before = [adapted.sums[columns][0]] if columns in adapted.sums else parts
                pairs += [(node, self._cast(last, now, node)) for node in before]
        for node, now in pairs:
            self.edit.reroute(node, now)
        self._totals.append((total, pairs))
        self._join_gradients(list(adapted.parts), shape(whole))

    def _join_gradients(self, columns: list[Columns], sizes: tuple[Any, ...]) -> None:
        """Has what reads the gradient of a part read it as a part of the whole's."""
        backward = reachable(self.graph, is_tangent)
        for node in reversed([n for n in self.graph.nodes if n in backward and is_tensor(n)]):
            given = _put_together(node) if shape(node) == sizes and node not in self._seen else {}
            if not given or not set(given) <= set(columns):
                continue
            before = _ancestors(node)
            self._seen |= {node, *(n for n in before if shape(n) == sizes and _put_together(n))}
            pairs: list[Pair] = []
            whole = node
            with self.edit.at(node):
                if node.target is not aten.cat.default:
                    whole = self._side_by_side(given, self._sizes(node, next(iter(given.values()))), node)
                    self.edit.reroute(node, whole)
            with self.edit.at(node, after=True):
                for (start, end), part in given.items():
                    readers = [u for u in part.users if u not in self._seen | before and u is not whole]
                    if readers:
                        now = self._call(node, aten.slice.Tensor, whole, value(node).ndim - 1, start, end)
                        for user in readers:
                            self.edit.reread(user, part, now)
                        pairs.append((part, now))
            self._gradients.append(((node, whole), pairs))

    def _sizes(self, node: Node, source: Node) -> list[Any]:
        """A node's sizes, the dynamic ones read from another."""
        known = dict(zip(shape(source), self.edit.sizes_of(source), strict=True))
        return [known.get(n, n) for n in shape(node)]

    def _side_by_side(self, given: dict[Columns, Node], sizes: list[Any], anchor: Node) -> Node:
        """A value of these sizes with these columns, and zeros elsewhere."""
        *lead, width = sizes
        pieces, at = [], 0
        first = value(next(iter(given.values())))
        ends: list[tuple[Columns, Node | None]] = [*sorted(given.items(), key=lambda item: item[0])]
        for (start, end), node in (*ends, ((width, width), None)):
            if start > at:
                zeros = self._call(
                    anchor, aten.full.default, [*lead, start - at], 0, dtype=first.dtype, device=first.device
                )
                pieces.append(zeros)
            pieces += [node] if node is not None else []
            at = end
        return self._call(anchor, aten.cat.default, pieces, len(lead))

    def _call(self, anchor: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.edit.call(target, *args, **kwargs)
        self._position[node] = self._position[anchor]
        return node

    def _cast(self, anchor: Node, node: Node, like: Node) -> Node:
        found = self.edit.cast(node, value(like).dtype)
        self._position[found] = self._position[anchor]
        return found

    def _sorted(self) -> bool:
        """Puts the nodes in an order in which each comes after what it reads, as near to their own as that goes.

        False, and nothing done, where there is none, or where numbers would be drawn in another order.
        """
        nodes = list(self.graph.nodes)
        waits = {n: len(n.all_input_nodes) for n in nodes}
        place = {n: (self._position.get(n, -1.0), i) for i, n in enumerate(nodes)}
        ready = [(place[n], n) for n in nodes if not waits[n]]
        heapq.heapify(ready)
        order: list[Node] = []
        while ready:
            _, node = heapq.heappop(ready)
            order.append(node)
            for user in node.users:
                waits[user] -= 1
                if not waits[user]:
                    heapq.heappush(ready, (place[user], user))
        drawn = [n for n in order if is_random(n)]
        if len(order) != len(nodes) or drawn != [n for n in nodes if is_random(n)]:
            return False
        for before, after in itertools.pairwise(order):
            self.edit.move(after, after=before)
        return True

    def settle(self) -> None:
        """Parts by themselves again where no adapter has joined the weight."""
        for (node, whole), pairs in reversed(self._gradients):
            back = [(part, now) for part, now in pairs if not part._erased]  # else W' gives the whole gradient
            for part, now in [*back, (node, whole)] if len(back) == len(pairs) else back:
                if now is not part:
                    self.edit.replace(now, part)
        for total, pairs in reversed(self._totals):
            rewritten = total._erased
            for node, now in pairs:
                if now.users and rewritten:
                    self._lay_out(node, now)
                elif now.users:
                    self.edit.reroute(now, node)
                self.edit.drop(node if rewritten else now)
        self._totals, self._gradients = [], []

    def _lay_out(self, node: Node, now: Node) -> None:
        """A part in memory as the sum was that stood in its place."""
        users = list(now.users)
        strides, own = ([expr(n) for n in value(part).stride()] for part in (node, now))
        with self.edit.at(now, after=True, like=node):
            if all(isinstance(n, int) for n in (*strides, *own)) or strides == own:
                same = self.edit.laid_out(now, value(node).stride())
            else:
                same = self.edit.call(aten.clone.default, now, memory_format=torch.contiguous_format)
        for user in users if same is not now else ():
            self.edit.reread(user, now, same)


def fused_layers(joint: Joint, settings: Settings) -> None:
    """Has the graph read the parts of a layer's result as parts of its sum with their adapters, until no adapter has
    made use of that."""
    joint.notes.tentative.append(Wholes(joint))


def _columns(node: Node) -> dict[Columns, list[Node]]:
    """The nodes that are columns of a value."""
    found: dict[Columns, list[Node]] = defaultdict(list)
    for user in node.users if is_tensor(node) else ():
        for part in user.users if user.target in SPLITS else [user]:
            whole, of = columns(part) or (None, (0, 0))
            if whole is node:
                found[of].append(part)
    return found


def _is_summed(part: Node) -> bool:
    return len(part.users) == 1 and next(iter(part.users)).target is aten.add.Tensor and not is_read_twice(part)


def _sum_with_adapter(parts: Iterable[Node], whole: Node, rows: AffineMaps) -> tuple[Node, Node] | None:
    """The one reader of some columns, if that adds an adapter of the whole's layer to them, and the adapter's result;
    beside trained adapters, one may be frozen."""
    part, *others = parts
    if others or not _is_summed(part):
        return None
    (total,) = part.users
    a, b = total.args[:2]
    d = b if a is part else a
    if total.kwargs or not is_tensor(d) or not {whole, part, d} <= rows.of.keys() or shape(d) != shape(total):
        return None
    own, base, added = rows.of[part], rows.of[whole], rows.of[d]
    same = own.source is base.source is added.source and own.dims == added.dims
    own_module = any(rows.in_one_module(p, f) for p in added.trained | added.frozen for f in base.frozen)
    if not same or not base.frozen or not own_module:
        return None
    layer = max(base.products, key=lambda n: numel(shape(n)))
    return (total, d) if layer not in added.products else None


def _ancestors(node: Node) -> set[Node]:
    """The tensors that a value is computed from."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found and is_tensor(n)]
        found.update(new)
        todo += new
    return found


def _put_together(node: Node) -> dict[Columns, Node]:
    """The columns that a value is made of, side by side, in their order."""
    dim = value(node).ndim - 1
    found: dict[Columns, Node] = {}
    if node.target is aten.cat.default:
        parts, along = node.args[0], node.args[1] if len(node.args) > 1 else 0
        at = 0
        for part in parts if along in (dim, -1) else []:  # type: ignore[union-attr]
            size = shape(part)[-1]  # type: ignore[arg-type]
            if not isinstance(size, int):
                return {}
            found[at, at + size] = part  # type: ignore[assignment]
            at += size
    elif node.target is aten.slice_scatter.default and is_zero(node.args[0]):
        place = put_at(node)
        if place is not None:
            found[place] = tensor_arg(node, 1)
    elif node.target is aten.add.Tensor and not node.kwargs and all(map(is_tensor, node.args)):
        inner = [n for n in node.all_input_nodes if len(n.users) == 1 and shape(n) == shape(node)]
        given = [_put_together(n) for n in inner]
        every = sorted(c for columns in given for c in columns)
        if len(given) == 2 and all(given) and all(a[1] <= b[0] for a, b in itertools.pairwise(every)):
            found = dict(sorted((given[0] | given[1]).items()))
    return found
