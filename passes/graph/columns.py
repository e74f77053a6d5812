"""Values as columns of others: slices, splits, what is put side by side or in a place among zeros."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from peft_fx.passes.graph.nodes import (
    COPIES,
    RESHAPES,
    aten,
    is_tensor,
    shape,
    tensor_arg,
    value,
)

Columns = tuple[int, int]  # the first one, and the one behind the last
PLACINGS = {aten.select_scatter.default, aten.slice_scatter.default, aten.index_put.default, aten.index_add.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def is_constant(node: object) -> bool:
    """A tensor of one number, whatever its shape."""
    return isinstance(node, Node) and node.target is aten.full.default


def is_zero(node: object) -> bool:
    """A tensor of zeros, whatever its layout."""
    while isinstance(node, Node) and node.target in RESHAPES | COPIES:
        node = node.args[0]
    return is_constant(node) and node.args[1] == 0  # type: ignore[attr-defined]


def part_of(node: Node) -> tuple[Any, Node, list[int]] | None:
    """One of the results of a split, as a slice or a selection of a value: the op, the value, the other arguments."""
    source, i = node.args[:2] if node.target is operator.getitem else (None, None)
    if not isinstance(source, Node) or source.target not in SPLITS:
        return None
    whole = tensor_arg(source, 0)
    j = 1 if source.target is aten.unbind.int else 2
    dim = source.args[j] if len(source.args) > j else source.kwargs.get("dim", 0)
    dim = dim % value(whole).ndim  # type: ignore[operator]
    if source.target is aten.unbind.int:
        return aten.select.int, whole, [dim, i]  # type: ignore[list-item]
    sizes = [part.shape[dim] for part in value(source)]
    if not all(isinstance(n, int) for n in sizes):
        return None
    start = sum(sizes[:i])  # type: ignore[misc]
    return aten.slice.Tensor, whole, [dim, start, start + sizes[i]]  # type: ignore[index]


def columns(node: Node) -> tuple[Node, Columns] | None:
    """The value of whose last dimension a node is a slice, and which columns it is."""
    op, whole, args = part_of(node) or (node.target, node.args[0] if node.args else None, list(node.args[1:]))
    found = _columns(whole, args) if op is aten.slice.Tensor and is_tensor(whole) else None
    return None if found is None else (whole, found)  # type: ignore[return-value]


def put_at(node: Node) -> Columns | None:
    """The columns of the first operand that a slice_scatter puts the second one at."""
    return _columns(tensor_arg(node, 0), list(node.args[2:]))


def _columns(whole: Node, args: Sequence[Any]) -> Columns | None:
    """Of the arguments `dim, start, end, step` of a slice."""
    dim, start, end, step = tuple(args) + (0, None, None, 1)[len(args) :]
    width = shape(whole)[-1]
    if dim not in (value(whole).ndim - 1, -1) or step != 1 or not isinstance(width, int):
        return None
    if not all(n is None or isinstance(n, int) for n in (start, end)):
        return None
    return slice(start, end).indices(width)[:2]
