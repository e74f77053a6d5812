"""A mutant of the editor: what stands for a value must lie as it did."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from peft_fx.passes.graph import editor
from tests.passes.mutation import Mutants, affine_holds

MUTANTS = Mutants()


@MUTANTS.add
def strides_not_kept() -> Any:
    return patch.object(editor.Editor, "laid_out", lambda build, node, strides: node)


def test_the_affine_rules_as_they_are_hold() -> None:
    assert affine_holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_an_affine_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, affine_holds)
