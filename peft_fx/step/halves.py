"""A joint graph as the two halves that a partitioner makes of it, for a given set of values kept; and what a step of
them takes.

Forward computes what it returns and what is kept; backward begins with what is kept, and makes what else it reads of
forward again, each value just before its first reader, as PyTorch's partitioner orders it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import is_tangent, leading_to, reachable, returned
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.nodes import is_mutable, value
from peft_fx.passes.keep.changed_inputs import IN_BACKWARD
from peft_fx.step.fusion import Fused, Known, Part
from peft_fx.step.kinds import bytes_of
from peft_fx.step.memory import walk


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
        writes = [n for n in graph.nodes if is_mutable(n) and n not in backward]
        forward = leading_to([*(n for n in results if isinstance(n, Node)), *writes]) - backward
        read = {i for n in backward for i in n.all_input_nodes} | {n for n in given if isinstance(n, Node)}
        return cls(frozenset(forward), frozenset(backward), tuple(results), tuple(given), frozenset(read - backward))

    def rebuilt(self, kept: Set[Node]) -> set[Node]:
        """What backward computes of forward again where those values are kept."""
        inputs = self._inputs
        found: set[Node] = set()
        todo = [n for n in self.reads if n in inputs and n not in kept]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += [n for n in inputs[node] if n not in kept and n not in found]
        return found

    @cached_property
    def _inputs(self) -> dict[Node, list[Node]]:
        """What values are computed from that backward may need, but for the graph's own inputs."""
        needed = [n for n in leading_to(self.reads) if n.op != "placeholder"]
        return {n: [i for i in n.all_input_nodes if i.op != "placeholder"] for n in needed}


@dataclass(frozen=True)
class Taken:
    """Bytes at the highest point of each half; what backward has made that is alive at its own."""

    forward: int
    backward: int
    alive: frozenset[Node] = frozenset()

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def taken(
    graph: Graph,
    sides: Sides,
    kept: Set[Node],
    hint: Callable[[Size], int],
    machine: Machine,
    known: Known | None = None,
) -> Taken:
    """What a step takes with those values kept, by the liveness walk of both halves. The graph's inputs are the
    caller's, and so is what forward returns. `known` is what other walks of the graph found of its nodes."""
    known = known or Known()
    inputs = graph.find_nodes(op="placeholder")
    saved = [n for n in graph.nodes if n in kept and n.op != "placeholder"]
    results = [n for n in sides.results if isinstance(n, Node)]
    needed = sides.forward | leading_to(saved)
    ends = list(dict.fromkeys([*results, *saved]))
    forward = Fused(_part(graph, [n for n in graph.nodes if n in needed], ends), hint, known=known)
    there = walk(forward, [], ends, machine)
    ends = list(dict.fromkeys(n for n in sides.gradients if isinstance(n, Node)))
    order = _backward(graph, sides, [*inputs, *saved], ends)
    backward = Fused(_part(graph, order, ends, frozenset(saved)), hint, frozenset(saved), known)
    tangents = [n for n in inputs if is_tangent(n)]
    theirs = frozenset().union(*(forward.leaves[n] for n in results))  # the caller's, by whatever view of it
    lent = [*tangents, *(n for n in saved if forward.leaves[n] & theirs)]
    behind = walk(backward, [*tangents, *saved], ends, machine, lent, gradients_of(tangents, hint))
    return Taken(there.peak, behind.peak, behind.alive)


def gradients_of(tangents: list[Node], hint: Callable[[Size], int]) -> list[Node]:
    """Of the tangents those that another graph or op made: autograd has them until backward is over.

    Beside a loss's, the others are zeros that are made for backward alone.
    """
    losses = [n for n in tangents if bytes_of(n, hint) <= value(n).dtype.itemsize]
    return losses or tangents


def _backward(graph: Graph, sides: Sides, there: list[Node], ends: list[Node]) -> list[Node]:
    """Backward's nodes in the graph's order, each behind what it reads that is not there yet."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    order: dict[Node, None] = dict.fromkeys(there)
    for node in [*(n for n in graph.nodes if n in sides.backward), *ends]:
        todo, missing = [node], set[Node]()
        while todo:
            n = todo.pop()
            if n not in order and n not in missing:
                missing.add(n)
                todo += n.all_input_nodes
        order |= dict.fromkeys(sorted(missing, key=position.__getitem__))
    return list(order)


def _part(graph: Graph, nodes: list[Node], ends: list[Node], given: Set[Node] = frozenset()) -> Part:
    """Those nodes as a graph that returns the `ends`, without what nobody reads."""
    used: set[Node] = {*ends, *given}
    for node in reversed(nodes):
        if node not in given and (node in used or node.is_impure()):
            used.add(node)
            used.update(node.all_input_nodes)
    reads = {n: [] if n in given else n.all_input_nodes for n in nodes if n in used}
    return Part({**reads, Graph().output(()): ends}, graph.owning_module)
