"""Several graphs of one model share its budget: what those before a graph keep, and how often it runs, are known."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from peft_fx import sharing
from peft_fx.records import Record, records_of
from tests.support.oracle import EAGER
from tests.support.spellings import frozen, trained
from tests.support.stepping import Injected

K, N, R, T = 16, 48, 2, 64
BYTES = 4
LARGE = {"peft_fx.memory_budget": 10**15, "peft_fx.memory_budget_of": "step", **EAGER}


class Layer(nn.Module):
    """A residual layer of two adapted products."""

    number = 0

    def __init__(self) -> None:
        super().__init__()
        self.V, self.W = frozen(K, N), frozen(N, K)
        self.A, self.B, self.C, self.D = trained(K, R), trained(R, N), trained(N, R), trained(R, K)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(x @ self.V + (x @ self.A) @ self.B)
        return x + (h @ self.W + (h @ self.C) @ self.D) * (1 if self.number >= 0 else 2)


class Front(nn.Module):
    """Two layers as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


class Broken(nn.Module):
    """Four layers with a graph break in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Front(), Front()

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        torch._dynamo.graph_break()
        return self.other(y)


class Regions(nn.Module):
    """Layers that are compiled by themselves, behind a module that has two in it."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.first = Front()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def compiled(self, options: dict[str, Any]) -> Regions:
        for module in (self.first, *self.layers):
            module.compile(backend="peft_fx", options=options)
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def _alone() -> None:
    """No other test's graphs."""
    torch._dynamo.reset()
    gc.collect()
    sharing._calls.clear()


def inputs() -> Tensor:
    return torch.randn(T, K, generator=torch.Generator().manual_seed(1))


def step(model: Any) -> dict[str, Tensor]:
    """The gradients of one."""
    model.zero_grad(set_to_none=True)
    model(inputs()).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def held(record: Record) -> Any:
    (outcome,) = record.outcomes
    assert outcome.budget is not None
    return outcome.budget


