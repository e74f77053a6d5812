"""What is alive at each kernel of a forward or backward graph, once Inductor has fused it: bytes, and seconds.

A pointwise value inside a fused kernel never exists. One rule says which values do, Inductor's own in short:

    made       the results of products, attention, scatters, and whatever else is a library's; of reductions; pointwise
               values that one of those reads as a whole, or that leave the graph
    made too   a pointwise value with several readers, or one that it is spread out for, where to compute it again for
               each would be dear: it has an exp, log, sigmoid or tanh in it, or reads more than four values; unless one
               kernel has them all
    not made   every other pointwise value: each reader computes it from what it reads

Kernels are groups of values made that run over the same space and share an input or read each other, with no other
kernel between them. They run in the graph's order, each after what it reads, or in another that has a lower peak. A
kernel writes over an input that it alone reads, for the last time. Memory of the same size and dtype that is free later
on is kept for the next to need it, as long as what Inductor reckons as its peak is not exceeded: so a step's peak is
above what its values need.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.nodes import CAST, argument, aten, expr, numel, prims, tensor_arg, value

LIBRARY, POINTWISE, REDUCTION, VIEW, ITEM, GIVEN, NONE = (
    "library",
    "pointwise",
    "reduction",
    "view",
    "item",
    "given",
    "",
)
POINTWISES = {
    CAST,
    aten._to_copy.default,
    aten.clone.default,
    aten.copy.default,
    aten.where.self,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.embedding.default,
    aten.flip.default,
    aten.full.default,
    aten.full_like.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.lift_fresh_copy.default,
    aten.scalar_tensor.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    prims.iota.default,
    prims.inductor_lookup_seed.default,
    prims.inductor_random.default,
}
REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "any", "all", "prod", "var", "var_mean", "argmax", "argmin"}
HEAVY = {"exp", "expm1", "log", "log1p", "log2", "sigmoid", "tanh"}  # never computed twice
SCATTERS = {"index_put", "_unsafe_index_put", "scatter", "scatter_add", "scatter_reduce", "index_add"}
INTO = {"mm", "bmm", "addmm", "baddbmm"}  # write into memory that they are given; other libraries' allocate their own
READS = 4  # values that a pointwise one may read and still be computed again by each reader
MOST = 64  # nodes of a kernel
FAR = 64  # nodes between two
ROUNDS = 10  # of fusion: what was in the way is in a kernel by then
PACKED = 128 << 10  # bytes, as measured: from 64 to 190 KB, whatever the size of large matrices
ATTENTION = "scaled_dot_product"  # in the name of every fused kernel of it


@dataclass
class Walk:
    """Bytes at the highest point of a graph and at the highest of its second half, from what it was given to what it
    leaves; the same two as Inductor reckons them, where no memory waits to be used again; seconds of its kernels; the
    buffers whose memory is taken at the highest point, whether or not they are read again."""

    peak: int = 0
    late: int = 0
    planned: int = 0
    planned_late: int = 0
    seconds: float = 0.0
    alive: frozenset[Node] = frozenset()


@dataclass
class _Kernel:
    """Nodes computed together; `inside` are bytes that a graph called by it has alive beyond what it returns."""

    nodes: list[Node]
    library: bool = False
    inside: int = 0


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
    """What each node is in whatever part of a graph: its kind, bytes, numbers, and the space of its loops."""

    kinds: dict[Node, str] = field(default_factory=dict)
    sizes: dict[Node, int] = field(default_factory=dict)
    numels: dict[Node, int] = field(default_factory=dict)
    spaces: dict[Node, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Fused:
    """A graph as its kernels, in the order in which they run; `leaves` are the buffers that a node's value is read
    from, `made` those that exist, `given` those that are there before."""

    graph: Graph | Part
    hint: Any
    given: Set[Node] = frozenset()
    known: Known = field(default_factory=Known)
    kinds: dict[Node, str] = field(default_factory=dict)
    leaves: dict[Node, frozenset[Node]] = field(default_factory=dict)
    reads: dict[Node, list[Node]] = field(default_factory=dict)
    made: dict[Node, None] = field(default_factory=dict)
    kernels: list[_Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.part = self.graph if isinstance(self.graph, Part) else Part.of(self.graph)
        kinds = self.known.kinds
        kinds |= {n: kind_of(n) for n in self.part.reads if n not in kinds}
        self.kinds = {n: GIVEN if n in self.given else kinds[n] for n in self.part.reads}
        self._make()
        self.before = {n: [m for r in self.reads[n] if (m := _maker(r, self)) in self.made] for n in self.made}
        self.kernels = _ordered(self, _grouped(self))

    def _make(self) -> None:
        heavy: dict[Node, bool] = {}
        position = {n: i for i, n in enumerate(self.part.reads)}
        for node, inputs in self.part.reads.items():
            kind = self.kinds[node]
            found: frozenset[Node] = frozenset().union(*(self.leaves[i] for i in inputs))
            heavy[node] = any(heavy[i] for i in inputs) if kind in (POINTWISE, VIEW) else False
            self.leaves[node] = found
            if kind in (GIVEN, ITEM):
                self.leaves[node] = frozenset([node])
            elif kind in (LIBRARY, REDUCTION, POINTWISE):
                self.reads[node] = sorted(found, key=position.__getitem__)  # a set's order is another in each run
                heavy[node] |= name_of(node) in HEAVY
                if kind != POINTWISE or self._is_made(node, heavy[node]):
                    self.made[node] = None
                    self.leaves[node], heavy[node] = frozenset([node]), False

    def _is_made(self, node: Node, heavy: bool) -> bool:
        readers = self.readers(node)
        if any(self.kinds[r] == LIBRARY or r.op == "output" for r in readers):
            return True
        # it would be computed for each
        wider = any(self._numel(user) > self._numel(node) for user in self.part.users[node])
        return (len(readers) > 1 or wider) and (heavy or len(self.reads[node]) > READS)

    def _numel(self, node: Node) -> int:
        known = self.known.numels
        if node not in known:
            known[node] = max((self.hint(numel([expr(n) for n in v.shape])) for v in _tensors(node)), default=0)
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
        (given,) = _tensors(source)
        named: Any = node.args[1] if len(node.args) > 1 else None
        dims = [d % given.ndim for d in ([named] if isinstance(named, int) else named or range(given.ndim))]
        inner = sorted(dims) == list(range(given.ndim - len(dims), given.ndim))
        return (self._numel(source), own) if inner else (-1, *(self.hint(expr(n)) for n in given.shape))


def _tensors(node: Node) -> list[torch.Tensor]:
    val = node.meta.get("val")
    return [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, torch.Tensor)]


def name_of(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else ""


def kind_of(node: Node) -> str:
    target: Any = node.target
    if node.op in ("placeholder", "get_attr"):
        return GIVEN
    if node.op != "call_function" or not _tensors(node):
        return NONE
    if target is operator.getitem:
        source = node.args[0]
        return VIEW if isinstance(source, Node) and _is_view(source.target) else ITEM
    if _is_view(target) or _is_the_same(node):
        return VIEW
    if name_of(node) in REDUCTIONS:
        return REDUCTION
    if target in POINTWISES or torch.Tag.pointwise in getattr(target, "tags", ()):
        return POINTWISE
    return LIBRARY


def _is_the_same(node: Node) -> bool:
    """Whether a cast or a copy has its operand's dtype and layout: Inductor drops it."""
    if node.target not in (CAST, aten.clone.default) or not isinstance(node.args[0], Node):
        return False
    new, old = value(node), value(node.args[0])
    return bool(new.dtype == old.dtype and new.stride() == old.stride())


