"""One graph for many numbers of tokens, three at most, each with the forms that `explain` tells of what it serves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_fx
from peft_fx import compiling
from peft_fx.passes.decide import price, regimes
from peft_fx.passes.decide.regimes import MOST, Regimes, crossovers
from peft_fx.records import records_of
from tests.support.spellings import frozen, trained

LENGTHS = (60, 100, 512, 2000, 4096, 8000)
OPTIONS = {"peft_fx.lowering": "aot_eager", "peft_fx.machine": "cpu"}
Forms = list[tuple[str, str]]


class LoRA(nn.Module):
    def __init__(self, width: int = 256):
        super().__init__()
        self.W = nn.Parameter(frozen(width, width), requires_grad=False)
        self.A, self.B = trained(width, 12), trained(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W + (x @ self.A) @ self.B


class Widening(nn.Module):
    """Layers that cross over at very different lengths, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoRA(width) for width in (64, 512, 1024))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(torch.cat([x] * (layer.W.shape[0] // 64), -1)) for layer in self.layers]


def served(model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Forms], int]:
    """The forms in the graph that served each batch, forward and backward, and how many graphs were compiled."""
    torch._dynamo.reset()
    compiled: list[Callable[..., Any]] = []
    found: list[Forms] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        i, f = len(compiled), compiling.backend(gm, inputs, options=OPTIONS)
        record = records_of(model)[-1]

        def call(*args: Any) -> Any:
            found.append([(s.forward, s.input_grad) for s in record.outcomes[-1].sites])
            return f(*args)

        compiled.append(call)
        return compiled[i]

    f = torch.compile(model, backend=backend, dynamic=True)
    for x in batches:
        y = f(x.requires_grad_())
        torch.autograd.backward(y, [torch.ones_like(t) for t in ([y] if isinstance(y, Tensor) else y)])
    return found, len(compiled)


def said(model: nn.Module, x: Tensor) -> Forms:
    """The forms that `explain` tells of one batch."""
    return [(s.forward, s.input_grad) for s in peft_fx.explain(model, x, options=OPTIONS).sites]


def test_a_layer_has_two_graphs_with_the_forms_that_explain_tells():
    model, batches = LoRA(), [torch.randn(T, 256) for T in LENGTHS]
    found, graphs = served(model, batches)
    assert found == [said(model, x) for x in batches]
    assert len(set(map(tuple, found))) == graphs == 2


def test_batch_and_sequence_may_both_change():
    """The switch is at a number of tokens, whatever it is a product of."""
    model = LoRA()
    batches = [torch.randn(b, n, 256) for b, n in ((2, 30), (3, 20), (5, 11), (40, 100), (100, 40), (3, 2000))]
    found, graphs = served(model, batches)
    assert found == [said(model, x) for x in batches]
    assert graphs == 2


def test_a_model_has_three_graphs():
    """Few tokens and many are served as `explain` tells, those between by one graph."""
    model, batches = Widening(), [torch.randn(T, 64) for T in LENGTHS]
    found, graphs = served(model, batches)
    few, many = [("activation", "activation")] * 3, [("weight", "weight")] * 3
    assert found[0] == said(model, batches[0]) == few
    assert found[-1] == said(model, batches[-1]) == many
    between = [forms for forms in found if forms not in (few, many)]
    assert between
    assert between == [between[0]] * len(between)
    assert graphs == 3


class Both(nn.Module):
    """A layer whose outputs are scaled and a layer with a sum of terms."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.W = nn.Parameter(frozen(width, width), requires_grad=False)
        self.v, self.layer = trained(width, 1), LoRA(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu((x @ self.W) * self.v[:, 0]))


def test_regions_and_sums_are_settled_together(monkeypatch) -> None:
    """One crosses over at 10 tokens, the other at 1000: the graph knows of both, and is what `explain` tells."""

    def decide(machine: Any, forward: Any, grad: Any, *args: Any) -> price.Decision:
        shape = forward or grad
        form = "weight" if (10 if shape.steps else 1000) <= shape.T else "activation"
        return price.Decision(form, form if grad else "none", {}, "priced by hand")

    monkeypatch.setattr(price, "decide", decide)
    model = Both()
    batches = [torch.randn(T, 64) for T in (5, 500, 2000, 9, 10, 999, 1000)]
    found, graphs = served(model, batches)
    assert found == [said(model, x) for x in batches]
    assert len(found[0]) == 2
    assert len(set(map(tuple, found))) == graphs == 3


def test_adapters_found_later_leave_what_was_decided() -> None:
    """They bring guards of their own, and none where they do not change."""
    guards: list[int] = []
    regimes = Regimes(lambda size: 500, lambda size, n: guards.append(n) or n <= 500)
    regimes.settle([("T", switching(10)), ("T", switching(1000))])
    assert regimes.tokens("T") == 100
    regimes.settle([("T", switching(0))])
    assert regimes.tokens("T") == 100
    regimes.settle([("T", switching(300))])
    assert regimes.tokens("T") == 500
    assert {10, 300, 1000} <= set(guards)


def switching(at: int) -> Callable[[int], tuple[str, str]]:
    return lambda T: ("weight", "weight") if at <= T else ("activation", "activation")


@pytest.mark.parametrize("at", [2, 3, 1000, MOST // 2])
def test_crossover_is_the_least_number_of_tokens(at: int):
    assert crossovers(switching(at)) == (at, at)


def test_what_never_changes_has_no_crossover():
    """Nor a switch: the hint says all there is to say."""
    assert crossovers(switching(0)) == (MOST, MOST)
    asked: list[int] = []
    regimes = Regimes(lambda size: 77, lambda size, n: asked.append(n) or True)
    regimes.settle([("T", switching(0))])
    assert regimes.tokens("T") == 77
    assert max(asked) <= 2  # as every number of tokens is, and no guard


@pytest.mark.parametrize(("T", "regime"), [(9, 9), (10, 31), (99, 31), (100, 100), (5000, 5000)])
def test_regimes(T: int, regime: int):
    """Between 10 and 100 tokens the decisions are those at the middle."""
    regimes = Regimes(lambda size: T, lambda size, n: n <= T)
    regimes.settle([("T", switching(10)), ("T", switching(40)), ("T", switching(100))])
    assert regimes.tokens("T") == regime


def test_an_unknown_number_of_tokens_keeps_what_was_written():
    regimes = Regimes(lambda size: 8192, lambda size, n: None)
    regimes.settle([("u0", switching(10))])
    assert regimes.tokens("u0") == 1
    assert regimes.tokens(512) == 8192


def test_a_regime_of_one_length(monkeypatch) -> None:
    """Two switches with one number between them: there the guards make a number of a symbol, and nothing fails."""
    switches = itertools.cycle([(9, 9), (10, 10)])
    monkeypatch.setattr(regimes, "crossovers", lambda forms: next(switches))
    model = nn.Sequential(LoRA(8), LoRA(8))
    f = torch.compile(model, backend="peft_fx", options=OPTIONS, dynamic=True)
    for length in (9, 17):
        x = torch.randn(length, 8)
        torch.testing.assert_close(f(x), model(x))
    assert [len(r.outcomes[0].sites) for r in records_of(model)] == [2, 2]
