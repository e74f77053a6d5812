"""Mutants of gradients from moments: which moments there are, and the way from them to each parameter."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.fx import Node

from peft_fx.passes.graph.nodes import aten, shape
from peft_fx.passes.keep import dense_grads
from tests.passes.mutation import K, Mutants
from tests.support import joint

MUTANTS = Mutants()


class Moved(nn.Module):
    """Layers with vectors before and behind and low-rank factors, the second one behind a constant of each feature:
    all gradients from two products over tokens."""

    def __init__(self) -> None:
        super().__init__()
        for i in "12":
            for name, sizes in {"W": (K, K), "A": (K, 3), "B": (3, K), "g": (K,), "c": (K,)}.items():
                setattr(self, name + i, nn.Parameter(torch.randn(*sizes), requires_grad=name not in "Wc"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu((x @ self.W1 + ((x @ self.A1) @ self.B1) * 2) * self.g1)
        h = h + self.c2
        return (h @ self.W2 + (h @ self.A2) @ self.B2) * self.g2 + h


@cache
def moved() -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Moved().double(), torch.randn(40, K, dtype=torch.float64, requires_grad=True))


def moments_hold() -> bool:
    """The integer oracle, where both layers have a dense gradient."""
    case = moved()
    try:
        graph, outcome = case.rewritten(form="weight")
        dense = [s.adapter_grad for s in outcome.sites] == ["dense", "dense"]
        return dense and joint.equal(case.run(case.graph), case.run(graph))
    except Exception:
        return False


def test_moments_as_they_are_hold() -> None:
    assert moments_hold()


@MUTANTS.add
def moment_of_the_other_side() -> Any:
    real = dense_grads._Gradient._over_tokens
    return patch.object(dense_grads._Gradient, "_over_tokens", lambda self, u, dy: self.edit.flip(real(self, u, dy)))


@MUTANTS.add
def way_from_the_moment_not_gone() -> Any:
    def on(self: Any, rows: Node, count: int) -> Node:
        left = self.found.node.args[0] is self.found.other
        sizes = shape(self.found.other)
        return self.edit.call(
            aten.slice.Tensor, self.edit.flip(rows) if left else rows, 0 if left else 1, 0, sizes[0 if left else 1]
        )

    return patch.object(dense_grads._Gradient, "_on", on)


@MUTANTS.add
def constant_beside_the_input_forgotten() -> Any:
    real = dense_grads._Gradient._read
    return patch.object(dense_grads._Gradient, "_read", lambda self: (real(self)[0], None))


@MUTANTS.add
def one_moment_for_all_layers() -> Any:
    real = dense_grads._Gradient._second

    def second(self: Any) -> Node:
        self.made.setdefault(("G", self.found.u, self.found.dy), next(iter(self.made.values()), None) or real(self))
        return real(self)

    return patch.object(dense_grads._Gradient, "_second", second)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_moment_is_noticed(name: str) -> None:
    with MUTANTS.applied(name):
        assert not moments_hold()
