"""A graph as the kernels that Inductor makes of it: what exists, what is fused, in the graph's order.

A pointwise value inside a fused kernel never exists. One rule says which values do, Inductor's own in short:

    made       the results of products, attention, scatters, and whatever else is a library's; of reductions; pointwise
               values that one of those reads as a whole, or that leave the graph
    made too   a pointwise value with several readers, or one that it is spread out for, where to compute it again for
               each would be dear: it has an exp, log, sigmoid or tanh in it, or reads more than four values; unless one
               kernel has them all; and one that reads more than eight, on CPUs twelve, as a long sum does on its way
    not made   every other pointwise value: each reader computes it from what it reads

Kernels are groups of values made that run over the same space and share an input or read each other, with no other
kernel between them. A product that is only added to something is one kernel with that: addmm.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from peft_fx import compat
from peft_fx.passes.graph.nodes import aten, expr, numel, tensor_arg, value
from peft_fx.step.kinds import (
    GIVEN,
    HEAVY,
    ITEM,
    LIBRARY,
    POINTWISE,
    REDUCTION,
    VIEW,
    bytes_of,
    device_of,
    kind_of,
    name_of,
    tensors_of,
)

READS = 4  # values that a pointwise one may read and still be computed again by each reader
MOST = 64  # nodes of a kernel
FAR = 64  # nodes between two
ROUNDS = 10  # of fusion: what was in the way is in a kernel by then


@dataclass
class Kernel:
    """Nodes computed together; the buffers that they make, and of each that they read how many of them do. `op` is what
    a library computes."""

    nodes: list[Node]
    library: bool
    makes: list[Node]
    reads: dict[Node, int]
    op: Node


@dataclass
class Part:
    """Nodes of a graph, in an order of their own and an output last, as a graph by themselves: what each reads."""

    reads: dict[Node, list[Node]]
    owner: Any = None

    @classmethod
    def of(cls, graph: Graph) -> Part:
        return cls({n: n.all_input_nodes for n in graph.nodes}, graph.owning_module)

    def __post_init__(self) -> None:
        self.users: dict[Node, list[Node]] = {n: [] for n in self.reads}
        for node, reads in self.reads.items():
            for read in reads:
                self.users[read].append(node)


@dataclass
class Known:
    """What each node is in whatever part of a graph: its kind, bytes, numbers, the space of its loops, and what memory
    it takes."""

    kinds: dict[Node, str] = field(default_factory=dict)
    sizes: dict[Node, int] = field(default_factory=dict)
    numels: dict[Node, int] = field(default_factory=dict)
    spaces: dict[Node, tuple[int, ...]] = field(default_factory=dict)
    memories: dict[Node, Any] = field(default_factory=dict)


@dataclass
class Fused:
    """A graph as its kernels, in the order in which they run; `leaves` are the buffers that a node's value is read
    from, `made` those that exist, `given` those that are there before, `added` the products that are one with a sum."""

    graph: Graph | Part
    hint: Any
    given: Set[Node] = frozenset()
    known: Known = field(default_factory=Known)
    kinds: dict[Node, str] = field(default_factory=dict)
    leaves: dict[Node, frozenset[Node]] = field(default_factory=dict)
    reads: dict[Node, list[Node]] = field(default_factory=dict)
    made: dict[Node, None] = field(default_factory=dict)
    added: dict[Node, Node] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.part = self.graph if isinstance(self.graph, Part) else Part.of(self.graph)
        kinds = self.known.kinds
        kinds |= {n: kind_of(n) for n in self.part.reads if n not in kinds}
        self.kinds = {n: GIVEN if n in self.given else kinds[n] for n in self.part.reads}
        self.added = {n: product for n in self.part.reads if (product := self._added(n))}
        self.kinds |= dict.fromkeys(self.added, LIBRARY) | dict.fromkeys(self.added.values(), VIEW)
        self._make()
        self.before = {n: [m for r in self.reads[n] if (m := _maker(r, self)) in self.made] for n in self.made}
        self.kernels = _ordered(self, _grouped(self))

    def _make(self) -> None:
        heavy: dict[Node, bool] = {}
        position = {n: i for i, n in enumerate(self.part.reads)}
        for node, inputs in self.part.reads.items():
            kind = self.kinds[node]
            found = self.leaves[node] = frozenset().union(*(self.leaves[i] for i in inputs))
            heavy[node] = kind in (POINTWISE, VIEW) and any(heavy[i] for i in inputs)
            if kind in (GIVEN, ITEM):
                self.leaves[node] = frozenset([node])
            elif kind in (LIBRARY, REDUCTION, POINTWISE):
                self.reads[node] = sorted(found, key=position.__getitem__)  # a set's order is another in each run
                heavy[node] |= name_of(node) in HEAVY
                if kind != POINTWISE or self._is_made(node, heavy[node]):
                    self.made[node] = None
                    self.leaves[node], heavy[node] = frozenset([node]), False

    def _added(self, node: Node) -> Node | None:
        """The product that a sum of two matrices is computed with. On a GPU what reads it pointwise adds by itself."""
        if node.target is not aten.add.Tensor or node in self.given or len(node.args) != 2 or node.kwargs:
            return None
        for product, other in itertools.permutations(node.args):
            if not isinstance(other, Node) or getattr(product, "target", None) is not aten.mm.default:
                continue
            alone = self.kinds[product] == LIBRARY and self.part.users[product] == [node]
            alike = value(other).dtype == value(product).dtype and value(node).shape == value(product).shape
            if alone and alike and (device_of(node) == "cpu" or not self._is_read_pointwise(node)):
                return product
        return None

    def _is_read_pointwise(self, node: Node) -> bool:
        return all(self.kinds[r] == POINTWISE for r in self.readers(node))

    def _is_made(self, node: Node, heavy: bool) -> bool:
        readers = self.readers(node)
        if any(self.kinds[r] == LIBRARY or r.op == "output" for r in readers):
            return True
        if len(self.reads[node]) > compat.most_reads(device_of(node)):
            return True
        # it would be computed for each
        wider = any(self._numel(user) > self._numel(node) for user in self.part.users[node])
        return (len(readers) > 1 or wider) and (heavy or len(self.reads[node]) > READS)

    def _numel(self, node: Node) -> int:
        known = self.known.numels
        if node not in known:
            known[node] = max((self.hint(numel([expr(n) for n in v.shape])) for v in tensors_of(node)), default=0)
        return known[node]

    def readers(self, node: Node) -> list[Node]:
        """What reads a value, itself or through views."""
        found, todo = [], list(self.part.users[node])
        while todo:
            user = todo.pop()
            if self.kinds[user] == VIEW:
                todo += self.part.users[user]
            else:
                found.append(user)
        return found

    def buffers(self, node: Node) -> list[Node]:
        """What a node makes: itself, or each item of several results."""
        if isinstance(node.meta.get("val"), (tuple, list)):
            return [b for u in self.part.users[node] if self.kinds[u] == ITEM for b in self.buffers(u)]
        return [node]

    def size(self, node: Node) -> int:
        """Bytes of what a node makes."""
        if node not in self.known.sizes:
            self.known.sizes[node] = bytes_of(node, self.hint)
        return self.known.sizes[node]

    def memory(self, buffer: Node) -> Any:
        """What is the same of two buffers where one can take over the other's memory."""
        known = self.known.memories
        if buffer not in known:
            (tensor,) = tensors_of(buffer)
            known[buffer] = tensor.dtype, tensor.device, str(numel([expr(n) for n in tensor.shape]))
        return known[buffer]

    def space(self, node: Node) -> tuple[int, ...]:
        """What a kernel's loops run over: of a sum over rows all, and the rows. One over rows that lie apart in memory
        goes the other way through them, and alone."""
        if node not in self.known.spaces:
            self.known.spaces[node] = self._space(node)
        return self.known.spaces[node]

    def _space(self, node: Node) -> tuple[int, ...]:
        own = self._numel(node)
        if self.kinds[node] != REDUCTION:
            return (own,)
        source = tensor_arg(node, 0)
        (given,) = tensors_of(source)
        named: Any = node.args[1] if len(node.args) > 1 else None
        dims = [d % given.ndim for d in ([named] if isinstance(named, int) else named or range(given.ndim))]
        inner = sorted(dims) == list(range(given.ndim - len(dims), given.ndim))
        return (self._numel(source), own) if inner else (-1, *(self.hint(expr(n)) for n in given.shape))