def _is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    infos = [a.alias_info for a in schema.arguments] if schema is not None else []
    return any(info is not None and not info.is_write for info in infos)


@dataclass
class _Groups:
    """The nodes of each kernel, by any of them. `level` is below those of the kernels that read from it, by a kernel's
    id: what is not above one cannot lead to it."""

    of: dict[Node, list[Node]]
    level: dict[int, int]
    users: dict[Node, list[Node]]

    @classmethod
    def alone(cls, fused: Fused) -> _Groups:
        """Each node a kernel by itself."""
        of = {n: [n] for n in fused.made}
        users: dict[Node, list[Node]] = {n: [] for n in fused.made}
        for node, before in fused.before.items():
            for read in before:
                users[read].append(node)
        return cls(of, {id(group): i for i, group in enumerate(of.values())}, users)

    def join(self, a: list[Node], b: list[Node]) -> None:
        self.level[id(a)] = max(self.level[id(a)], self.level[id(b)])
        a += b
        self.of |= dict.fromkeys(b, a)
        todo = [a]
        while todo:
            group = todo.pop()
            for other in (self.of[user] for n in group for user in self.users[n]):
                if other is not group and self.level[id(other)] <= self.level[id(group)]:
                    self.level[id(other)] = self.level[id(group)] + 1
                    todo.append(other)


