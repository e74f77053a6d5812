"""Which values to keep for backward, and which to make again, so that a step fits a number of bytes in the least time.

Between forward and backward a cut is made through the graph, as PyTorch's partitioner makes it. Here making a value
again has a price where it would be forbidden there: with a price of λ seconds on every byte kept, the least cut

    Σ λ·bytes of what is kept  +  Σ seconds of what is made again

keeps what is worth keeping, exactly, and the larger λ is, the more is made again and the less is kept. So λ is raised
until the peak of the liveness walk, over both halves as they would be ordered, is within the budget, and no further.
Layers that are alike all turn at one λ. A value that is made earlier waits longer for its reader and is alive at more
high points: of what turns at one λ no more than needed does, the first of it first.

What is never made again: random draws other than from a seed, effects, collectives, calls of other graphs, and what the
partitioner or a pass has said to keep. What a pass or a checkpoint has said to make again is never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import leading_to
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.graph.nodes import value
from peft_fx.step.cut import ENDLESS, Network
from peft_fx.step.fusion import Known
from peft_fx.step.halves import Sides, Taken, taken
from peft_fx.step.kinds import ITEM, NONE, VIEW, bytes_of, kind_of
from peft_fx.step.repeats import base_of, is_repeatable, is_repeated, is_saved
from peft_fx.step.seconds import seconds_of

FEW = 0.02  # of the bytes kept: turns that free less are taken together
EXACT = 1e-9  # of a sum of seconds: two that differ by less are one
LEAST = 1e-15  # seconds a byte: what costs nothing to make again is not kept
UNIT = 1e15  # of seconds: a flow of whole numbers is exact


@dataclass(frozen=True)
class Choice:
    """Values kept for backward and values that it makes again; what a step then takes by the walk, besides what
    other graphs like it hold, and the seconds of it, by the price, that making them again takes."""

    kept: frozenset[Node]
    rebuilt: frozenset[Node]
    taken: Taken
    seconds: float
    others: int = 0

    @property
    def peak(self) -> int:
        return self.taken.peak + self.others


@dataclass(frozen=True)
class Held:
    """What was done for a budget in one graph. `asked` are its bytes, `budget` those of them that a step may take,
    `fixed` those that are there besides, by what they are; `peak` and `kept` are bytes by the liveness walk, {"before",
    "after"}, `results` those returned; `seconds` is what making `rebuilt` more values again adds, by the price. All but
    `results` and `rebuilt` are of a step that takes so many `times` what the graph does."""

    asked: int
    budget: int
    fixed: Mapping[str, int]
    peak: Mapping[str, int]
    kept: Mapping[str, int]
    results: int
    seconds: float
    rebuilt: int
    times: float = 1.0

    @property
    def is_held(self) -> bool:
        return self.peak["after"] <= self.budget

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_held": self.is_held}


@dataclass(frozen=True)
class Turn:
    """A choice, what is kept just below a higher λ, and the choice that it turns into there."""

    here: Choice
    before: frozenset[Node]
    after: Choice


@dataclass
class Choices:
    """The choices that there are for a joint graph. `before` are the values that the partitioner keeps by itself: what
    it then makes again costs nothing more. Where a step takes several `times` what the graph does, as of one of many
    layers that are alike, bytes and seconds are of the step. `handed_on` is what layers hand to the next."""

    graph: Graph
    before: Set[Node]
    hint: Callable[[Size], int]
    machine: Machine
    times: float = 1.0
    handed_on: frozenset[Node] = frozenset()

    def __post_init__(self) -> None:
        self.sides = Sides.of(self.graph)
        self.free = self.sides.rebuilt(self.before)
        self.nodes = self._upstream()
        self.bytes = {n: self._bytes(n) for n in self.nodes}
        self.seconds = {n: self._seconds(n) for n in self.nodes}
        self.handed_on = frozenset(n for n in self.handed_on if self.bytes.get(n, math.inf) < math.inf)
        self._known: dict[frozenset[Node], Choice] = {}
        self._made: dict[tuple[float, frozenset[Node]], frozenset[Node]] = {}
        self._lines: dict[frozenset[Node], tuple[float, float]] = {}
        self._about = Known()
        self._connect()
        self._few = FEW * self._line(self.before)[0]

    def within(self, peak: int) -> Choice:
        """The quickest choice found whose peak is within so many bytes; else the one with the lowest peak. Where none
        is, the search is made once more, and each layer made again from what the one before handed on."""
        lowest = self.of(frozenset(self.before))
        if lowest.peak <= peak:
            return lowest
        for held in dict.fromkeys((frozenset[Node](), self.handed_on)):
            for turn in self._turns(peak, held):
                if turn.after.peak <= peak:
                    return self._between(turn, peak)
                lowest = min(lowest, turn.after, key=lambda choice: (choice.peak, choice.seconds))
        return lowest

    def keeping(self, share: float) -> Choice:
        """The quickest choice found that keeps no more than so much of the bytes kept without one, or else the least,
        and has no higher peak."""
        here = self.of(frozenset(self.before))
        found, most = [here], share * self._line(here.kept)[0]
        for held in dict.fromkeys((frozenset[Node](), self.handed_on)):
            if turned := self._further(here.kept, held, self._line(here.kept)[0] - most):
                found.append(self._parted(*turned[1:], most, here.peak))
        low = [choice for choice in found if choice.peak <= here.peak]
        return min(low, key=lambda choice: (max(most, self._line(choice.kept)[0]), choice.seconds, choice.peak))

    def at(self, price: float) -> frozenset[Node]:
        """The values kept where a byte kept costs so many seconds, what layers hand on not made again."""
        return self._cut(price, self.handed_on)

    def of(self, kept: frozenset[Node]) -> Choice:
        """What comes of a set of values kept, of which what nobody then reads is not kept."""
        if kept not in self._known:
            rebuilt = self.sides.rebuilt(kept)
            read = kept & self.sides.reads.union(*(n.all_input_nodes for n in rebuilt))
            found = taken(self.graph, self.sides, read, self.hint, self.machine, self._about)
            others = int((self.times - 1) * self._between_halves(read))
            self._known[kept] = Choice(read, frozenset(rebuilt), found, self._sum(self.seconds, rebuilt), others)
        return self._known[kept]

    def _between_halves(self, kept: Set[Node]) -> int:
        """Bytes that the graph leaves: what is kept and returned; at its end new gradients, if those are
        more."""
        results, gradients = (
            {base for n in given if isinstance(n, Node) and (base := base_of(n)).op != "placeholder"}
            for given in (self.sides.results, self.sides.gradients)
        )
        return max(sum(bytes_of(n, self.hint) for n in nodes) for nodes in (results | kept, gradients))

    def _turns(self, peak: float = 0, held: frozenset[Node] = frozenset()) -> Iterator[Turn]:
        """What is kept at higher and higher λ, each with a lower peak, down to one that is low enough. What is made
        again and alive at the highest point stays kept; and so does all that turns at a λ where the peak is no
        lower. As long as every byte that is no longer kept lowers the peak by one, it is known which λ is enough."""
        here, kept = self.of(frozenset(self.before)), self._cut(LEAST, held)
        if self._spent(here.kept, kept) >= self._few > 0:  # what is returned is there anyway: a partitioner misses that
            here = self.of(kept)
            yield Turn(here, kept, here)
        is_known = True
        while following := self._further(here.kept, held, max(self._few, here.peak - peak if is_known else 0)):
            price, before, kept = following
            after = self.of(kept)
            if is_known and self._spent(here.kept, kept) > here.peak - after.peak:
                is_known = False
                continue
            wasted, known = after.taken.alive & after.rebuilt & before, held
            other = self.of(self._cut(price * (1 + EXACT), held | wasted)) if wasted else after
            if other.peak <= after.peak:
                after, held = other, held | wasted
            turn = Turn(here, before, after)
            if after.peak >= here.peak:
                after = self._lowest(turn, here)
            elif after.peak > peak and self._spent(before, after.kept) > here.peak - after.peak:
                after = self._between(turn, after.peak)
            is_lower, here = after.peak < here.peak, after
            held |= here.kept - turn.after.kept
            if is_lower:
                yield replace(turn, after=here)
            elif held == known:
                return  # what is held is not read any more: there is no way on from here

    def _spent(self, before: Set[Node], after: Set[Node]) -> float:
        """Bytes that are no longer kept."""
        return self._line(before)[0] - self._line(after)[0]

    def _further(
        self, here: frozenset[Node], held: frozenset[Node], least: float
    ) -> tuple[float, frozenset[Node], frozenset[Node]] | None:
        """The λ at which so many bytes, or all that do at any, have turned; what is kept just below it, and above.

        Of two lines of seconds by λ the crossing, where no other one is lower: else that one takes the place of one of
        them.
        """
        before, after = here, self._cut(self._sum(self.seconds, self.nodes), held)  # a byte less is worth all of them
        most = max(self._line(here)[0] - least, self._line(after)[0])
        while (price := self._crossing(before, after)) < math.inf:
            kept = self._cut(price * (1 + EXACT), held)
            crossed = self._crossing(before, kept)
            if crossed < math.inf and self._line(kept)[0] > most:
                before = kept
            elif crossed < price * (1 - EXACT):
                after = kept
            else:
                return price, before, kept if crossed < math.inf else after
        return None

    def _crossing(self, before: frozenset[Node], after: frozenset[Node]) -> float:
        """The λ from which on what has fewer bytes kept takes less, seconds by λ."""
        (high, least), (low, most) = self._line(before), self._line(after)
        return (most - least) / (high - low) if low < high else math.inf

    def _between(self, turn: Turn, peak: int) -> Choice:
        """Of values that turn at one λ those of the earliest layers, as many as bring the peak within so many bytes.

        A byte more that is kept raises the peak by no more than one: what then fits in any case, or does not in any, is
        not walked.
        """
        best = turn.after
        over = self._line(turn.here.kept)[0] - (turn.here.peak - peak)  # bytes kept that are too many

        def fits(kept: frozenset[Node]) -> bool:
            nonlocal best, over
            size = self._line(kept)[0]
            if best.peak + size - self._line(best.kept)[0] <= peak:
                return True
            if size >= over:
                return False
            found = self.of(kept)
            if found.peak > peak:
                over = min(over, size - (found.peak - peak))
                return False
            best = found
            return True

        last = self.of(_earliest(turn.before, turn.after.kept, fits))
        return last if last.peak <= peak else best

    def _lowest(self, turn: Turn, best: Choice) -> Choice:
        """Of values that turn at one λ those of the earliest layers, as many as lower the peak of the best so far."""

        def is_higher(kept: frozenset[Node]) -> bool:
            nonlocal best
            found = self.of(kept)
            higher, best = found.peak > best.peak, min(best, found, key=lambda choice: choice.peak)
            return higher

        _earliest(turn.before, turn.after.kept, is_higher)
        return best

    def _parted(self, before: frozenset[Node], after: frozenset[Node], most: float, peak: int) -> Choice:
        """Of what turns at one λ as little, the earliest first, as leaves no more than so many bytes kept and has no
        higher peak; else all of it."""
        return self.of(
            _earliest(before, after, lambda kept: self._line(kept)[0] <= most and self.of(kept).peak <= peak)
        )

    def _line(self, kept: Set[Node]) -> tuple[float, float]:
        """Bytes kept and seconds of making the rest again."""
        kept = frozenset(kept)
        if kept not in self._lines:
            self._lines[kept] = self._sum(self.bytes, kept), self._sum(self.seconds, self.sides.rebuilt(kept))
        return self._lines[kept]

    def _sum(self, of: Mapping[Node, float], nodes: Iterable[Node]) -> float:
        return math.fsum(of[n] for n in nodes if of.get(n, math.inf) < math.inf)  # in any order the same

    def _upstream(self) -> list[Node]:
        """Forward's values that backward reads, and what those are computed from, in the graph's order."""
        found = leading_to(self.sides.reads)
        return [n for n in self.graph.nodes if n in found and n.op == "call_function"]

    def _bytes(self, node: Node) -> float:
        """Of a value that can be kept; infinite for others."""
        if isinstance(value(node), torch.SymInt):
            return 0.0
        single = isinstance(value(node), torch.Tensor) and (kind_of(node) != VIEW or is_saved(node))
        return float(self.times * bytes_of(node, self.hint)) if single and not is_repeated(node) else math.inf

    def _seconds(self, node: Node) -> float:
        """Of making a value again; infinite where that must not be."""
        if is_saved(node):
            return math.inf
        if node in self.free or is_repeated(node) or kind_of(node) in (VIEW, ITEM, NONE):
            return 0.0
        return self.times * seconds_of(node, self.hint, self.machine) if is_repeatable(node) else math.inf

    def _cut(self, price: float, held: frozenset[Node] = frozenset()) -> frozenset[Node]:
        """The values kept where a byte kept costs so many seconds; those `held` are not made again.

        Of each node there are two ends: one is cut off where it is not made again, the other where it is not there.
        """
        if (price, held) not in self._made:
            left = list(self._always)
            for node, made, there in self._parts:
                left[made] = _capacity(math.inf if node in held else self.seconds[node])
                left[there] = _capacity(price * self.bytes[node])
            side, ends = self._network.apart(KEPT, BACKWARD, left), self._network.ends
            kept = frozenset(n for n, made, there in self._parts if side[ends[made]] and not side[ends[there]])
            self._made[price, held] = kept
        return self._made[price, held]

    def _connect(self) -> None:
        """The network that is cut. What is neither kept nor costs anything to make again, as a view, is in it what it
        is made of. Of each other value: its place, and the edges cut where it is made again and where it is kept."""
        self._network = network = Network(2 + 2 * len(self.nodes))
        self._parts: list[tuple[Node, int, int]] = []
        always: list[int] = []
        ends: dict[Node, list[int]] = {}
        for i, node in enumerate(self.nodes):
            read = list(dict.fromkeys(end for n in node.all_input_nodes for end in ends.get(n, ())))
            ends[node], made, there = read, 2 + 2 * i, 3 + 2 * i
            if self.bytes[node] < math.inf or self.seconds[node] > 0:
                self._parts.append((node, network.edge(KEPT, made), network.edge(made, there)))
                always += [network.edge(end, made) for end in read]
                ends[node] = [there]
            if node in self.sides.reads or (is_repeated(node) and "ac_graph_id" in node.meta):
                always += [network.edge(end, BACKWARD) for end in ends[node]]  # the latter whether or not it is read
        self._always = [0] * len(network.ends)
        for edge in always:
            self._always[edge] = ENDLESS


KEPT, BACKWARD = 0, 1


def _earliest(
    before: frozenset[Node], after: frozenset[Node], is_enough: Callable[[frozenset[Node]], bool]
) -> frozenset[Node]:
    """What is kept where of the values kept before a turn or after it, not both, as few turn as are enough, the first
    of the graph's order first: else all of them. There is no walk of what is none or all of them."""
    changed = sorted(before ^ after)
    low, high = 0, len(changed)
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(before.symmetric_difference(changed[:middle])):
            high = middle
        else:
            low = middle
    return before.symmetric_difference(changed[:high])


def _capacity(seconds: float) -> int:
    return round(seconds * UNIT) if seconds < math.inf else ENDLESS
