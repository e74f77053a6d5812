"""The least cut of a network of whole numbers: what it costs least to part from a sink."""

from __future__ import annotations

from collections.abc import Sequence

ENDLESS = 1 << 200  # a capacity that no cut goes through


class Network:
    """Vertices 0 … n−1, joined by edges with capacities. Of each edge there is a reverse one beside it, at its number
    with the last bit turned: what flows on the one can be taken back on the other."""

    def __init__(self, vertices: int):
        self.leaving: list[list[int]] = [[] for _ in range(vertices)]
        self.ends: list[int] = []

    def edge(self, start: int, end: int) -> int:
        """The number of a new edge."""
        number = len(self.ends)
        self.ends += [end, start]
        self.leaving[start].append(number)
        self.leaving[end].append(number + 1)
        return number

    def apart(self, source: int, sink: int, left: list[int]) -> list[bool]:
        """Whether each vertex is on the source's side of the least cut, of all such the one nearest to the sink.
        `left` are the capacities of the edges and of their reverses, and in the end what no flow takes of them.

        E. A. Dinic, "Algorithm for solution of a problem of maximum flow in networks with power estimation", 1970.
        """
        while (far := self._far(sink, left))[source] >= 0:
            self._fill(source, sink, left, far)
        return [n < 0 for n in far]

    def _far(self, sink: int, left: Sequence[int]) -> list[int]:
        """How many edges with something left lead from each vertex to the sink; −1 where none do."""
        far, leaving, ends = [-1] * len(self.leaving), self.leaving, self.ends
        far[sink], now = 0, [sink]
        while now:
            following = []
            for v in now:
                for e in leaving[v]:
                    u = ends[e]
                    if far[u] < 0 and left[e ^ 1]:
                        far[u] = far[v] + 1
                        following.append(u)
            now = following
        return far

    def _fill(self, source: int, sink: int, left: list[int], far: list[int]) -> None:
        """Flow along shortest ways until each has an edge with nothing left."""
        leaving, ends = self.leaving, self.ends
        tried = [0] * len(leaving)
        way: list[int] = []
        v = source
        while True:
            if v == sink:
                least = min(left[e] for e in way)
                if least > ENDLESS // 2:
                    raise ValueError("no cut parts the source from the sink")
                for e in way:
                    left[e] -= least
                    left[e ^ 1] += least
                first = next(i for i, e in enumerate(way) if not left[e])
                v = ends[way[first] ^ 1]
                del way[first:]
            edges, i, nearer = leaving[v], tried[v], far[v] - 1
            while i < len(edges) and not (left[edges[i]] and far[ends[edges[i]]] == nearer):
                i += 1
            tried[v] = i
            if i < len(edges):
                way.append(edges[i])
                v = ends[edges[i]]
            elif way:
                v = ends[way.pop() ^ 1]
                tried[v] += 1
            else:
                return
