"""The order of kernels: of those that Inductor tries, the one of which it reckons the lowest peak."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from peft_fx.step.fusion import Fused, Kernel
from peft_fx.step.kinds import (
    INTO,
    SCATTERS,
    name_of,
)


def lives(fused: Fused, kernels: Sequence[Kernel]) -> tuple[dict[Node, int], dict[Node, int]]:
    """The kernel that makes each buffer, and the last one that reads it."""
    start = {b: i for i, k in enumerate(kernels) for n in k.nodes for b in fused.buffers(n)}
    end = start | {r: i for i, k in enumerate(kernels) for n in k.nodes for r in fused.reads[n]}
    return start, end


@dataclass
class Plan:
    """What Inductor's planner reckons: bytes at each kernel, nothing in place, all that a fused kernel computes."""

    fused: Fused
    alive: list[int]

    @classmethod
    def of(
        cls, fused: Fused, start: dict[Node, int], end: dict[Node, int], given: Sequence[Node], stays: frozenset[Node]
    ) -> Plan:
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
        fused, most, alive = self.fused, max(self.alive, default=0), self.alive
        reused: set[Node] = set()
        taken: dict[Node, Node] = {}
        idle: dict[Any, list[tuple[Node, int]]] = defaultdict(list)
        dying: dict[int, list[Node]] = defaultdict(list)
        for b, at in end.items():
            if b not in stays and b not in apart and (b in given or b in start):
                dying[at].append(b)
        for i, kernel in enumerate(fused.kernels):
            for node in kernel.nodes:
                over = not kernel.library or name_of(node) in SCATTERS
                if not over and name_of(node) not in INTO:
                    continue
                for b in fused.buffers(node):
                    if b in apart:
                        continue
                    free = [r for r in dying[i] if over and r in fused.reads[node] and r not in reused]
                    last = next((r for r in free if readers[r, i] == 1 and fused.memory(r) == fused.memory(b)), None)
                    waiting = idle[fused.memory(b)]
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


def reordered(fused: Fused, given: Sequence[Node], stays: frozenset[Node]) -> list[Kernel]:
    """The kernels in that order, of those that Inductor tries, of which it reckons the lowest peak; the graph's own is
    the first."""

    def peak(order: list[Kernel]) -> int:
        return max(Plan.of(fused, *lives(fused, order), given, stays).alive)

    around = _Around(fused, given, stays)
    return min((fused.kernels, around.by_memory(), around.by_age(), around.by_size()), key=peak)


class _Around:
    """What each kernel, by its place in the graph's order, makes and waits for; the three other orders."""

    def __init__(self, fused: Fused, given: Sequence[Node], stays: frozenset[Node]):
        self.kernels, self.stays = fused.kernels, stays
        start, _ = lives(fused, fused.kernels)
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
