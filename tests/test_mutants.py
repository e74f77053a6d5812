"""Tests of the tests: a rule that is broken on purpose must turn the integer oracle red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from peft_fx.passes import algebra, rewrite, sites, transfer
from peft_fx.passes.algebra import ONE, Matrix, Scale, Term
from tests import joint

K = 24  # square weights, so that a lost transpose still has the right shape


class Adapted(nn.Module):
    """Frozen W with a bias and two adapters, in the spellings that the mutants below break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K).requires_grad_(False)
        self.W2 = nn.Parameter(torch.randn(K, K), requires_grad=False)
        for name, shape in {"A": (K, 3), "B": (3, K), "C": (K, 2), "D": (2, K), "E": (K, 3), "F": (3, K)}.items():
            setattr(self, name, nn.Parameter(torch.randn(*shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x) + ((x @ self.A) @ self.B) * 2 - (x @ self.C) @ self.D
        h = torch.relu(h)
        low = (h @ self.E) @ -self.F
        y = torch.add(torch.addmm(low, h, self.W2, beta=4, alpha=2), (h @ self.C) @ self.D, alpha=2)
        z = (self.W2 @ h.t() + self.F.t() @ (self.E.t() @ h.t())).t()
        return y + torch.relu(z) + torch.relu(z - h)


@cache
def captured() -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Adapted().double(), torch.randn(40, K, dtype=torch.float64, requires_grad=True))


def holds() -> bool:
    """The integer oracle, on y and every gradient; a pass that fails or finds nothing does not hold either."""
    case = captured()
    try:
        graph, outcome = case.rewritten(form="weight")
        weight = sum((s.forward == "weight") + (s.input_grad == "weight") for s in outcome.sites)
        return weight == 6 and not outcome.refusals and joint.equal(case.run(case.graph), case.run(graph))
    except Exception:
        return False


def test_the_rule_as_it_is_holds() -> None:
    assert holds()


Mutation = Callable[[], Any]
MUTANTS: dict[str, Mutation] = {}


def mutant(make: Mutation) -> Mutation:
    MUTANTS[make.__name__] = make
    return make


def _rule(op: Any, change: Callable[[list[Any] | None], Any]) -> Any:
    """The transfer function of one op, with its answer changed."""
    real = transfer.RULES[op]
    return patch.dict(transfer.RULES, {op: lambda node: change(real(node))})


@mutant
def scale_dropped() -> Any:
    return _rule(transfer.aten.mul.Tensor, lambda parts: parts and [replace(p, scale=ONE) for p in parts])


@mutant
def scale_squared() -> Any:
    return _rule(transfer.aten.mul.Tensor, lambda parts: parts and [replace(p, scale=p.scale * p.scale) for p in parts])


@mutant
def alpha_ignored() -> Any:
    return _rule(transfer.aten.add.Tensor, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def subtraction_added() -> Any:
    return _rule(transfer.aten.sub.Tensor, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def negation_ignored() -> Any:
    return _rule(transfer.aten.neg.default, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def beta_ignored() -> Any:
    return _rule(transfer.aten.addmm.default, lambda parts: [replace(p, scale=ONE) for p in parts])


@mutant
def permute_taken_for_a_reshape() -> Any:
    return _rule(transfer.aten.permute.default, lambda parts: [replace(p, dims=None) for p in parts])


@mutant
def factors_in_the_wrong_order() -> Any:
    real = rewrite.Rewriter._multiply
    return patch.object(rewrite.Rewriter, "_multiply", lambda self, fs: self.build.flip(real(self, fs)))


@mutant
def weight_left_out() -> Any:
    real = rewrite.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, Scale(0.0), terms, dtype)

    return patch.object(rewrite.Rewriter, "_merge", merge)


@mutant
def scale_on_the_weight_too() -> Any:
    real = rewrite.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, terms[0][0], terms, dtype)

    return patch.object(rewrite.Rewriter, "_merge", merge)


@mutant
def one_adapter_of_two_forgotten() -> Any:
    real = rewrite.Rewriter._merge

    def merge(self: Any, weight: Matrix, inner: Scale, terms: Any, dtype: Any) -> Any:
        return real(self, weight, inner, terms[:1], dtype)

    return patch.object(rewrite.Rewriter, "_merge", merge)


@mutant
def plain_weight_in_the_input_gradient() -> Any:
    real = rewrite.Rewriter._merged_operand

    def operand(self: Any, group: sites.Group) -> Any:
        return group.operand if group.backward else real(self, group)

    return patch.object(rewrite.Rewriter, "_merged_operand", operand)


@mutant
def merged_weight_untransposed() -> Any:
    real = rewrite.Rewriter._as_operand

    def operand(self: Any, merged: Any, weight: Matrix, node: Any) -> Any:
        return real(self, merged, replace(weight, flipped=False), node)

    return patch.object(rewrite.Rewriter, "_as_operand", operand)


@mutant
def one_merged_weight_for_all() -> Any:
    real = rewrite.Rewriter._merged_operand

    def operand(self: Any, group: sites.Group) -> Any:
        return self.__dict__.setdefault("first", real(self, group))

    return patch.object(rewrite.Rewriter, "_merged_operand", operand)


@mutant
def bias_lost() -> Any:
    real = rewrite.Rewriter._base

    def base(self: Any, node: Any, merged: Any, left: bool, bias_gone: bool, copies: Any) -> Any:
        return real(self, node, merged, left, node.target in rewrite.PLAIN, copies)

    return patch.object(rewrite.Rewriter, "_base", base)


@mutant
def other_addend_lost() -> Any:
    real = rewrite.Rewriter._without

    def without(self: Any, node: Any, i: int, copies: Any) -> Any:
        return self.build.call(transfer.aten.mul.Tensor, real(self, node, i, copies), 0)

    return patch.object(rewrite.Rewriter, "_without", without)


@mutant
def adapter_kept_beside_the_merged_weight() -> Any:
    def without(self: Any, node: Any, i: int, copies: Any) -> Any:
        return self.build.call(node.target, *(copies.get(a, a) for a in node.args), **node.kwargs)

    return patch.object(rewrite.Rewriter, "_without", without)


@mutant
def different_inputs_taken_for_one() -> Any:
    def shares(term: Term, prefix: tuple[Matrix, ...]) -> bool:
        return len(term.factors) > len(prefix) and all(
            f.shape == p.shape for f, p in zip(term.factors, prefix, strict=False)
        )

    return patch.object(sites, "shares_left", shares)


@mutant
def ratio_not_divided() -> Any:
    return patch.object(algebra.Scale, "over", lambda self, other: self)


@contextmanager
def applied(name: str) -> Iterator[None]:
    with MUTANTS[name]():
        yield


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_oracle_red(name: str) -> None:
    assert holds()
    with applied(name):
        assert not holds(), f"the mutant {name} lives"