def test_a_graph_knows_what_the_one_before_it_keeps() -> None:
    """That is measured; the walk says the same: what is kept, the input, and the result, which the second reads."""
    model = Broken()
    step(torch.compile(model, backend="peft_fx", options=LARGE))
    first, second = records_of(model)
    assert (first.around.times, second.around.times) == (2, 1)
    assert (first.around.kept, second.around.kept) == (0, held(first).kept["after"] // 2 + 2 * BYTES * T * K)
    assert held(second).fixed == {"kept by graphs before": second.around.kept}
    assert held(second).budget == LARGE["peft_fx.memory_budget"] - second.around.kept


def test_what_backward_has_let_go_of_is_not_kept() -> None:
    """The first graph of another length, compiled while the last step's loss is there."""
    model = Broken()
    compiled = torch.compile(model, backend="peft_fx", options=LARGE, dynamic=False)
    loss = compiled(inputs()).sum()
    loss.backward()
    compiled(inputs()[: T // 2]).sum().backward()
    assert [r.around.kept > 0 for r in records_of(model)] == [False, False, True, True]
    assert loss.grad_fn is not None


def test_a_model_that_is_called_twice_before_backward_keeps_twice() -> None:
    """As where two batches have one loss; the second one, of another length, has a graph of its own."""
    model = Front()
    compiled = torch.compile(model, backend="peft_fx", options=LARGE, dynamic=False)
    (compiled(inputs()).sum() + compiled(inputs()[: T // 2]).sum()).backward()
    first, second = records_of(model)
    assert (first.around.times, second.around.times) == (1, 1)
    assert second.around.kept == held(first).kept["after"] + BYTES * T * K  # and the input; the result is gone


def test_a_call_without_a_backward_keeps_nothing() -> None:
    model = Broken()
    compiled = torch.compile(model, backend="peft_fx", options=LARGE)
    with torch.no_grad():
        compiled(inputs())
    assert [r.around.kept for r in records_of(model)] == [0, 0]
    assert not sharing._calls


def test_a_graph_for_many_layers_is_for_all_of_them() -> None:
    """Chosen alike, whether or not Dynamo takes them for one; what is kept is of all, and the last call's peak has what
    the others keep beside it."""
    model = Regions().compiled(LARGE)
    step(model)
    before, *layers = records_of(model)
    assert len(layers) == 1
    assert (before.around.times, before.around.kept) == (2.5, 0)  # of five layers' parameters it has two's
    assert {(r.around.times, r.around.kept) for r in layers} == {
        (3, int(held(before).kept["after"] / 2.5) + 2 * BYTES * T * K)
    }
    of_one = held(layers[0]).kept["after"] // 3 + BYTES * T * K
    alone = Regions(count=1)
    torch._dynamo.reset()
    step(alone.compiled(LARGE))
    assert held(layers[0]).peak["after"] == held(records_of(alone)[-1]).peak["after"] + 2 * of_one


def test_layers_with_graphs_of_their_own_are_chosen_alike() -> None:
    """As where Dynamo compiles each by itself for a number of its own: all that decides is in the caches' key."""
    model = Regions(count=3)
    for i, layer in enumerate(model.layers):
        layer.number = i
    step(model.compiled(LARGE))
    _, *layers = records_of(model)
    assert len(layers) == 3
    assert len({r.around for r in layers}) == 1


@pytest.mark.parametrize("share", [0.9, 0.75])
@pytest.mark.parametrize("kind", [Broken, Regions])
def test_all_graphs_of_a_step_are_within_the_budget(kind: type[nn.Module], share: float) -> None:
    """What they keep together, measured; and the same gradients."""

    def compiled(options: dict[str, Any]) -> Any:
        torch._dynamo.reset()
        sharing._calls.clear()
        made = copy.deepcopy(model)
        return (
            made.compiled(options)
            if isinstance(made, Regions)
            else torch.compile(made, backend="peft_fx", options=options)
        )

    model = kind()
    kept(free := compiled(LARGE))
    budget = int(share * max(held(r).peak["after"] + r.around.kept for r in records_of(free)))
    tight = compiled({**LARGE, "peft_fx.memory_budget": budget})
    assert kept(tight) <= budget
    assert all(held(r).is_held for r in records_of(tight))
    assert any(held(r).rebuilt for r in records_of(tight))
    one, other = (step(m) for m in (compiled(LARGE), compiled({**LARGE, "peft_fx.memory_budget": budget})))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def kept(model: Any) -> int:
    """Bytes between forward and backward, measured."""
    result = model(inputs())
    tensors = [t for c in sharing._calls for t in c.tensors() if not isinstance(t, nn.Parameter)]
    n = sharing._bytes(tensors, torch.device("cpu"), [])
    result.sum().backward()
    return n


def test_everything_is_the_whole_models() -> None:
    """A graph of one of three layers is trained beside the weights and the states of the others."""
    model = Regions(count=2)
    step(model.compiled({**LARGE, "peft_fx.memory_budget_of": "total"}))
    weights = sum(BYTES * p.numel() for p in model.parameters())
    states = 2 * sum(BYTES * p.numel() for p in model.parameters() if p.requires_grad)
    for record in records_of(model):
        assert held(record).fixed["weights"] == weights
        assert held(record).fixed["optimiser states"] == states


def test_a_callers_locals_are_not_held() -> None:
    """To look at a frame's locals keeps them until it ends: what a training loop lets go of would stay."""

    class Large:
        pass

    large = Large()
    there = weakref.ref(large)
    step(torch.compile(Broken(), backend="peft_fx", options=LARGE))
    del large
    assert there() is None


def test_without_a_budget_nothing_is_noted() -> None:
    model = Broken()
    step(torch.compile(model, backend="peft_fx", options=EAGER))
    assert not sharing._calls
    assert all(r.around == sharing.Around() for r in records_of(model))


def test_a_kind_is_of_the_module_whose_code_it_is() -> None:
    model = Regions(count=3)
    layer = model.layers[0]
    kind = sharing._kind(model, {"V": layer.V, "A": layer.A})
    assert kind == sharing.Kind(Layer, (("V", layer.V.shape), ("A", layer.A.shape)))
    of_all = sharing._kind(model, {"layers.0.V": layer.V})
    assert of_all is not None
    assert of_all.of is Regions
    assert sharing._kind(model, {"V": nn.Parameter(torch.ones(1))}) is None


def test_a_fault_is_a_budget_for_each_graph_by_itself() -> None:
    model = Broken()
    compiled = torch.compile(model, backend="peft_fx", options=LARGE)
    with (
        patch.object(sharing, "_kind", side_effect=Injected("here")),
        pytest.warns(RuntimeWarning, match="holds a graph to its memory budget by itself: Injected: here"),
    ):
        step(compiled)
    assert all(r.around == sharing.Around() and held(r).is_held for r in records_of(model))
