"""Mutants of W' and the constant of an affine map: each op done once more, on matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from torch.fx import Node

from peft_fx.passes.graph.nodes import aten, numel, shape
from peft_fx.passes.rewrite import materialise
from tests.passes.mutation import Mutants, affine_holds

MUTANTS = Mutants()


def _again(op: Any, change: Callable[[materialise.Materialise, Node, dict[Node, Node], int], Any]) -> Any:
    """The replay of one op, done another way."""
    real = materialise.Materialise._call

    def call(self: materialise.Materialise, node: Node, operands: dict[Node, Node], count: int) -> Any:
        return (change if node.target is op else real)(self, node, operands, count)

    return patch.object(materialise.Materialise, "_call", call)


def _product(change: Callable[[materialise.Materialise, Node, materialise.Value], Any]) -> Any:
    real = materialise.Materialise._product
    return patch.object(materialise.Materialise, "_product", lambda self, node: change(self, node, real(self, node)))


@MUTANTS.add
def constant_dropped() -> Any:
    real = materialise.Materialise.matrix
    return patch.object(materialise.Materialise, "matrix", lambda self, node: (real(self, node)[0], None))


@MUTANTS.add
def constant_of_a_product_left_unmultiplied() -> Any:
    """`(x+1)·W` as `x·W + 1`."""

    def change(self: materialise.Materialise, node: Node, found: materialise.Value) -> materialise.Value:
        (before,) = (self.values[n].constant for n in self.rows.operands(node)[-1:])
        if before is None or numel(shape(before)) != numel(shape(found.constant)):
            return found
        return replace(found, constant=self.edit.call(aten.reshape.default, before, shape(found.constant)))

    return _product(change)


@MUTANTS.add
def bias_of_a_product_lost() -> Any:
    return _product(lambda self, node, found: replace(found, constant=None) if len(node.args) == 3 else found)


@MUTANTS.add
def diagonal_on_the_wrong_side() -> Any:
    """`W·d` for `d·W`."""

    def change(self: materialise.Materialise, node: Node, found: materialise.Value) -> materialise.Value:
        rows = found.rows
        if rows.target is not aten.mul.Tensor or len(set(shape(rows))) > 1:  # type: ignore
            return found
        return replace(found, rows=self.edit.call(rows.target, rows.args[0], rows.args[1].args[0]))  # type: ignore

    return _product(change)


@MUTANTS.add
def vector_before_the_product_ignored() -> Any:
    real = materialise.Materialise._diagonal
    return patch.object(
        materialise.Materialise, "_diagonal", lambda self, node, found: real(self, node, found) and found.rows
    )


@MUTANTS.add
def difference_taken_for_a_sum() -> Any:
    sub, add = aten.sub.Tensor, aten.add.Tensor
    return _again(sub, lambda self, node, operands, count: self.edit.call(add, *(operands[n] for n in node.args)))


@MUTANTS.add
def subtracted_rows_keep_their_sign() -> Any:
    real = materialise.Materialise._sum

    def sum_(self: materialise.Materialise, node: Node) -> materialise.Value:
        found = real(self, node)
        a, b = node.args[:2]
        return replace(found, rows=self.values[b].rows) if self.rows.flow.is_weight(a) else found  # type: ignore

    return patch.object(materialise.Materialise, "_sum", sum_)


def _skipped(op: Any) -> Any:
    return _again(op, lambda self, node, operands, count: operands[node.args[0]])  # type: ignore[index]


@MUTANTS.add
def negation_of_features_ignored() -> Any:
    return _skipped(aten.neg.default)


@MUTANTS.add
def order_of_dimensions_ignored() -> Any:
    def change(self: materialise.Materialise, node: Node, operands: dict[Node, Node], count: int) -> Any:
        sizes = self._sizes(self.rows.of[node].dims, count)
        return self.edit.call(aten.reshape.default, operands[node.args[0]], sizes)  # type: ignore[index]

    return _again(aten.permute.default, change)


@MUTANTS.add
def order_of_features_ignored() -> Any:
    return _skipped(aten.index.Tensor)


@MUTANTS.add
def joined_in_the_wrong_order() -> Any:
    def change(self: materialise.Materialise, node: Node, operands: dict[Node, Node], count: int) -> Any:
        parts = [operands[n] for n in reversed(node.args[0])]  # type: ignore[union-attr, arg-type, index]
        return self.edit.call(node.target, parts, *node.args[1:])

    return _again(aten.cat.default, change)


@MUTANTS.add
def columns_of_a_diagonal_ignored() -> Any:
    """`I[:, a:b]·M` is put at the first rows."""
    real = materialise.Materialise._diagonal

    def diagonal(self: materialise.Materialise, node: Node, found: materialise.Value) -> materialise.Diagonal | None:
        held = real(self, node, found)
        return held and replace(held, columns=(0, held.width))

    return patch.object(materialise.Materialise, "_diagonal", diagonal)


def test_the_affine_rules_as_they_are_hold() -> None:
    assert affine_holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_an_affine_mutant_turns_the_oracle_red(name: str) -> None:
    MUTANTS.assert_red(name, affine_holds)
