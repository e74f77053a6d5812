"""A slice of the fuzzer that is the same at every run, and every case that it ever failed on."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tests.fuzz.search import CORPUS, Found, replayed, search

CASES = 150


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.py")), ids=lambda path: path.stem)
def test_what_failed_once_holds(path):
    replayed(path.read_text())


@pytest.mark.parametrize("seed", [0, 1])
def test_random_programs_hold(seed):
    counts = Counter()
    for i in range(CASES):
        found = search(Random(f"{seed}:{i}"))
        assert not isinstance(found, Found), f"case {i} of seed {seed}: {found.message}"
        counts["rewritten"] += found.rewritten
        counts["refused"] += found.refused
    assert counts["rewritten"] >= 0.6 * CASES
    assert counts["refused"] >= 0.15 * CASES
