"""The adapters' own gradients: without copies of activations, and layers that read one x in one pass over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from peft_fx.passes.graph.nodes import aten, value
from tests.support import joint
from tests.support.oracle import PAIR, gate, weight_form
from tests.support.spellings import K, N, frozen, trained

T, R = 80, 4
BF16, FP32 = torch.bfloat16, torch.float32


class Siblings(nn.Module):
    """Layers that read one x, as q, k and v do: bf16 base, fp32 adapters, PEFT's casts; `g` scales each feature."""

    def __init__(self, layers: int, vector: bool = False):
        super().__init__()
        bases = (frozen(K, N).to(BF16) for _ in range(layers))
        self.W = nn.ParameterList(nn.Parameter(W, requires_grad=False) for W in bases)
        self.A = nn.ParameterList(trained(K, R) for _ in range(layers))
        self.B = nn.ParameterList(trained(R, N, gain=0.5) for _ in range(layers))
        self.g = nn.Parameter(torch.rand(N) + 0.5, requires_grad=False) if vector else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._layer(x, *factors) for factors in zip(self.W, self.A, self.B, strict=True))

    def _layer(self, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        delta = (x.to(A.dtype) @ A) @ B
        delta = delta if self.g is None else delta * self.g
        return (x @ W + delta).to(x.dtype)


def inputs() -> tuple[Tensor]:
    torch.manual_seed(1)
    return (torch.randn(T, K, dtype=BF16, requires_grad=True),)


def reading(graph: Graph, size: tuple[int, int]) -> list[Node]:
    """Products, apart from what a rounded one lacks, that read a tensor of so many rows and columns, or transposed."""
    products = graph.find_nodes(op="call_function", target=aten.mm.default)
    sizes = (size, size[::-1])
    return [n for n in products if any(tuple(value(a).shape) in sizes for a in n.all_input_nodes)]


@pytest.mark.parametrize("layers", [1, 3])
def test_siblings_share_one_pass_over_x(layers: int) -> None:
    """x·W' of each layer; then x·A of all in one product, and dA of all in one."""
    graph, _ = joint.capture(Siblings(layers), *inputs()).rewritten(form="weight")
    assert len(reading(graph, (T, K))) == layers + 2


def test_a_vectors_gradient_and_dB_share_a_product() -> None:
    """Of the tensors of dy's size: dy·W'ᵀ, dy·Bᵀ, and (x·A)ᵀ·dy, which both gradients are made of."""
    module = Siblings(1, vector=True)
    module.g.requires_grad_(True)
    graph, _ = joint.capture(module, *inputs()).rewritten(form="weight")
    assert len(reading(graph, (T, N))) == 3


@pytest.mark.parametrize("vector", [False, True])
def test_no_copy_of_an_activation_is_read(vector: bool) -> None:
    """No product of backward reads a [T,K] or [T,N] tensor in fp32, a factor of each feature between or not."""
    graph, _ = joint.capture(Siblings(2, vector), *inputs()).rewritten(form="weight")
    assert reading(graph, (T, K))
    assert reading(graph, (T, N))
    for node in (*reading(graph, (T, K)), *reading(graph, (T, N))):
        assert {value(a).dtype for a in node.all_input_nodes} == {BF16}, node.format_node()


@pytest.mark.parametrize("vector", [False, True])
def test_where_half_precision_is_slow_a_copy_is_read(vector: bool) -> None:
    """No product in bf16 besides those of the layers themselves; and of what forward leaves, nothing is a copy."""
    captured = joint.capture(Siblings(2, vector), *inputs())
    graph, _ = captured.rewritten(form="weight", machine="avx2")
    products = graph.find_nodes(op="call_function", target=aten.mm.default)
    base = [n for n in products if BF16 in {value(a).dtype for a in n.all_input_nodes}]
    assert len(base) == 4
    assert not graph.find_nodes(op="call_function", target=aten.addmm.default)
    (kept,) = captured.split(graph)[0].graph.find_nodes(op="output")
    assert not [n for n in kept.args[0] if isinstance(n, Node) and (value(n).dtype, value(n).numel()) == (FP32, T * K)]
    assert joint.equal(captured.run(graph), captured.run(captured.rewritten(form="weight", numerics="strict")[0]))


@pytest.mark.parametrize("vector", [False, True])
def test_gradients_are_no_worse(vector: bool) -> None:
    """Shared or not, the pair of halves is within the gate."""
    module = Siblings(3, vector)
    gate(weight_form(module), module, inputs(), resolution=PAIR)
