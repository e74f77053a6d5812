"""A vector that every addend of a sum carries is taken out of it; one that only some carry stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from peft_fx.passes.findings import Settings
from peft_fx.passes.graph.nodes import PRODUCTS, aten
from peft_fx.passes.normalise import common_vector, vector_sums
from tests.support import joint
from tests.support.spellings import K, N, frozen, trained

T, R = 200, 4
Spell = Callable[[Any, Tensor], Tensor]


class Layer(nn.Module):
    """A layer with a low-rank adapter and a trained vector, spelt by a function; then what `after` does to it."""

    def __init__(self, spell: Spell, after: Callable[[Tensor], Tensor] = lambda y: y):
        super().__init__()
        self.W, self.A, self.B = frozen(K, N), trained(K, R), trained(R, N)
        self.b = nn.Parameter(torch.randn(N), requires_grad=False)
        self.g, self.h = (nn.Parameter(torch.randn(N)) for _ in range(2))
        self.spell, self.after = spell, after

    def base(self, x: Tensor) -> Tensor:
        return x @ self.W + self.b

    def low(self, x: Tensor) -> Tensor:
        return (x @ self.A) @ self.B

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.spell(self, x))


def correction(m: Any, x: Tensor) -> Tensor:
    """DoRA as PEFT writes it."""
    y = m.base(x)
    return y + (m.g - 1) * (y - m.b) + m.g * m.low(x) * 2


def factor_plus_one(m: Any, x: Tensor) -> Tensor:
    y = x @ m.W
    return (m.g + 1) * y - y + (m.low(x) * 2) * m.g


def subtracted(m: Any, x: Tensor) -> Tensor:
    """The vector scales one value, which the adapter is inside of."""
    y = x @ m.W
    return torch.sub(y, y, alpha=3) + 2 * y + m.g * (y - m.low(x))


TAKEN_OUT = [correction, factor_plus_one]


def some_without(m: Any, x: Tensor) -> Tensor:
    y = m.base(x)
    return y + m.g * y + m.g * m.low(x)


def two_vectors(m: Any, x: Tensor) -> Tensor:
    y = m.base(x)
    return y + (m.g - 1) * m.low(x) + m.h * y


def squared(m: Any, x: Tensor) -> Tensor:
    y = x @ m.W
    return m.g * (m.g * y) + m.g * y + m.g * m.low(x)


def of_the_tokens(m: Any, x: Tensor) -> Tensor:
    y, s = x @ m.W, x[:, :N]
    return y + (s - 1) * y + s * m.low(x)


def once_less(m: Any, x: Tensor) -> Tensor:
    y = m.base(x)
    return m.g * y + (m.g - 1) * y + m.g * m.low(x)


LEFT = [some_without, two_vectors, squared, of_the_tokens, once_less, subtracted]


def captured(spell: Spell, after: Callable[[Tensor], Tensor] = lambda y: y) -> joint.Joint:
    torch.manual_seed(0)
    x = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    return joint.capture(Layer(spell, after).double(), x)


def only_factored(case: joint.Joint) -> tuple[Graph, list[Node]]:
    """A copy of the graph after this pass alone, and the nodes that it added."""
    opened = case.opened()
    before = set(opened.graph.nodes)
    common_vector.common_vector(opened, Settings())
    opened.graph.lint()
    return opened.graph, [n for n in opened.graph.nodes if n not in before]


@pytest.mark.parametrize("spell", TAKEN_OUT)
def test_one_vector_is_taken_out(spell: Spell) -> None:
    """y is one product with g, dy another, dg a sum over tokens of one value; the numbers are the same to the bit."""
    case = captured(spell)
    graph, added = only_factored(case)
    wide = [n for n in added if n.target is aten.mul.Tensor and n.meta["val"].shape == (T, N)]
    vectors = [a for n in wide for a in n.args if isinstance(a, Node) and a.meta["val"].shape[-1:] == (N,)]
    assert sum(a.meta["val"].numel() == N for a in vectors) == 2
    assert sum(n.target is aten.sum.dim_IntList and n.meta["val"].numel() == N for n in graph.nodes) == 1
    assert joint.equal(case.run(case.graph), case.run(graph))


@pytest.mark.parametrize("spell", LEFT)
def test_what_has_no_common_vector_is_left(spell: Spell) -> None:
    case = captured(spell)
    graph, added = only_factored(case)
    assert added == []
    assert joint.equal(case.run(case.graph), case.run(graph))


@pytest.mark.parametrize("spell", [*TAKEN_OUT, *LEFT])
def test_all_passes_agree(spell: Spell) -> None:
    case = captured(spell)
    graph, _ = case.rewritten(form="weight")
    assert joint.equal(case.run(case.graph), case.run(graph))


def test_a_vectors_gradient_reads_what_is_kept() -> None:
    """Where the frozen model keeps y, dg costs no product; where it does not, one, and nothing is kept for it."""

    def products(after: Callable[[Tensor], Tensor]) -> int:
        graph, outcome = captured(correction, after).rewritten(form="weight")
        assert [(s.forward, s.input_grad) for s in outcome.sites] == [("weight", "weight")]
        wide = [n for n in graph.nodes if n.target in PRODUCTS and R not in _sides(n) and T in _sides(n)]
        return len(wide)

    assert products(torch.sin) == 2  # y and dx
    assert products(lambda y: y) == 3  # and xᵀ·dy


def _sides(product: Node) -> set[int]:
    return {int(n) for a in product.args[-2:] if isinstance(a, Node) for n in a.meta["val"].shape}


def _number_lost() -> Any:
    real = common_vector.Factoring.coefficient

    def coefficient(self: Any, by: Any, x: Any) -> Any:
        found = real(self, by, x)
        return found and (replace(found, number=0.0) if found.slope else found)

    return patch.object(common_vector.Factoring, "coefficient", coefficient)


def _slope_lost() -> Any:
    real = vector_sums.Coefficient.__mul__

    def times(self: Any, other: Any) -> Any:
        found = real(self, other)
        return found and (replace(found, slope=1.0) if found.slope else found)

    return patch.object(vector_sums.Coefficient, "__mul__", times)


def _sign_lost() -> Any:
    def added(self: Any, node: Node) -> Any:
        return self.operand(node.args[0]) + self.operand(node.args[1])

    return patch.object(common_vector.Factoring, "_sum", added)


def _constant_lost() -> Any:
    real = common_vector.Factoring._write
    return patch.object(
        common_vector.Factoring, "_write", lambda self, node, v, parts, _: real(self, node, v, parts, {})
    )


def _contraction_of_one_side() -> Any:
    real = common_vector.Factoring._contract

    def contract(self: Any, node: Node) -> None:
        a, b = (common_vector._unshaped(n) for n in node.args[:2])
        if self._contraction(a) and self._contraction(b):
            self._replace(node, a)
        else:
            real(self, node)

    return patch.object(common_vector.Factoring, "_contract", contract)


@pytest.mark.parametrize("mutant", [_number_lost, _slope_lost, _sign_lost, _constant_lost, _contraction_of_one_side])
def test_a_broken_rule_is_seen(mutant: Callable[[], Any]) -> None:
    def holds(spell: Spell) -> bool:
        case = captured(spell)
        try:
            return joint.equal(case.run(case.graph), case.run(only_factored(case)[0]))
        except Exception:
            return False

    with mutant():
        assert not all(map(holds, [*TAKEN_OUT, *LEFT]))
