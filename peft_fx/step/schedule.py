"""The order of kernels: of those that Inductor tries, the one of which it reckons the lowest peak."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from peft_fx.step.fusion import Fused, Kernel
from peft_fx.step.kinds import (
    INTO,
    SCATTERS,
    name_of,
)


@dataclass
class Plan:
    """Kernels in an order: the one that makes each buffer, the last one that reads it; and bytes at each, as Inductor's
    planner reckons them: nothing in place, all that a fused kernel computes."""

    fused: Fused
    kernels: Sequence[Kernel]
    start: dict[Node, int]
    end: dict[Node, int]
    alive: list[int]

    @classmethod
    def of(cls, fused: Fused, kernels: Sequence[Kernel], sizes: Mapping[Node, int], stays: frozenset[Node]) -> Plan:
        start = {b: i for i, k in enumerate(kernels) for b in k.makes}
        end = start | {r: i for i, k in enumerate(kernels) for r in k.reads}
        change = [0] * (len(kernels) + 2)
        for b, size in sizes.items():
            change[start.get(b, 0)] += size
            if b not in stays:
                change[end.get(b, -1) + 1] -= size
        return cls(fused, kernels, start, end, list(itertools.accumulate(change)))

    def reuse(self, given: set[Node], stays: frozenset[Node], apart: set[Node]) -> dict[Node, Node]:
        """The buffers that take over another's memory, at once or later, and that other; none `apart` does."""
        fused, most, alive = self.fused, max(self.alive, default=0), self.alive[:]
        reused: set[Node] = set()
        taken: dict[Node, Node] = {}
        idle: dict[Any, list[tuple[Node, int]]] = defaultdict(list)
        dying: dict[int, list[Node]] = defaultdict(list)
        for b, at in self.end.items():
            if b not in stays and b not in apart and (b in given or b in self.start):
                dying[at].append(b)
        for i, kernel in enumerate(self.kernels):
            name = name_of(kernel.op) if kernel.library else ""
            over = not kernel.library or name in SCATTERS
            for node in kernel.nodes if over or name in INTO else ():
                free = [r for r in dying[i] if over and kernel.reads.get(r) == 1 and r in fused.reads[node]]
                for b in fused.buffers(node):
                    if b in apart:
                        continue
                    memory = fused.memory(b)
                    last = next((r for r in free if r not in reused and fused.memory(r) == memory), None)
                    waiting = idle[memory]
                    if last is None and waiting:
                        before, since = waiting[-1]
                        size = fused.size(b)
                        if since + 1 == i or size + max(alive[since + 1 : i], default=0) <= most:
                            waiting.pop()
                            last = before
                            alive[since + 1 : i] = [n + size for n in alive[since + 1 : i]]
                    if last is not None:
                        reused.add(last)
                        taken[b] = last
            for b in dying[i]:
                if b not in reused and b not in given:
                    idle[fused.memory(b)].append((b, i))
        return taken


def reordered(fused: Fused, given: Sequence[Node], stays: frozenset[Node]) -> Plan:
    """The kernels in that order, of those that Inductor tries, of which it reckons the lowest peak; the graph's own is
    the first."""
    sizes = {b: fused.size(b) for b in (*given, *(b for k in fused.kernels for b in k.makes))}
    first = Plan.of(fused, fused.kernels, sizes, stays)
    around = _Around(first, sizes, given, stays)
    others = around.by_memory(), around.by_age(), around.by_size()
    plans = (first, *(Plan.of(fused, kernels, sizes, stays) for kernels in others))
    return min(plans, key=lambda plan: max(plan.alive))


class _Around:
    """What each kernel, by its place in the graph's order, makes and waits for; the three other orders."""

    def __init__(self, plan: Plan, sizes: Mapping[Node, int], given: Sequence[Node], stays: frozenset[Node]):
        self.kernels, self.size, self.stays, start = plan.kernels, sizes, stays, plan.start
        self.given = sum(self.size[b] for b in given)
        self.makes = [k.makes for k in self.kernels]
        self.reads = [[r for r in k.reads if r in self.size and start.get(r) != i] for i, k in enumerate(self.kernels)]
        self.before = [{start[r] for r in reads if r in start} for reads in self.reads]
        self.after: list[list[int]] = [[] for _ in self.kernels]
        self.readers: dict[Node, list[int]] = {b: [] for b in self.size}
        for i, reads in enumerate(self.reads):
            for j in self.before[i]:
                self.after[j].append(i)
            for r in reads:
                self.readers[r].append(i)
        self.takes = [sum(self.size[b] for b in made) for made in self.makes]

    def by_memory(self) -> list[Kernel]:
        """Of those that can run the one that leaves least alive, as long as what it makes is below the highest point.

        "Buffer memory optimization for video codec application modeled in Simulink", DAC 2006.
        """
        left = {b: len(readers) + (b in self.stays) for b, readers in self.readers.items()}
        frees = [
            sum(self.size[b] for b in self.reads[i] if left[b] == 1) + sum(self.size[b] for b in made if not left[b])
            for i, made in enumerate(self.makes)
        ]
        waits = [len(before) for before in self.before]
        ready: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by what they make; those that free most first

        def add(i: int) -> None:
            heapq.heappush(ready[self.takes[i]], (-frees[i], i))

        for i, n in enumerate(waits):
            if n == 0:
                add(i)
        alive = self.given
        most = max(alive, sum(self.size[b] for b in self.stays if b in self.size))
        order: dict[int, None] = {}
        while ready:
            gap = most - alive
            ranks = ((n if n > gap else 0, n + heap[0][0], heap[0][1]) for n, heap in ready.items())
            *_, chosen = min(ranks)
            order[chosen] = None
            takes, heap = self.takes[chosen], ready[self.takes[chosen]]
            while heap and heap[0][1] in order:  # also where it once freed less
                heapq.heappop(heap)
            if not heap:
                del ready[takes]
            most = max(most, alive + takes)
            alive += takes - frees[chosen]
            for i in self.after[chosen]:
                waits[i] -= 1
                if waits[i] == 0:
                    add(i)
            for b in self.reads[chosen]:
                left[b] -= 1
                if left[b] == 1:
                    for i in self.readers[b]:
                        frees[i] += self.size[b]
                        if waits[i] == 0 and i not in order:
                            add(i)
        return [self.kernels[i] for i in order]

    def by_age(self) -> list[Kernel]:
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

    def by_size(self) -> list[Kernel]:
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