def _grouped(fused: Fused) -> dict[Node, list[Node]]:
    """The nodes of each kernel, by any of them: those that share most first, as long as no kernel then reads, by way of
    another, what it writes itself. What only shares an input, and is far away, stays apart."""
    groups = _Groups.alone(fused)
    order = {n: i for i, n in enumerate(fused.made)}
    sharing = _sharing(fused)
    for _ in range(ROUNDS):
        apart = [pair for pair in sharing if not _join(fused, groups, order, *pair)]
        if len(apart) == len(sharing):
            break
        sharing = apart
    return groups.of


def _join(fused: Fused, groups: _Groups, order: dict[Node, int], one: Node, other: Node) -> bool:
    """Makes one kernel of those of two nodes, where it can be done; whether they are in one."""
    a, b = groups.of[one], groups.of[other]
    if a is b:
        return True
    places = [order[n] for n in (*a, *b)]
    far = max(places) - min(places) > FAR and not (_reads(fused, a, b) or _reads(fused, b, a))
    if far or len(a) + len(b) > MOST or not _in_one_loop(fused, (*a, *b)):
        return False
    if _between(fused, groups, a, b) or _between(fused, groups, b, a):
        return False
    groups.join(a, b)
    return True


def _reads(fused: Fused, group: list[Node], other: list[Node]) -> bool:
    return any(r in other for n in group for r in fused.before[n])


def _sharing(fused: Fused) -> list[tuple[Node, Node]]:
    """Pairs of nodes that run in one loop and read the same, or one the other; by the bytes that they share."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in fused.made:
        if fused.kinds[node] != LIBRARY:
            for buffer in (node, *fused.reads[node]):
                readers[buffer].append(node)
    shared: dict[tuple[Node, Node], int] = defaultdict(int)
    for buffer, among in readers.items():
        for pair in itertools.combinations(among, 2):
            if _in_one_loop(fused, pair):
                shared[pair] += fused.size(buffer)
    alike = {pair: fused.kinds[pair[0]] == fused.kinds[pair[1]] for pair in shared}
    order = {n: i for i, n in enumerate(fused.made)}
    near = {(a, b): -abs(order[a] - order[b]) for a, b in shared}
    return sorted(shared, key=lambda pair: (alike[pair], shared[pair], near[pair]), reverse=True)


def _in_one_loop(fused: Fused, nodes: Iterable[Node]) -> bool:
    """Whether nodes run over the same space, or over the rows of the one that all sums among them run over."""
    nodes = list(nodes)
    sums = {fused.space(n) for n in nodes if fused.kinds[n] == REDUCTION}
    others = {fused.space(n) for n in nodes if fused.kinds[n] != REDUCTION}
    return len(others) == 1 if not sums else len(sums) == 1 and {n for (n,) in others} <= set(*sums)


def _between(fused: Fused, groups: _Groups, first: list[Node], last: list[Node]) -> bool:
    """Whether a way leads from one kernel to another by way of a third."""
    of, level = groups.of, groups.level
    least = level[id(first)]
    todo = [g for n in last for r in fused.before[n] if (g := of[r]) is not first and g is not last]
    seen = {id(g) for g in todo}
    while todo:
        group = todo.pop()
        if level[id(group)] <= least:
            continue
        for g in (of[r] for n in group for r in fused.before[n]):
            if g is first:
                return True
            if id(g) not in seen:
                seen.add(id(g))
                todo.append(g)
    return False


def _ordered(fused: Fused, groups: dict[Node, list[Node]]) -> list[_Kernel]:
    """Kernels in the graph's order, each after those that it reads from."""
    position = {n: i for i, n in enumerate(fused.part.reads)}
    begun: set[int] = set()
    kernels: list[_Kernel] = []
    for node in fused.made:
        todo = [(groups[node], False)]
        while todo:
            group, ready = todo.pop()
            if ready:
                library = fused.kinds[group[0]] == LIBRARY
                kernels.append(_Kernel(group, library, _inside(fused, group[0]) if library else 0))
            elif id(group) not in begun:
                begun.add(id(group))
                todo.append((group, True))
                read = {r for n in group for r in fused.before[n]}
                todo += [(groups[r], False) for r in sorted(read, key=position.__getitem__)[::-1]]
    return kernels


