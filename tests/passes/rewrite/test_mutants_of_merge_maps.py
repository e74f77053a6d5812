"""A mutant of the affine maps that read W': the other addends of the region must go."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from peft_fx.passes.rewrite import merge_maps
from tests.passes.mutation import Mutants, affine_holds

MUTANTS = Mutants()


@MUTANTS.add
def addend_kept_beside_the_merged_product() -> Any:
    return patch.object(merge_maps, "_drop", lambda build, end: None)


def test_the_affine_rules_as_they_are_hold() -> None:
    assert affine_holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_an_affine_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, affine_holds)
