"""Mutants of the sums that read W': how it is built, and what stays beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from peft_fx.passes.analyse.algebra import Matrix, Scale
from peft_fx.passes.analyse.candidates import SumCandidate
from peft_fx.passes.graph.nodes import aten
from peft_fx.passes.rewrite import merge_sums
from tests.passes.mutation import Mutants, holds

MUTANTS = Mutants()


@MUTANTS.add
def factors_in_the_wrong_order() -> Any:
    real = merge_sums.Rewriter._multiply
    return patch.object(merge_sums.Rewriter, "_multiply", lambda self, fs: self.edit.flip(real(self, fs)))


@MUTANTS.add
def weight_left_out() -> Any:
    real = merge_sums.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, Scale(0.0), terms, dtype)

    return patch.object(merge_sums.Rewriter, "_merge", merge)


@MUTANTS.add
def scale_on_the_weight_too() -> Any:
    real = merge_sums.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, terms[0][0], terms, dtype)

    return patch.object(merge_sums.Rewriter, "_merge", merge)


@MUTANTS.add
def one_adapter_of_two_forgotten() -> Any:
    real = merge_sums.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, inner, terms[:1], dtype)

    return patch.object(merge_sums.Rewriter, "_merge", merge)


@MUTANTS.add
def plain_weight_in_the_input_gradient() -> Any:
    real = merge_sums.Rewriter._merged_operand

    def operand(self: Any, group: SumCandidate) -> Any:
        return group.operand if group.backward else real(self, group)

    return patch.object(merge_sums.Rewriter, "_merged_operand", operand)


@MUTANTS.add
def merged_weight_untransposed() -> Any:
    real = merge_sums.Rewriter._as_operand

    def operand(self: Any, merged: Any, weight: Matrix, node: Any) -> Any:
        return real(self, merged, replace(weight, flipped=False), node)

    return patch.object(merge_sums.Rewriter, "_as_operand", operand)


@MUTANTS.add
def one_merged_weight_for_all() -> Any:
    real = merge_sums.Rewriter._merged_operand

    def operand(self: Any, group: SumCandidate) -> Any:
        return self.__dict__.setdefault("first", real(self, group))

    return patch.object(merge_sums.Rewriter, "_merged_operand", operand)


@MUTANTS.add
def bias_lost() -> Any:
    real = merge_sums.Rewriter._base

    def base(self: Any, node: Any, merged: Any, left: bool, bias_gone: bool, copies: Any) -> Any:
        return real(self, node, merged, left, node.target in merge_sums.PLAIN, copies)

    return patch.object(merge_sums.Rewriter, "_base", base)


@MUTANTS.add
def other_addend_lost() -> Any:
    real = merge_sums.Rewriter._without

    def without(self: Any, node: Any, i: int, copies: Any) -> Any:
        return self.edit.call(aten.mul.Tensor, real(self, node, i, copies), 0)

    return patch.object(merge_sums.Rewriter, "_without", without)


@MUTANTS.add
def adapter_kept_beside_the_merged_weight() -> Any:
    def without(self: Any, node: Any, i: int, copies: Any) -> Any:
        return self.edit.call(node.target, *(copies.get(a, a) for a in node.args), **node.kwargs)

    return patch.object(merge_sums.Rewriter, "_without", without)


def test_the_rule_as_it_is_holds() -> None:
    assert holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, holds)