def _maker(buffer: Node, fused: Fused) -> Node:
    while fused.kinds[buffer] == ITEM:
        (buffer,) = buffer.all_input_nodes
    return buffer


def _inside(fused: Fused, node: Node) -> int:
    """Bytes that a call of another graph has alive at its highest, beyond what it returns."""
    body = node.args[0] if getattr(node.target, "namespace", "") == "higher_order" and node.args else None
    if not isinstance(body, Node) or body.op != "get_attr" or fused.part.owner is None:
        return 0
    inner = Fused(getattr(fused.part.owner, str(body.target)).graph, fused.hint)
    return max(0, walk(inner, [], outputs(inner.graph)).peak - sum(fused.size(b) for b in fused.buffers(node)))


def outputs(graph: Graph) -> list[Node]:
    """The nodes that a graph returns."""
    found: list[Node] = next(iter(graph.find_nodes(op="output"))).all_input_nodes
    return found


# ------------------------------------------------------------------------------------------------------------- walk


def walk(
    fused: Fused,
    given: Iterable[Node],
    kept: Iterable[Node],
    machine: Machine | None = None,
    lent: Iterable[Node] = (),
) -> Walk:
    """What is alive from kernel to kernel: `given` inputs are let go of after their last use, `kept` values stay.

    No kernel writes over those inputs that are `lent`: what the caller has too.
    """
    given, size = list(given), fused.size
    stays = frozenset().union(*(fused.leaves[n] for n in kept))
    kernels = fused.kernels = _reordered(fused, given, stays)
    start, end = _lives(fused, kernels)
    readers: dict[tuple[Node, int], int] = defaultdict(int)
    for i, kernel in enumerate(kernels):
        for read in (r for n in kernel.nodes for r in fused.reads[n]):
            readers[read, i] += 1
    mortal = [b for b in (*given, *start) if b in end and b not in stays]
    passing = {b for b in mortal if b in start and end[b] == start[b] and readers[b, end[b]]}  # within a kernel
    plan = _Plan.of(fused, start, end, given, stays)
    reckoned = list(plan.alive)
    taken = plan.reuse(start, end, readers, set(given), stays, passing | set(lent))
    reused = {before: b for b, before in taken.items()}
    change = [0] * (len(kernels) + 1)
    for b in start:
        change[start[b]] += 0 if b in taken or b in passing else size(b)
    now = sum(map(size, given))
    walked = Walk(peak=now, planned=now)
    freed: dict[int, int] = defaultdict(int)
    for b in mortal:
        freed[end[b]] += 0 if b in reused or b in passing else size(b)
    now -= sum(size(b) for b in given if b not in end and b not in stays)
    highest = 0
    for i, kernel in enumerate(kernels):
        now += change[i]
        top = now + kernel.inside + (_scratch(fused, kernel, machine) if machine and kernel.library else 0)
        if top > walked.peak:
            walked.peak, highest = top, i
        walked.planned = max(walked.planned, reckoned[i] + top - now)
        if 2 * i >= len(kernels):
            walked.late = max(walked.late, top)
            walked.planned_late = max(walked.planned_late, reckoned[i] + top - now)
        walked.seconds += _seconds(fused, kernel, machine) if machine else 0.0
        now -= freed[i]
    until = {b: start[reused[b]] - 1 if b in reused else end[b] for b in start}
    walked.alive = frozenset(b for b, made in start.items() if made <= highest and (b in stays or highest <= until[b]))
    return walked


