"""Mutants of the rule of adapters finer than their base: these are merged where the result is rounded anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.fx import Node

from peft_fx.passes.analyse import regions, sums
from peft_fx.passes.graph.nodes import is_rounded
from tests.passes.mutation import K, Mutants
from tests.support import joint

MUTANTS = Mutants()


class Finer(nn.Module):
    """A base in bf16, adapters in fp32 of numbers that W' has no bits for, and a reader that rounds beside one that
    does not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("V", "W"):
            setattr(self, name, nn.Parameter(torch.randn(K, K, dtype=torch.bfloat16), requires_grad=False))
        for name, sizes in {"A": (K, 3), "B": (3, K), "scale": (K,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(*sizes)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x @ self.W + x.float() @ self.A @ self.B * 256
        return y, y.to(x.dtype), (x @ self.V) * (self.scale * 257)


@cache
def finer_captured() -> joint.Joint:
    return joint.capture(Finer(), torch.randn(40, K, dtype=torch.bfloat16))


def finer_holds() -> bool:
    """The integer oracle."""
    case = finer_captured()
    graph, _ = case.rewritten(form="weight")
    return joint.equal(case.run(case.graph), case.run(graph))


@contextmanager
def _is_rounded(rule: Callable[..., bool], *modules: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "is_rounded", rule))
        yield


@MUTANTS.add
def everything_taken_for_rounded() -> Any:
    return _is_rounded(lambda *asked: True, sums, regions)


@MUTANTS.add
def every_region_taken_for_rounded() -> Any:
    return _is_rounded(lambda *asked: True, regions)


@MUTANTS.add
def one_reader_that_rounds_taken_for_all() -> Any:
    def rule(node: Node, dtype: torch.dtype, among: Any) -> bool:
        return any(is_rounded(n, dtype, among) for n in (node, *node.users) if n.op != "output")

    return _is_rounded(rule, sums, regions)


def test_the_rule_of_finer_adapters_as_it_is_holds() -> None:
    assert [r.code for r in finer_captured().rewritten()[1].refusals] == ["dtype", "dtype"]
    assert finer_holds()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_rule_of_finer_adapters_breaks_it(name: str) -> None:
    finer_captured()
    with MUTANTS.applied(name):
        assert not finer_holds(), f"the mutant {name} lives"
