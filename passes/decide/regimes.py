"""For which numbers of tokens one graph's decisions hold, where a graph serves many.

Each adapter has its own crossover. A graph for each would be a recompilation for each, so those of one graph share two
switches: below the least crossover everything is in activation form, above the greatest everything is in the form that
the price ends at, and between them the decisions are those at the middle. A guard at the switches makes three graphs of
a model at most, and none of them knows its number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from peft_fx.passes.analyse.algebra import Size

MOST = 1 << 24  # tokens; what changes only beyond does not change
Forms = Callable[[int], tuple[str, str]]  # an adapter's forms at so many tokens
AtLeast = Callable[[Size, int], "bool | None"]  # whether a size is as large; holds for all that the graph serves


@dataclass
class Regimes:
    """The number of tokens that each decision of a graph is made at. `at_least` adds the guard, and gives None for a
    size that nobody can tell before the graph runs: then it is one token, the form as it was written."""

    hint: Callable[[Size], int]
    at_least: AtLeast
    chosen: dict[Any, int] = field(default_factory=dict)

    def settle(self, adapters: Iterable[tuple[Size, Forms]]) -> None:
        """Chooses the regime of each number of tokens that is no constant, for all of a graph's adapters at once. For
        more of them later, in the regime that the graph is in by then."""
        by_tokens: dict[Any, list[tuple[int, int]]] = {}
        for tokens, forms in adapters:
            if not isinstance(tokens, int):
                by_tokens.setdefault(tokens, []).append(crossovers(forms))
        for tokens, found in by_tokens.items():
            if tokens not in self.chosen or any(last < MOST for _, last in found):
                self.chosen[tokens] = self._regime(tokens, found)

    def tokens(self, tokens: Size) -> int:
        return self.chosen[tokens] if tokens in self.chosen else self.hint(tokens)

    def _regime(self, tokens: Size, found: list[tuple[int, int]]) -> int:
        """A number of tokens of the regime that a graph is in."""
        changing = [c for c in found if c[1] < MOST]
        first, last = min((a for a, _ in changing), default=0), max((b for _, b in changing), default=0)
        if self.at_least(tokens, 2) is None:
            return 1
        if self.at_least(tokens, last):
            return max(self.hint(tokens), last)
        if self.at_least(tokens, first):
            return int((first * last) ** 0.5)
        return min(self.hint(tokens), first - 1)


def crossovers(forms: Forms) -> tuple[int, int]:
    """The least number of tokens at which an adapter's forms differ from those at one token, and the least from which
    on they are those at `MOST`; `MOST` twice where they never change."""
    few, many = forms(1), forms(MOST)
    if few == many:
        return MOST, MOST
    return _least(lambda T: forms(T) != few), _least(lambda T: forms(T) == many)


def _least(holds: Callable[[int], bool]) -> int:
    """The least T from 1 to `MOST` that a condition holds from, by bisection."""
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