def _lives(fused: Fused, kernels: Sequence[_Kernel]) -> tuple[dict[Node, int], dict[Node, int]]:
    """The kernel that makes each buffer, and the last one that reads it."""
    start = {b: i for i, k in enumerate(kernels) for n in k.nodes for b in fused.buffers(n)}
    end = start | {r: i for i, k in enumerate(kernels) for n in k.nodes for r in fused.reads[n]}
    return start, end


@dataclass
class _Plan:
    """What Inductor's planner reckons: bytes at each kernel, nothing in place, all that a fused kernel computes."""

    fused: Fused
    alive: list[int]

    @classmethod
    def of(
        cls, fused: Fused, start: dict[Node, int], end: dict[Node, int], given: Sequence[Node], stays: frozenset[Node]
    ) -> _Plan:
        change = [0] * (len(fused.kernels) + 2)
        for b in (*given, *start):
            change[start.get(b, 0)] += fused.size(b)
            if b not in stays:
                change[end.get(b, -1) + 1] -= fused.size(b)
        alive, now = [], 0
        for step in change:
            now += step
            alive.append(now)
        return cls(fused, alive)

    def reuse(
        self,
        start: dict[Node, int],
        end: dict[Node, int],
        readers: dict[tuple[Node, int], int],
        given: set[Node],
        stays: frozenset[Node],
        apart: set[Node],
    ) -> dict[Node, Node]:
        """The buffers that take over another's memory, at once or later, and that other; none `apart` does."""
        most, alive = max(self.alive, default=0), self.alive
        reused: set[Node] = set()
        taken: dict[Node, Node] = {}
        idle: dict[Any, list[tuple[Node, int]]] = defaultdict(list)
        dying: dict[int, list[Node]] = defaultdict(list)
        for b, at in end.items():
            if b not in stays and b not in apart and (b in given or b in start):
                dying[at].append(b)
        for i, kernel in enumerate(self.fused.kernels):
            for node in kernel.nodes:
                over = not kernel.library or name_of(node) in SCATTERS
                if not over and name_of(node) not in INTO:
                    continue
                for b in self.fused.buffers(node):
                    if b in apart:
                        continue
                    free = [r for r in dying[i] if over and r in self.fused.reads[node] and r not in reused]
                    last = next((r for r in free if readers[r, i] == 1 and _same(r) == _same(b)), None)
                    waiting = idle[_same(b)]
                    if last is None and waiting:
                        before, since = waiting[-1]
                        size = self.fused.size(b)
                        if since + 1 == i or size + max(alive[since + 1 : i], default=0) <= most:
                            waiting.pop()
                            last = before
                            alive[since + 1 : i] = [n + size for n in alive[since + 1 : i]]
                    if last is not None:
                        reused.add(last)
                        taken[b] = last
            for b in dying[i]:
                if b not in reused and b not in given:
                    idle[_same(b)].append((b, i))
        return taken


# ------------------------------------------------------------------------------------------------------------ order


def _reordered(fused: Fused, given: Sequence[Node], stays: frozenset[Node]) -> list[_Kernel]:
    """The kernels in that order, of those that Inductor tries, of which it reckons the lowest peak; the graph's own is
    the first."""

    def peak(order: list[_Kernel]) -> int:
        return max(_Plan.of(fused, *_lives(fused, order), given, stays).alive)

    around = _Around(fused, given, stays)
    return min((fused.kernels, around.by_memory(), around.by_age(), around.by_size()), key=peak)


