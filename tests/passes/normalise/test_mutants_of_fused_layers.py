"""A mutant of fused layers: the columns of each part."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from torch.fx import Node

from peft_fx.passes.normalise import fused_layers
from tests.passes.mutation import Mutants, affine_holds

MUTANTS = Mutants()


@MUTANTS.add
def columns_of_parts_mixed_up() -> Any:
    """Each part of a whole result is taken from where another one is."""
    real = fused_layers._columns

    def columns(node: Node) -> Any:
        found = real(node)
        return dict(zip(found, [*found.values()][::-1], strict=True))

    return patch.object(fused_layers, "_columns", columns)


def test_the_affine_rules_as_they_are_hold() -> None:
    assert affine_holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_an_affine_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, affine_holds)
