"""Mutants of row-wise affine maps: the rules of their ops, what an adapter is among them, and where it ends."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from peft_fx.passes.analyse import affine_rules, maps, regions
from tests.passes.mutation import Mutants, affine_captured, affine_cases, affine_holds

MUTANTS = Mutants()


@MUTANTS.add
def tokens_taken_for_features() -> Any:
    return patch.object(affine_rules, "_features", lambda dims, i: True)


@MUTANTS.add
def every_weight_taken_for_the_same_at_all_tokens() -> Any:
    return patch.object(affine_rules, "_same", lambda weight, dims: True)


@MUTANTS.add
def order_of_tokens_not_looked_at() -> Any:
    return patch.object(regions, "in_order", lambda dims: True)


@MUTANTS.add
def next_layer_taken_for_the_same() -> Any:
    return patch.object(maps.AffineMaps, "_cut", lambda self, node, row, trained, frozen: row)


@MUTANTS.add
def frozen_vectors_taken_for_adapters() -> Any:
    return patch.object(maps.AffineMaps, "is_adapted", lambda self, row: bool(row.frozen))


def test_the_affine_rules_as_they_are_hold() -> None:
    forward = [[f for _, f, _ in sites] for _, sites in affine_captured()]
    left = {"vector_along_tokens", "tokens_flipped", "frozen_vectors"}
    for (name, _), forms in zip(affine_cases(), forward, strict=True):
        assert set(forms) == (set() if name in left else {"weight"}), name
    assert affine_holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_an_affine_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, affine_holds)
