"""A least cut: against every set of vertices that there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_fx.step.cut import ENDLESS, Network


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), max_size=14))
def test_a_cut_is_the_least_and_nearest_to_the_sink(edges: list[tuple[int, int, int]]) -> None:
    """Of all sets of vertices that have the source and not the sink; of several the one with all that any has."""
    network = Network(7)
    numbers = [network.edge(a, b) for a, b, _ in edges]
    left = [0] * len(network.ends)
    for number, (_, _, capacity) in zip(numbers, edges, strict=True):
        left[number] = capacity
    found = network.apart(0, 1, left)
    sides = [(True, False, *rest) for rest in itertools.product((False, True), repeat=5)]
    costs = {side: sum(c for a, b, c in edges if side[a] and not side[b]) for side in sides}
    least = min(costs.values())
    assert tuple(found) == tuple(map(any, zip(*(s for s in sides if costs[s] == least), strict=True)))


def test_what_nothing_parts_is_an_error() -> None:
    network = Network(2)
    network.edge(0, 1)
    with pytest.raises(ValueError, match="no cut"):
        network.apart(0, 1, [ENDLESS, 0])
