"""Inductor's own passes over matrix products, switched on, neither undo the rewrite nor are they put off by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import peft_fx
from peft_fx import compat
from peft_fx.passes.graph.nodes import PRODUCTS
from tests.support.oracle import assert_bit_equal, integers, run
from tests.support.spellings import K, N, frozen, trained

T, R = 144, 4
SWITCHED_ON = {
    "b2b_gemm_pass": True,
    "shape_padding": True,
    "force_shape_pad": True,
    "coordinate_descent_tuning": True,
    "post_grad_fusion_options": {"decompose_mm_pass": {}},
}


class TwoChains(nn.Module):
    """Two layers on one input, each with a low-rank chain beside it: what mm_plus_mm and b2b_gemm look for."""

    def __init__(self) -> None:
        super().__init__()
        self.V, self.W = frozen(K, N), frozen(K, N)
        self.A, self.B, self.C, self.D = trained(K, R), trained(R, N), trained(K, R), trained(R, N)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.V + (x @ self.A) @ self.B) + (x @ self.W + ((x @ self.C) @ self.D) * 2)


class Counting(compat.CustomGraphPass):  # type: ignore[misc]
    """Runs last: the products over all tokens in each graph that Inductor lowers."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, graph: Graph) -> None:
        products = [n for n in graph.nodes if n.target in PRODUCTS]
        self.counts.append(sum(T in n.meta["val"].shape for n in products))

    def uuid(self) -> Any:
        return None


@pytest.mark.slow
def test_low_rank_chains_beside_inductors_passes() -> None:
    """y in two products, dx in two more, where each adapter would add its own; and the bits of eager mode."""
    module, x = TwoChains().double(), torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    integers(module, 1), integers((x,), 2)
    counting = Counting()
    options = {"peft_fx.form": "weight", **SWITCHED_ON, "post_grad_custom_post_pass": counting}
    f = torch.compile(module, backend=peft_fx.backend, options=options)
    assert_bit_equal(run(f, module, (x,)), run(module, module, (x,)))
    assert [(s.forward, s.input_grad) for s in peft_fx.explain(f).sites] == [("weight", "weight")] * 2
    forward, backward = counting.counts
    assert forward == 2
    # dx of each layer, and of each adapter x·A and dy·Bᵀ
    assert backward == 2 + 2 * 2