class _Around:
    """What each kernel, by its place in the graph's order, makes and waits for; the three other orders."""

    def __init__(self, fused: Fused, given: Sequence[Node], stays: frozenset[Node]):
        self.kernels, self.stays = fused.kernels, stays
        start, _ = _lives(fused, fused.kernels)
        known = {*start, *given}
        self.size = {b: fused.size(b) for b in known}
        self.given = sum(self.size[b] for b in given)
        self.makes = [[b for n in k.nodes for b in fused.buffers(n)] for k in fused.kernels]
        self.reads = [
            [r for r in dict.fromkeys(r for n in k.nodes for r in fused.reads[n]) if r in known and start.get(r) != i]
            for i, k in enumerate(fused.kernels)
        ]
        self.before = [{start[r] for r in reads if r in start} for reads in self.reads]
        self.after: list[list[int]] = [[] for _ in fused.kernels]
        self.readers: dict[Node, list[int]] = {b: [] for b in known}
        for i, reads in enumerate(self.reads):
            for j in self.before[i]:
                self.after[j].append(i)
            for r in reads:
                self.readers[r].append(i)
        self.takes = [sum(self.size[b] for b in made) for made in self.makes]

    def by_memory(self) -> list[_Kernel]:
        """Of those that can run the one that leaves least alive, as long as what it makes is below the highest point.

        "Buffer memory optimization for video codec application modeled in Simulink", DAC 2006.
        """
        left = {b: len(readers) + (b in self.stays) for b, readers in self.readers.items()}
        frees = [
            sum(self.size[b] for b in self.reads[i] if left[b] == 1) + sum(self.size[b] for b in made if not left[b])
            for i, made in enumerate(self.makes)
        ]
        waits = [len(before) for before in self.before]
        ready = {i for i, n in enumerate(waits) if n == 0}
        alive = self.given
        most = max(alive, sum(self.size[b] for b in self.stays if b in self.size))
        order = []
        while ready:
            gap = most - alive

            def rank(i: int, gap: int = gap) -> tuple[int, int, int]:
                return self.takes[i] if self.takes[i] > gap else 0, self.takes[i] - frees[i], i

            chosen = min(ready, key=rank)
            ready.remove(chosen)
            order.append(self.kernels[chosen])
            alive += self.takes[chosen]
            most = max(most, alive)
            alive -= frees[chosen]
            for i in self.after[chosen]:
                waits[i] -= 1
                if waits[i] == 0:
                    ready.add(i)
            for b in self.reads[chosen]:
                left[b] -= 1
                if left[b] == 1:
                    for i in self.readers[b]:
                        frees[i] += self.size[b]
        return order

    def by_age(self) -> list[_Kernel]:
        """Of those that can run the one whose last value to wait for has been there longest."""
        waits = [len(before) for before in self.before]
        ready: list[tuple[list[int], int]] = [([], i) for i, n in enumerate(waits) if n == 0]
        heapq.heapify(ready)
        place: dict[int, int] = {}
        while ready:
            _, chosen = heapq.heappop(ready)
            place[chosen] = len(place)
            for i in self.after[chosen]:
                waits[i] -= 1
                if waits[i] == 0:
                    heapq.heappush(ready, (sorted(place[j] for j in self.before[i]), i))
        return [self.kernels[i] for i in place]

    def by_size(self) -> list[_Kernel]:
        """Those that read and write least first, each after what it waits for."""
        moved = [n + sum(self.size[r] for r in reads) for n, reads in zip(self.takes, self.reads, strict=True)]
        found: dict[int, None] = {}
        todo = [(i, False) for i in sorted(range(len(moved)), key=lambda i: (moved[i], i))[::-1]]
        seen: set[int] = set()
        while todo:
            i, ready = todo.pop()
            if ready:
                found[i] = None
            elif i not in seen:
                seen.add(i)
                todo.append((i, True))
                todo += [(j, False) for j in sorted(self.before[i], key=lambda j: (moved[j], j))[::-1]]
        return [self.kernels[i] for i in found]


def _same(buffer: Node) -> Any:
    (tensor,) = _tensors(buffer)
    return tensor.dtype, tensor.device, str(numel([expr(n) for n in tensor.shape]))


# ------------------------------------------------------------------------------------------------------------- time


