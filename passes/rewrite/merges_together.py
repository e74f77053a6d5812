"""Several W' by one launch of the kernel that builds them.

    [W'1] = merge([W1], …), [W'2] = merge([W2], …), …  ->  [W'1, W'2, …] = merge([W1, W2, …], …)

A launch takes a GPU as long as some megabytes of W, and a layer's smaller weights are no larger. W' are the same bits,
built a little sooner than the first of them was: so those of one launch take at most twice the memory that the largest
takes alone. What backward needs of a launch it builds by one again, and what only forward reads is built apart.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from torch.fx import Node

from peft_fx.kernels.merge import MOST, merge
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import LAYOUTS, value

AT_ONCE = 2  # times the largest W'


def merges_together(joint: Joint, settings: Settings) -> None:
    """Has each launch build as many W' that follow each other as there is room for."""
    merges = [n for n in joint.graph.find_nodes(op="call_function", target=merge) if n.users]
    room = AT_ONCE * max(map(_bytes, merges), default=0)
    alike: dict[Any, list[Node]] = {}
    for node in merges:
        first = value(node)[0]
        read = frozenset(user in joint.flow.backward for user in _readers(node))
        alike.setdefault((first.device, first.dtype, read, node.meta.get("recompute")), []).append(node)
    groups = [group for own in alike.values() for group in _launches(own, room) if len(group) > 1]
    for group in groups:
        _as_one(joint.edit, group)


def _bytes(node: Node) -> int:
    return sum(W.numel() * W.dtype.itemsize for W in value(node))


def _readers(node: Node) -> Iterator[Node]:
    """What reads W', whatever it was laid out as before."""
    for user in node.users:
        if user.target in LAYOUTS or user.target is operator.getitem:
            yield from _readers(user)
        else:
            yield user


def _launches(merges: Iterable[Node], room: int) -> Iterator[list[Node]]:
    """In their order, as many as there is room for, and as the kernel takes."""
    group: list[Node] = []
    for node in merges:
        if group and (sum(map(_bytes, group)) + _bytes(node) > room or len(group) == MOST):
            yield group
            group = []
        group.append(node)
    if group:
        yield group


def _as_one(edit: Editor, merges: list[Node]) -> None:
    """In the place of the first; what the others are made of comes before it."""
    first = merges[0]
    for node in _needed_before(first, merges):
        edit.move(node, before=first)
    with edit.at(first, rebuilt="recompute" in first.meta):
        each = zip(*(node.args for node in merges), strict=True)
        whole = edit.call(merge, *(list(itertools.chain(*own)) for own in each))  # type: ignore[arg-type]
        results = [edit.item(whole, i) for i in range(len(merges))]
    for node, result in zip(merges, results, strict=True):
        (own,) = node.users
        edit.replace(own, result)


def _needed_before(place: Node, nodes: list[Node]) -> list[Node]:
    """What nodes are computed from, of weights alone, and is not there yet, in its order."""
    found, todo = set[Node](), list(nodes)
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found and place < n]
        found.update(new)
        todo += new
    return sorted(found)
