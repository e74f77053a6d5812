"""Mutants of a loss in chunks: the loop over them, and what is known of the rows of each op in it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.fx import Node

from peft_fx.passes.graph.nodes import aten
from peft_fx.passes.loss import chunking, loop, row_rules
from tests.passes.mutation import Mutants
from tests.support import joint, losses

MUTANTS = Mutants()


@cache
def loss_captured() -> joint.Joint:
    """Half of what a rule can get wrong: a trained head with a bias, weights of classes, rows that are ignored."""
    torch.manual_seed(0)
    module = losses.Head(losses.LOSSES["weighted_and_smoothed"], train=True, bias=True).double()
    return joint.capture(module, *losses.inputs())


def loss_holds() -> bool:
    """Loss and gradients those of the whole graph, at a tangent that is not 1, in three chunks of unequal sizes."""
    case = loss_captured()
    with (
        patch.object(chunking, "LEAST", -(1 << 40)),
        patch.object(chunking, "chunks", lambda *sizes: 5),
    ):
        try:
            graph, outcome = case.rewritten()
            pairs = zip(case.run_on_given(case.graph, 1.5), case.run_on_given(graph, 1.5), strict=True)
            return bool(outcome.losses) and all(
                (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-14))
                for a, b in pairs
            )
        except Exception:
            return False


def test_a_loss_in_chunks_holds() -> None:
    assert loss_holds()


def _treated(op: Any, change: Callable[[Node, Any], Any]) -> Any:
    """The rule of one op, with its answer changed."""
    real = row_rules.ROWS[op]
    return patch.dict(row_rules.ROWS, {op: lambda node, row: change(node, real(node, row))})


@MUTANTS.add
def tangent_forgotten() -> Any:
    return patch.object(
        loop.Rewriter, "_scaled", lambda self, node, result: self.edit.cast(result, node.meta["val"].dtype)
    )


@MUTANTS.add
def tangent_on_the_loss_too() -> Any:
    real = loop.Rewriter._scaled

    def scaled(self: Any, node: Node, result: Node) -> Node:
        with patch.object(self.flow, "backward", {*self.flow.backward, node}):
            return real(self, node, result)

    return patch.object(loop.Rewriter, "_scaled", scaled)


@MUTANTS.add
def last_chunk_for_all_sums() -> Any:
    real = loop.Rewriter._call

    def call(self: Any, body: Node, operands: list[Node]) -> list[Node]:
        zeros = [n if n.target is not operator.getitem else self._zeros(n) for n in operands]
        return real(self, body, zeros)

    return patch.object(loop.Rewriter, "_call", call)


@MUTANTS.add
def chunks_in_reverse() -> Any:
    real = loop.Rewriter._whole
    return patch.object(loop.Rewriter, "_whole", lambda self, node, parts: real(self, node, parts[::-1]))


@MUTANTS.add
def first_rows_for_all() -> Any:
    real = loop.Rewriter._bounds

    def bounds(self: Any, i: int, count: Any) -> Any:
        *_, size = real(self, i, count)
        return 0, size, size

    return patch.object(loop.Rewriter, "_bounds", bounds)


@MUTANTS.add
def a_sum_over_rows_taken_for_rows() -> Any:
    def change(node: Node, found: Any) -> Any:
        return replace(found, rows=row_rules.RowDims(0, 1)) if found.rows is None else found

    return _treated(aten.mm.default, change)


@MUTANTS.add
def a_weight_taken_for_rows() -> Any:
    def change(node: Node, found: Any) -> Any:
        return replace(found, operands={i: row_rules.RowDims(0, 1) for i in range(len(node.args))})

    return _treated(aten.addmm.default, change)


@MUTANTS.add
def a_bias_summed_along_the_vocabulary() -> Any:
    def change(node: Node, found: Any) -> Any:
        return replace(found, rows=row_rules.RowDims(0, 1)) if found.rows is None else found

    return _treated(aten.sum.dim_IntList, change)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_loop_is_noticed(name: str) -> None:
    with MUTANTS.applied(name):
        assert not loss_holds()
