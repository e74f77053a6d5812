"""A joint graph as the two halves that a partitioner makes of it, for a given set of values kept; and what a step of
them takes.

Forward computes what it returns and what is kept; backward begins with what is kept, and makes what else it reads of
forward again, each value just before its first reader, as PyTorch's partitioner orders it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from peft_fx.passes.algebra import Size
from peft_fx.passes.flow import is_tangent, leading_to, reachable, returned
from peft_fx.passes.liveness import Fused, outputs, walk
from peft_fx.passes.machine import Machine
from peft_fx.passes.snapshots import IN_BACKWARD


@dataclass(frozen=True)
class Sides:
    """Of a joint graph: what forward computes, what backward computes, and what each returns. `reads` are the values
    of forward, graph inputs among them, that backward reads or returns."""

    forward: frozenset[Node]
    backward: frozenset[Node]
    results: tuple[Any, ...]
    gradients: tuple[Any, ...]
    reads: frozenset[Node]

    @classmethod
    def of(cls, graph: Graph) -> Sides:
        results, gradients = returned(graph)
        given = list(gradients.values())[::-1]
        backward = reachable(graph, lambda n: is_tangent(n) or n.meta.get("partitioner_tag") == IN_BACKWARD)
        backward.discard(graph.output_node())
        writes = [n for n in graph.nodes if _is_write(n) and n not in backward]
        forward = leading_to([*(n for n in results if isinstance(n, Node)), *writes]) - backward
        read = {i for n in backward for i in n.all_input_nodes} | {n for n in given if isinstance(n, Node)}
        return cls(frozenset(forward), frozenset(backward), tuple(results), tuple(given), frozenset(read - backward))

    def rebuilt(self, kept: Set[Node]) -> set[Node]:
        """What backward computes of forward again where those values are kept."""
        found: set[Node] = set()
        todo = [n for n in self.reads if n not in kept]
        while todo:
            node = todo.pop()
            if node not in found and node.op != "placeholder":
                found.add(node)
                todo += [n for n in node.all_input_nodes if n not in kept]
        return found


def _is_write(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


@dataclass(frozen=True)
class Taken:
    """Bytes at the highest point of each half, and seconds of both."""

    forward: int
    backward: int
    seconds: float

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def taken(graph: Graph, sides: Sides, kept: Set[Node], hint: Callable[[Size], int], machine: Machine) -> Taken:
    """What a step takes with those values kept, by the liveness walk of both halves. The graph's inputs are the
    caller's, and so is what forward returns."""
    inputs = graph.find_nodes(op="placeholder")
    saved = [n for n in graph.nodes if n in kept and n.op != "placeholder"]
    results = [n for n in sides.results if isinstance(n, Node)]
    needed = sides.forward | leading_to(saved)
    first = _graph((n for n in graph.nodes if n in needed), [*results, *saved])
    there = walk(Fused(first, hint), [], outputs(first), machine)
    back = _backward(graph, sides, inputs, saved)
    made = [n for n in back.find_nodes(op="placeholder") if n.name in {s.name for s in saved} or is_tangent(n)]
    theirs = {n.name for n in results}
    lent = [n for n in made if is_tangent(n) or n.name in theirs]
    behind = walk(Fused(back, hint), made, outputs(back), machine, lent)
    return Taken(there.peak, behind.peak, there.seconds + behind.seconds)


def _backward(graph: Graph, sides: Sides, inputs: Iterable[Node], saved: list[Node]) -> Graph:
    """Backward's nodes in the graph's order, each behind what it reads that is not there yet."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    order: dict[Node, None] = dict.fromkeys([*inputs, *saved])
    ends = [n for n in sides.gradients if isinstance(n, Node)]
    for node in [*(n for n in graph.nodes if n in sides.backward), *ends]:
        todo, missing = [node], set[Node]()
        while todo:
            n = todo.pop()
            if n not in order and n not in missing:
                missing.add(n)
                todo += n.all_input_nodes
        order |= dict.fromkeys(sorted(missing, key=position.__getitem__))
    return _graph(order, ends, given=set(saved))


def _graph(nodes: Iterable[Node], ends: list[Node], given: Set[Node] = frozenset()) -> Graph:
    made, at = Graph(), dict[Node, Node]()
    for node in nodes:
        if node in given:
            at[node] = made.placeholder(node.name)
            at[node].meta = dict(node.meta)
        else:
            at[node] = made.node_copy(node, at.__getitem__)
    made.owning_module = next(iter(at)).graph.owning_module if at else None
    made.output([at[n] for n in ends])
    made.eliminate_dead_code()
    return made
