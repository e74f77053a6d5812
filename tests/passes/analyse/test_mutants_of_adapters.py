"""Mutants of what an adapter is: of trained layers beside a frozen one nothing is told."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from peft_fx.passes.analyse import refusals, regions, sums
from tests.passes.mutation import K, Mutants
from tests.support import joint


class Layers(nn.Module):
    """A trained layer beside a frozen one, one behind it, and one that joins it through a ReLU; a LoRA of it."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(K, 2 * K), requires_grad=False)
        shapes = {"beside": (K, 2 * K), "behind": (2 * K, 5), "other": (K, K), "joins": (K, 2 * K), "A": (K, 3)}
        for name, sizes in (shapes | {"B": (3, 2 * K)}).items():
            setattr(self, name, nn.Parameter(torch.randn(*sizes)))

    def forward(self, x: torch.Tensor) -> Any:
        y = (x @ self.W + x @ self.beside).relu()
        z = x @ self.W + torch.relu(x @ self.other) @ self.joins
        return y, z.relu(), (x @ self.W) @ self.behind, (x @ self.W + x @ self.A @ self.B).relu()


@cache
def layers_captured() -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Layers(), torch.randn(9, K, requires_grad=True))


def nothing_but_the_adapter() -> bool:
    outcome = layers_captured().rewritten(form="weight")[1]
    return [(s.rank, s.method) for s in outcome.sites] == [(3, "low-rank")] and not outcome.refusals


MUTANTS = Mutants(
    any_size_is_added=lambda: patch.object(sums.adapters, "adds", lambda *args: True),
    nothing_is_added=lambda: patch.object(sums.adapters, "adds", lambda *args: False),
    any_layer_is_refused=lambda: patch.object(refusals.sums, "stands_beside", lambda *args: True),
    any_layer_transforms=lambda: patch.object(regions, "_is_a_layer", lambda *args: False),
)


def test_the_definition_of_an_adapter_as_it_is_holds() -> None:
    assert nothing_but_the_adapter()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_definition_of_an_adapter_breaks_it(name: str) -> None:
    layers_captured()
    with MUTANTS.applied(name):
        assert not nothing_but_the_adapter(), f"the mutant {name} lives"