def _seconds(fused: Fused, kernel: _Kernel, machine: Machine) -> float:
    """Of a product or attention by what it computes, of all else by the bytes read and written."""
    if _is_computing(kernel.nodes[0]):
        return seconds_of(kernel.nodes[0], fused.hint, machine)
    reads = {r for n in kernel.nodes for r in fused.reads[n]}
    return machine.one_pass(sum(map(fused.size, reads)) + sum(fused.size(n) for n in kernel.nodes))


def _is_computing(node: Node) -> bool:
    return name_of(node) in INTO or ATTENTION in name_of(node)


def seconds_of(node: Node, hint: Any, machine: Machine) -> float:
    """Of a product by the machine's model, of attention by its FLOPs, of any other op by itself by the bytes that it
    reads and writes."""
    if name_of(node) in INTO:
        a, b = [value(i) for i in node.args if isinstance(i, Node)][-2:]
        m, k, n = (hint(expr(s)) for s in (a.shape[-2], a.shape[-1], b.shape[-1]))
        batch = hint(expr(a.shape[0])) if a.ndim > 2 else 1
        return machine.product(m, k, n, a.dtype, batch)
    if ATTENTION in name_of(node):
        return _attention(_Attention.of(hint, node), node, machine)
    return machine.one_pass(sum(bytes_of(n, hint) for n in (node, *node.all_input_nodes)))


def bytes_of(node: Node, hint: Any) -> int:
    """Of all tensors that a node gives."""
    return sum(int(hint(numel([expr(n) for n in v.shape])) * v.dtype.itemsize) for v in _tensors(node))


def _attention(sizes: _Attention, node: Node, machine: Machine) -> float:
    """Two products of T×T×d a head in forward, five in backward, half of each where it is causal."""
    flops = 2 * sizes.batch * sizes.heads * sizes.tokens * sizes.others * sizes.width * (5 if sizes.backward else 2)
    causal = 2 if argument(node, "is_causal") else 1
    return float(flops / causal / machine.speed(sizes.dtype).peak + machine.launch)


@dataclass(frozen=True)
class _Attention:
    """A fused kernel of attention: q [batch, heads, tokens, width], k and v [batch, …, others, width]."""

    backward: bool
    batch: int
    heads: int
    tokens: int
    width: int
    others: int
    dtype: torch.dtype

    @classmethod
    def of(cls, hint: Any, node: Node) -> _Attention:
        backward = "backward" in name_of(node)
        q, k = (value(tensor_arg(node, i + backward)) for i in range(2))
        batch, heads, tokens, width = (hint(expr(n)) for n in q.shape)
        return cls(backward, batch, heads, tokens, width, hint(expr(k.shape[-2])), q.dtype)


# ---------------------------------------------------------------------------------------------------------- scratch


def _scratch(fused: Fused, kernel: _Kernel, machine: Machine) -> int:
    """Bytes that a library's kernel allocates while it runs, and lets go of: of attention, as PyTorch has it; of a
    product of half-precision matrices on a CPU, the blocks of both that oneDNN packs for each thread."""
    (node,) = kernel.nodes
    if name_of(node) in INTO and machine.is_cpu and value(node).dtype.itemsize == 2:
        return int(PACKED * torch.get_num_threads())
    if ATTENTION not in name_of(node):
        return 0
    scratch = _scratch_of_threads if machine.is_cpu else _scratch_of_gradients
    return scratch(_Attention.of(fused.hint, node))


def _scratch_of_threads(a: _Attention) -> int:
    """On a CPU each thread holds blocks of the scores: one in forward with a result's beside it, two in backward; in
    float32, and once more in the values' own dtype where that is narrower."""
    rows = min(a.tokens, next(block for least, block in ((768, 256), (192, 64), (0, 32)) if a.tokens >= least))
    block = rows * min(a.others, 512)
    inside, narrow = 4 * block, a.dtype.itemsize * block if a.dtype.itemsize < 4 else 0
    each = 2 * (inside + narrow) if a.backward else inside + narrow + 4 * rows * (a.width + 2)
    return int(each * torch.get_num_threads())


def _scratch_of_gradients(a: _Attention) -> int:
    """On a GPU backward sums the gradient of q in float32, and keeps a number for each of its rows."""
    return 4 * a.batch * a.heads * a.tokens * (a.width + 1) if a.backward else 0
