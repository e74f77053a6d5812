"""Products with an identity matrix are their other operand; a matrix that only looks like one is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from peft_fx.passes.graph.nodes import PRODUCTS, aten
from peft_fx.passes.normalise.identities import one_hot_sums
from tests.support import joint, losses
from tests.support.losses import LOSSES, Head, V
from tests.support.spellings import K, N, frozen, trained

T, R = 80, 4


class Normed(nn.Module):
    """`(x·W + (x·A)·B) / ‖W + M·A·B‖`, the norm of each column and without a gradient, as DoRA has it; M is made by a
    function of K."""

    def __init__(self, make: Callable[[int], Tensor]):
        super().__init__()
        self.W, self.A, self.B, self.make = frozen(K, N), trained(K, R), trained(R, N), make

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.W + self.make(K).to(self.A.dtype) @ self.A @ self.B).norm(dim=0).detach()
        return (x @ self.W + (x @ self.A) @ self.B) / norm


def products(make: Callable[[int], Tensor]) -> list[tuple[int, int]]:
    """The sizes of what is computed, of the products that read a matrix of K rows and columns."""
    x = torch.randn(T, K, requires_grad=True)
    graph, _ = joint.capture(Normed(make), x).rewritten(form="weight")
    made = [n for n in graph.nodes if n.target in PRODUCTS]
    return [tuple(n.meta["val"].shape) for n in made if (K, K) in [tuple(a.meta["val"].shape) for a in n.args]]


def test_an_identity_is_not_multiplied():
    assert products(torch.eye) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda k: (torch.arange(k)[:, None] == torch.arange(1, k + 1)).float(),
        lambda k: (torch.arange(k)[:, None] == 2 * torch.arange(k)).float(),
        lambda k: (torch.arange(k)[:, None] != torch.arange(k)).float(),
        lambda k: 2 * torch.eye(k),
        lambda k: (torch.arange(k) == torch.arange(k)).float().expand(k, k),
    ],
)
def test_what_is_no_identity_is_multiplied(make: Callable[[int], Tensor]):
    assert products(make)


@pytest.mark.parametrize("make", [torch.eye, lambda k: torch.eye(k).T])
def test_the_result_is_the_same(make: Callable[[int], Tensor]):
    captured = joint.capture(Normed(make).double(), torch.randn(T, K, dtype=torch.float64, requires_grad=True))
    graph, _ = captured.rewritten(form="activation")
    for got, want in zip(captured.run(graph), captured.run(captured.graph), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["mean", "scaled", "capped"])
def test_a_row_of_one_number_is_not_summed_up(name: str):
    """Bit-equal, and one sum over the vocabulary less."""

    def sums(graph: Graph) -> int:
        found = graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
        return sum(n.args[0].meta["val"].shape[-1] == V for n in found)

    captured = joint.capture(Head(LOSSES[name]).double(), *losses.inputs())
    opened = captured.opened()
    one_hot_sums(opened)
    graph = opened.graph
    assert sums(graph) == sums(captured.graph) - 1
    for a, b in zip(captured.run_on_given(captured.graph, 1.5), captured.run_on_given(graph, 1.5), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
