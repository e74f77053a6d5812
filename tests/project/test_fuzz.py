"""A slice of the fuzzer that is the same at every run, and every case that it ever failed on."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tests.fuzz.oracles import Case, Failure, judge
from tests.fuzz.search import CORPUS, Found, replayed, search, shrunk
from tests.passes.analyse.test_mutants_of_linear_rules import MUTANTS

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


def test_a_mutant_is_found_and_cut_down():
    """To a program that fails under the mutant, and not without it."""
    with MUTANTS.applied("scale_dropped"):
        found = next(f for i in range(100) if isinstance(f := search(Random(f"0:{i}")), Found))
        small = shrunk(found)
        with pytest.raises(Failure):
            judge(Case.of(small.program.source()))
    assert len(small.program.steps) <= len(found.program.steps)
    judge(Case.of(small.program.source()))
