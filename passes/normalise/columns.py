"""Values put together from their own columns are these values."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch.fx import Node

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.columns import SPLITS, columns, is_constant, put_at
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import COPIES, LAYOUTS, RESHAPES, aten, expr, is_tensor, numel, shape, tensor_arg, value


def columns_together(joint: Joint, settings: Settings) -> None:
    """Replaces what is put together from all columns of one value by that value.

    Backward of `y[:, :n] += d` takes dy apart, into one value with zeros there and one with zeros elsewhere, and adds
    them up again.
    """
    graph, edit = joint.graph, joint.edit
    if not graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        return
    pieces: dict[Node, Pieces] = {}
    first: dict[tuple[Pieces, Any], Node] = {}
    for node in list(graph.nodes):
        if not is_tensor(node) or not value(node).ndim or not isinstance(shape(node)[-1], int):
            continue
        pieces[node] = _pieces(node, pieces) or (Piece(node, 0, shape(node)[-1]),)
        alike = [(pieces[node], sizes) for sizes in (shape(node), numel(shape(node)))]
        for key in alike:
            if key not in first or first[key]._erased:
                first[key] = node
        same = next((first[key] for key in alike if first[key] is not node), node)
        sizes = [n if isinstance(n, int) else -1 for n in shape(node)]
        if same is not node and node.target in PUT_TOGETHER and (shape(same) == shape(node) or sizes.count(-1) < 2):
            with edit.at(node):
                same = same if shape(same) == shape(node) else edit.reshape(same, sizes)
                if _is_returned(node) or not _is_contiguous(same):
                    same = edit.laid_out(same, value(node).stride())
            edit.replace(node, same)
            pieces.setdefault(same, pieces[node])


def _is_returned(node: Node) -> bool:
    """Whether a value, or a view of it, is a result of the graph: its strides are promised."""
    return any(u.op == "output" or (u.target in VIEWS and _is_returned(u)) for u in node.users)


def _is_contiguous(node: Node) -> bool:
    """Without a guard where sizes are dynamic."""
    sizes, strides = shape(node), [expr(n) for n in value(node).stride()]
    return strides == [numel(sizes[i + 1 :]) for i in range(len(sizes))]


class Piece(NamedTuple):
    """Columns [start, end) of a value; zeros where there is none."""

    origin: Node | None
    start: int
    end: int


Pieces = tuple[Piece, ...]
VIEWS = LAYOUTS | SPLITS | {aten.slice.Tensor, aten.select.int, operator.getitem}
PUT_TOGETHER = {aten.slice_scatter.default, aten.add.Tensor, aten.copy.default, aten.cat.default}


def _pieces(node: Node, pieces: dict[Node, Pieces]) -> Pieces | None:
    """What a value's columns are, from the first to the last; None where an op computes them."""
    if is_constant(node):
        return (Piece(None, 0, int(shape(node)[-1])),) if node.args[1] == 0 else None
    read = [n for n in node.all_input_nodes if n in pieces]
    if len({value(n).dtype for n in (node, *read)}) > 1:
        return None
    whole = columns(node)
    if whole is not None:
        return _cut(pieces[whole[0]], *whole[1]) if whole[0] in pieces else None
    if node.target in COPIES | RESHAPES and read and shape(read[0])[-1:] == shape(node)[-1:]:
        return pieces[read[0]]
    if node.target is aten.copy.default and shape(node) == shape(tensor_arg(node, 1)):
        return pieces[tensor_arg(node, 1)]
    if node.target is aten.cat.default and all(n in pieces for n in node.args[0]):  # type: ignore[union-attr]
        last = (node.args[1] if len(node.args) > 1 else 0) in (value(node).ndim - 1, -1)
        return _merged(p for n in node.args[0] for p in pieces[n]) if last else None  # type: ignore[union-attr, index]
    if node.target is aten.slice_scatter.default and len(read) > 1:
        place, around = put_at(node), pieces[tensor_arg(node, 0)]
        if place is None:
            return None
        start, end = place
        rest = _cut(around, end, int(shape(node)[-1]))
        return _merged([*_cut(around, 0, start), *pieces[tensor_arg(node, 1)], *rest])
    if node.target is aten.add.Tensor and not node.kwargs and len(read) == 2 and len({*map(shape, (node, *read))}) == 1:
        return _added(*(pieces[n] for n in read))
    return None


def _cut(pieces: Pieces, start: int, end: int) -> Pieces:
    """Some of a value's columns."""
    found, at = [], 0
    for origin, first, last in pieces:
        a, b = max(start, at), min(end, at + last - first)
        if a < b:
            found.append(Piece(origin, first + a - at, first + b - at))
        at += last - first
    return tuple(found)


def _merged(pieces: Iterable[Piece]) -> Pieces:
    """Pieces side by side, those in one that follow each other in their origin."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].origin is piece.origin and piece.origin and found[-1].end == piece.start:
            found[-1] = found[-1]._replace(end=piece.end)
        else:
            found.append(piece)
    return tuple(found)


def _added(a: Pieces, b: Pieces) -> Pieces | None:
    """The sum of two values, in each column of which one of them is zero."""
    ends = {sum(p.end - p.start for p in pieces[:i]) for pieces in (a, b) for i in range(len(pieces) + 1)}
    found = []
    for start, end in itertools.pairwise(sorted(ends)):
        (x,), (y,) = _cut(a, start, end), _cut(b, start, end)
        if x.origin is not None and y.origin is not None:
            return None
        found.append(x if y.origin is None else y)
    return _merged(found)
