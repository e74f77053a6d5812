"""What forward writes, backward reads as it was: in a copy made before the write.

A graph input that forward changes in place, as `self.n.add_(1)` does to a buffer, holds its old value until the end of
the forward graph, where AOTAutograd writes the new one; backward finds the new one. The partitioner knows nothing of
that. It computes in backward again what is cheap to compute of graph inputs, and what forward does not need it leaves
to backward altogether. (Plain Inductor's gradients of `y = x * (self.n * 2); self.n.add_(1)` are wrong for it, torch
2.13.) So one rule is kept here, for whatever the passes before this one made of a graph:

    of a graph input that forward writes, backward reads no value but one computed and kept before the write

`snapshots` makes it hold, `stale_reads` tells where it does not hold: `verify` asks, and the backend once more after
Inductor's own passes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.flow import is_tangent, leading_to, reachable, returned
from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.editor import SAVE, Editor
from peft_fx.passes.graph.joint import Joint
from peft_fx.passes.graph.nodes import aten, value


def changed_inputs(joint: Joint, settings: Settings) -> None:
    """Has every reader of an input that forward writes read a copy of it, where backward has a use for its old
    value."""
    snapshots(joint.edit)


def snapshots(edit: Editor) -> None:
    """The same for whoever has a graph alone."""
    graph = edit.graph
    inputs, sides = graph.find_nodes(op="placeholder"), _Sides(graph)
    for p in sides.written:
        readers = list(_readers(p))
        if sides.serving.isdisjoint((p, *readers)):
            continue
        if len(readers) == 1 and readers[0].target is aten.clone.default:
            (copy,) = readers  # AOTAutograd's own, of an input with a gradient
        else:
            with edit.at(inputs[-1], after=True, like=None):
                copy = edit.call(aten.clone.default, p)
            for reader in readers:
                edit.reread(reader, p, copy)
            _give_back(edit, p, copy)
        edit.keep(copy)


def stale_reads(graph: Graph) -> list[Node]:
    """The nodes through which backward may find another value of a graph input than forward did."""
    sides, found = _Sides(graph), []
    for p in sides.written:
        found += [p] if p in sides.gradients else []
        found += [n for n in _readers(p) if n in sides.serving and not (_is_snapshot(n) and n in sides.forward)]
    return found


class _Sides:
    """Of a joint graph: the inputs that forward writes, the nodes that forward needs, those that serve backward, which
    are part of it or lead to it, and what is returned as a gradient."""

    def __init__(self, graph: Graph):
        backward = reachable(graph, is_tangent)
        results, gradients = returned(graph)
        writing = [n for n in graph.nodes if n not in backward and n.meta.get("partitioner_tag") != IN_BACKWARD]
        ends = [n for n in results if isinstance(n, Node) and n not in backward]
        self.gradients = {n for n in gradients.values() if isinstance(n, Node)} if backward else set()
        self.forward = leading_to([*ends, *(n for n in writing if any(_writes(n)))])
        self.serving = leading_to({n for n in backward if n.op != "output"} | self.gradients)
        self.written = _written(graph, writing) if backward else []


IN_BACKWARD = "must_be_in_backward"  # the partitioner's word for a write of a backward of the user's own


def _written(graph: Graph, writing: list[Node]) -> list[Node]:
    """The inputs that nodes write to, and those that the caller writes right after forward, of which only the
    descriptions of forward's results tell."""
    found = [_origin(target) for node in writing for target in _writes(node)]
    described = {p.meta["desc"]: p for p in graph.find_nodes(op="placeholder") if "desc" in p.meta}
    for result in graph.output_node().meta.get("desc") or ():
        found.append(described.get(getattr(result, "mutated_input", None)))
    return [n for n in dict.fromkeys(found) if n is not None and n.op == "placeholder"]


def _origin(node: Node) -> Node:
    """What a view is of."""
    while node.all_input_nodes and (getattr(node.target, "is_view", False) or node.target is operator.getitem):
        node = node.all_input_nodes[0]
    return node


def _writes(node: Node) -> Iterator[Node]:
    """What an op writes to."""
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None and schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            yield from (n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, Node))


def _readers(p: Node) -> Iterator[Node]:
    """What reads an input's numbers, or is a view of it; not what only writes to it, or asks for its size."""
    for user in p.users:
        asks = not isinstance(value(user), (torch.Tensor, list, tuple)) and user.target is aten.sym_size.int
        if user.op == "call_function" and not asks and p not in _writes(user):
            yield user


def _give_back(edit: Editor, p: Node, copy: Node) -> None:
    """The copy where an input itself is returned as a gradient."""
    results, gradients = returned(edit.graph)
    returns = [*results, *(copy if g is p else g for g in reversed(gradients.values()))]
    edit.give(edit.graph.output_node(), returns)


def _is_snapshot(node: Node) -> bool:
    return node.target is aten.clone.default and node.meta.get("recompute") is SAVE