@dataclass(eq=False)
class _Group:
    """The nodes of a kernel; what those that are sums run over, and the others; the places of the first and the last.
    `level` is below those of the kernels that read from it: what is not above one cannot lead to it."""

    nodes: list[Node]
    level: int
    sums: Set[tuple[int, ...]]
    others: Set[tuple[int, ...]]
    first: int
    last: int

    @classmethod
    def alone(cls, fused: Fused, node: Node, place: int) -> _Group:
        if fused.kinds[node] == LIBRARY:
            return cls([node], place, frozenset(), frozenset(), place, place)
        spaces = frozenset([fused.space(node)])
        sums, others = (spaces, frozenset()) if fused.kinds[node] == REDUCTION else (frozenset(), spaces)
        return cls([node], place, sums, others, place, place)

    def in_one_loop(self, other: _Group) -> bool:
        """Whether both run over the same space, or over the rows of the one that all sums among them run over."""
        sums, others = self.sums | other.sums, self.others | other.others
        return len(others) == 1 if not sums else len(sums) == 1 and {n for (n,) in others} <= set(*sums)


class _Groups:
    """The kernel of each node."""

    def __init__(self, fused: Fused):
        self.of = {n: _Group.alone(fused, n, i) for i, n in enumerate(fused.made)}
        self.before, self.users = fused.before, {n: list[Node]() for n in fused.made}
        self._apart: set[tuple[_Group, _Group, int]] = set()
        for node, before in fused.before.items():
            for read in before:
                self.users[read].append(node)

    def join(self, one: Node, other: Node) -> bool:
        """Makes one kernel of those of two nodes, where it can be done; whether they are in one."""
        a, b = self.of[one], self.of[other]
        if a is b:
            return True
        if (pair := (a, b, len(a.nodes) + len(b.nodes))) in self._apart:
            return False  # what is in the way of two stays there until one of them grows
        self._apart.add(pair)
        far = max(a.last, b.last) - min(a.first, b.first) > FAR and not (self._reads(a, b) or self._reads(b, a))
        if far or len(a.nodes) + len(b.nodes) > MOST or not a.in_one_loop(b):
            return False
        if self._between(a, b) or self._between(b, a):
            return False
        a.nodes += b.nodes
        a.level, a.sums, a.others = max(a.level, b.level), a.sums | b.sums, a.others | b.others
        a.first, a.last = min(a.first, b.first), max(a.last, b.last)
        self.of |= dict.fromkeys(b.nodes, a)
        self._raise_above(a)
        return True

    def _raise_above(self, group: _Group) -> None:
        todo = [group]
        while todo:
            group = todo.pop()
            for other in (self.of[user] for n in group.nodes for user in self.users[n]):
                if other is not group and other.level <= group.level:
                    other.level = group.level + 1
                    todo.append(other)

    def _reads(self, group: _Group, other: _Group) -> bool:
        return any(self.of[r] is other for n in group.nodes for r in self.before[n])

    def _between(self, first: _Group, last: _Group) -> bool:
        """Whether a way leads from one kernel to another by way of a third."""
        seen, todo = {last}, [last]
        while todo:
            group = todo.pop()
            for g in (self.of[r] for n in group.nodes for r in self.before[n]):
                if g is first and group is not last:
                    return True
                if g.level > first.level and g not in seen:
                    seen.add(g)
                    todo.append(g)
        return False


