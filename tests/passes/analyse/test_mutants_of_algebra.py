"""Mutants of the algebra of terms: whose products join, and at which scale."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from peft_fx.passes.analyse import algebra, sums
from peft_fx.passes.analyse.algebra import Matrix, Term
from tests.passes.mutation import Mutants, holds

MUTANTS = Mutants()


@MUTANTS.add
def different_inputs_taken_for_one() -> Any:
    def shares(term: Term, prefix: tuple[Matrix, ...]) -> bool:
        return len(term.factors) > len(prefix) and all(
            f.shape == p.shape for f, p in zip(term.factors, prefix, strict=False)
        )

    return patch.object(sums, "shares_left", shares)


@MUTANTS.add
def ratio_not_divided() -> Any:
    return patch.object(algebra.Scale, "over", lambda self, other: self)


def test_the_rule_as_it_is_holds() -> None:
    assert holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, holds)
