"""Mutants of the rules of linear ops: what a term is after each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from peft_fx.passes.analyse import linear_rules
from peft_fx.passes.analyse.algebra import ONE
from peft_fx.passes.graph.nodes import aten
from tests.passes.mutation import Mutants, holds

MUTANTS = Mutants()


def _rule(op: Any, change: Callable[[list[Any] | None], Any]) -> Any:
    """The transfer function of one op, with its answer changed."""
    real = linear_rules.LINEAR[op]
    return patch.dict(linear_rules.LINEAR, {op: lambda node: change(real(node))})


@MUTANTS.add
def scale_dropped() -> Any:
    return _rule(aten.mul.Tensor, lambda parts: parts and [replace(p, scale=ONE) for p in parts])


@MUTANTS.add
def scale_squared() -> Any:
    return _rule(aten.mul.Tensor, lambda parts: parts and [replace(p, scale=p.scale * p.scale) for p in parts])


@MUTANTS.add
def alpha_ignored() -> Any:
    return _rule(aten.add.Tensor, lambda parts: [replace(p, scale=ONE) for p in parts])


@MUTANTS.add
def subtraction_added() -> Any:
    return _rule(aten.sub.Tensor, lambda parts: [replace(p, scale=ONE) for p in parts])


@MUTANTS.add
def negation_ignored() -> Any:
    return _rule(aten.neg.default, lambda parts: [replace(p, scale=ONE) for p in parts])


@MUTANTS.add
def beta_ignored() -> Any:
    return _rule(aten.addmm.default, lambda parts: [replace(p, scale=ONE) for p in parts])


@MUTANTS.add
def permute_taken_for_a_reshape() -> Any:
    return _rule(aten.permute.default, lambda parts: [replace(p, dims=None) for p in parts])


def test_the_rule_as_it_is_holds() -> None:
    assert holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, holds)