def _grouped(fused: Fused) -> dict[Node, _Group]:
    """The kernel of each node: nodes that share most first, as long as no kernel then reads, by way of another, what
    it writes itself. What only shares an input, and is far away, stays apart."""
    groups = _Groups(fused)
    sharing = _sharing(fused, groups.of)
    for _ in range(ROUNDS):
        apart = [pair for pair in sharing if not groups.join(*pair)]
        if len(apart) == len(sharing):
            break
        sharing = apart
    return groups.of


def _sharing(fused: Fused, alone: Mapping[Node, _Group]) -> list[tuple[Node, Node]]:
    """Pairs of nodes that run in one loop and read the same, or one the other; by the bytes that they share."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in fused.made:
        if fused.kinds[node] != LIBRARY:
            for buffer in (node, *fused.reads[node]):
                readers[buffer].append(node)
    shared: dict[tuple[Node, Node], int] = defaultdict(int)
    for buffer, among in readers.items():
        for one, other in itertools.combinations(among, 2):
            if alone[one].in_one_loop(alone[other]):
                shared[one, other] += fused.size(buffer)
    alike = {pair: fused.kinds[pair[0]] == fused.kinds[pair[1]] for pair in shared}
    near = {(a, b): -abs(alone[a].first - alone[b].first) for a, b in shared}
    return sorted(shared, key=lambda pair: (alike[pair], shared[pair], near[pair]), reverse=True)


def _ordered(fused: Fused, groups: Mapping[Node, _Group]) -> list[Kernel]:
    """Kernels in the graph's order, each after those that it reads from."""
    position = {n: i for i, n in enumerate(fused.part.reads)}
    begun: set[_Group] = set()
    kernels: list[Kernel] = []
    for node in fused.made:
        todo = [(groups[node], False)]
        while todo:
            group, ready = todo.pop()
            if ready:
                kernels.append(_kernel(fused, group.nodes))
            elif group not in begun:
                begun.add(group)
                todo.append((group, True))
                read = {r for n in group.nodes for r in fused.before[n]}
                todo += [(groups[r], False) for r in sorted(read, key=position.__getitem__)[::-1]]
    return kernels


def _kernel(fused: Fused, nodes: list[Node]) -> Kernel:
    reads: dict[Node, int] = {}
    for read in (r for n in nodes for r in fused.reads[n]):
        reads[read] = reads.get(read, 0) + 1
    made = [b for n in nodes for b in fused.buffers(n)]
    return Kernel(nodes, fused.kinds[nodes[0]] == LIBRARY, made, reads, fused.added.get(nodes[0], nodes[0]))


def _maker(buffer: Node, fused: Fused) -> Node:
    while fused.kinds[buffer] == ITEM:
        (buffer,) = buffer.all_input_nodes
    return buffer


def outputs(graph: Graph) -> list[Node]:
    """The nodes that a graph returns."""
    found: list[Node] = next(iter(graph.find_nodes(op="output"))).all_input_nodes
    return found
