"""W' lies as its product reads it, on a CPU whose products of half precision are loops; elsewhere as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, Node

import peft_fx
from peft_fx.passes.graph.nodes import ORDERED, PRODUCTS, value
from tests.support.joint import equal, trace
from tests.support.spellings import BF16, K, Lora, N, scale_right

T = 128
LOOPS, UNITS = "avx2", "cpu"  # machines without units of bfloat16, and with them


def transposed(x, W, A, B, s):
    return (W.t() @ x.t() + (B.t() @ (A.t() @ x.t())) * s).t()


def vectors(x, W, A, B, s):
    """An affine adapter: the features of both sides scaled."""
    d = A[:, 0].tanh() + 1
    return (x * d) @ W * (1 + B[0]) + (x @ A) @ B * s


spellings = pytest.mark.parametrize("spell", [scale_right, transposed, vectors])


def rows(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(T, K, dtype=dtype, requires_grad=True)


def half(module: torch.nn.Module) -> torch.nn.Module:
    return module.to(BF16)


def summed(graph: Graph) -> list[int]:
    """The stride of the side that each product with a T in it sums over, of its operand that is a W' in order."""
    found = []
    for node in (n for n in graph.nodes if n.target in PRODUCTS):
        a, b = node.args[-2:]
        assert isinstance(a, Node)
        assert isinstance(b, Node)
        found += [value(a).stride(-1)] * (a.target is ORDERED) + [value(b).stride(-2)] * (b.target is ORDERED)
    return found


@spellings
def test_both_directions_sum_over_what_is_contiguous(spell) -> None:
    joint = trace(half(Lora(spell)), rows(BF16))
    graph, outcome = joint.rewritten(machine=LOOPS, form="weight")
    assert [(s.forward, s.input_grad) for s in outcome.sites] == [("weight", "weight")]
    assert summed(graph) == [1, 1]


@pytest.mark.parametrize(("machine", "dtype"), [(UNITS, BF16), ("h100", BF16), (LOOPS, torch.float32)])
def test_elsewhere_it_lies_as_it_comes(machine: str, dtype: torch.dtype) -> None:
    joint = trace(Lora(scale_right).to(dtype), rows(dtype))
    graph, outcome = joint.rewritten(machine=machine, form="weight")
    assert [(s.forward, s.input_grad) for s in outcome.sites] == [("weight", "weight")]
    assert not graph.find_nodes(op="call_function", target=ORDERED)


@spellings
def test_nothing_else_changes(spell) -> None:
    """The same numbers, and nothing more kept for backward."""
    joint = trace(half(Lora(spell)), rows(BF16))
    one, other = (joint.rewritten(machine=m, form="weight", adapter_grad="low_rank")[0] for m in (LOOPS, UNITS))
    assert equal(joint.run(one), joint.run(other))
    kept = [{n.name for n in joint.split(graph)[1].graph.find_nodes(op="placeholder")} for graph in (one, other)]
    assert kept[0] == kept[1]


def test_inductor_computes_it_in_that_order() -> None:
    module, x = half(Lora(scale_right)), rows(BF16)
    f = torch.compile(module, backend="peft_fx", options={"peft_fx.machine": LOOPS, "peft_fx.form": "weight"})
    _, codes = run_and_get_code(lambda: f(x).sum().backward())
    made = {shape for code in codes for shape in re.findall(r"empty_strided_cpu\((.*?), torch.bfloat16", code)}
    assert {f"({K}, {N}), (1, {K})", f"({N}, {K}), (1, {N})"} <= made
    assert not {f"({K}, {N}), ({N}, 1)", f"({N}, {K}), ({K}, 1)"} & made
    assert [(s.forward, s.input_grad) for s in peft_fx.explain(f).sites] == [("weight", "weight")]
