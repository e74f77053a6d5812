"""The adapters' own gradients: without scaled copies of activations."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from peft_fx.passes.graph.nodes import aten, is_number, value
from peft_fx.passes.keep import scaled_reads
from tests.support import joint
from tests.support.oracle import assert_bit_equal, gate, integers, run, to_dtype, weight_form
from tests.support.spellings import Lora, scale_right, x

T = 640  # so many that a pass over [T,N] takes longer than two over narrow results
FORMS = pytest.mark.parametrize("form", ["weight", "activation"])


def scaled(graph: Graph) -> list[tuple[int, ...]]:
    """The shapes of what numbers are multiplied to behind forward."""
    backward = {n for t in graph.find_nodes(op="placeholder") if "tangents" in t.name for n in following(t)}
    products = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    return [tuple(value(n).shape) for n in products if n in backward and is_number(n.args[1])]


def following(node: Node) -> set[Node]:
    return {node}.union(*(following(user) for user in node.users))


def rewritten(module: nn.Module, dtype: torch.dtype = torch.float32, T: int = T, **options: str) -> Graph:
    return joint.capture(module.to(dtype), *to_dtype(x(T, 96)(), dtype)).rewritten(**options)[0]


@FORMS
def test_a_number_multiplies_what_is_small(form: str) -> None:
    """dB [r,N] and dz [T,r], and no [T,N]."""
    assert sorted(scaled(rewritten(Lora(scale_right), form=form))) == [(4, 64), (640, 4)]


@FORMS
def test_integers_are_exact(form: str) -> None:
    module = integers(Lora(scale_right, s=3.0).double(), 1)
    inputs = integers(to_dtype(x(T, 96)(), torch.float64), 2)
    f = weight_form(module, **{"peft_fx.form": form})
    want = run(module, module, inputs)
    assert_bit_equal(run(f, module, inputs), want)
    real = scaled_reads._unscale
    torch._dynamo.reset()
    f = weight_form(module, **{"peft_fx.form": form})
    with patch.object(scaled_reads, "_unscale", lambda build, product, copy, number: real(build, product, copy, 1.0)):
        wrong = run(f, module, inputs)
    with pytest.raises(AssertionError, match="gradient"):
        assert_bit_equal(wrong, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_no_worse(dtype: torch.dtype) -> None:
    module = Lora(scale_right, s=0.3).to(dtype)
    gate(weight_form(module), module, to_dtype(x(T, 96)(), dtype))


class AlsoRead(Lora):
    """The scaled tensor is a result of its own, as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        delta = (x @ self.A) @ self.B
        return x @ self.W + (delta + self.b) * self.s, delta

    def __init__(self) -> None:
        super().__init__(scale_right)
        self.b = nn.Parameter(torch.randn(64))


class CutOut(Lora):
    """One of two sequences that are one from here on (text beside pixels): the gradient is rows of a longer one."""

    def __init__(self) -> None:
        super().__init__(scale_right)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.reshape(2, -1, 96)
        return torch.cat([x[:, :2, :64], super().forward(x)], dim=1)


LEFT = {
    "rows of a longer sequence": lambda: rewritten(CutOut()),
    "few tokens": lambda: rewritten(Lora(scale_right), T=34),
    "a GPU launches two kernels in the time": lambda: rewritten(Lora(scale_right), machine="h100"),
    "float16": lambda: rewritten(Lora(scale_right), torch.float16),
    "strict": lambda: rewritten(Lora(scale_right), numerics="strict"),
    "read by a sum": lambda: rewritten(AlsoRead()),
}


@pytest.mark.parametrize("graph", LEFT.values(), ids=LEFT)
def test_what_is_left_as_it_is(graph) -> None:
    assert any(64 in shape and 4 not in shape for shape in scaled(graph()))
