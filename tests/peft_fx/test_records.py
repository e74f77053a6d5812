"""`explain(compiled)` tells of the graphs that can be called, as many as Dynamo says it made; of what failed, why."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo import exc
from torch._dynamo.utils import counters

import peft_fx
from peft_fx import compiling
from peft_fx.passes import pipeline
from peft_fx.records import records_of
from tests.support.oracle import WEIGHT
from tests.support.peft_models import adapt, fill, layers, mlp
from tests.support.spellings import Lora, scale_right

WIDTH = 64
AUTO = {"peft_fx.lowering": "aot_eager"}


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Those that Dynamo counts."""
    return counters["stats"]["unique_graphs"]


def batch(tokens: int = 20) -> Tensor:
    return torch.randn(tokens, WIDTH)


def step(f: Callable[..., Tensor], x: Tensor | None = None) -> None:
    f(batch() if x is None else x).sum().backward()


def compiled(model: nn.Module, **kwargs: Any) -> Any:
    return torch.compile(model, backend="peft_fx", options=WEIGHT, **kwargs)


class Scaled(nn.Module):
    """A number beside the tensors, of which a dynamic graph makes a symbol, and then not."""

    def __init__(self, breaks: bool = False, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Lora(scale_right, WIDTH, WIDTH) for _ in range(blocks))
        self.breaks = breaks

    def forward(self, x: Tensor, s: float = 0.5) -> Tensor:
        for layer in self.layers:
            x = nn.functional.layer_norm(layer(x), (WIDTH,), eps=s)
            if self.breaks:
                torch._dynamo.graph_break()
        return x


def told(f: Any) -> list[str]:
    """The names of all adapters in a report, which has as many graphs as Dynamo counts."""
    report = peft_fx.explain(f)
    assert report.graphs == graphs(), str(report)
    return sorted([s.name for s in report.sites] + [r.name for r in report.refusals])


EACH = ["layers.0.W", "layers.1.W"]


def test_a_compile_that_is_started_again() -> None:
    """A float that cannot stay a symbol: AOTAutograd aborts the first try from within the backend."""
    tries: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        tries.append(gm)
        return compiling.backend(gm, inputs, options=WEIGHT)

    model = Scaled()
    torch.compile(model, backend=backend, dynamic=True)(batch(), 0.25).sum().backward()
    assert len(tries) > graphs() == 1
    assert told(model) == EACH


@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.maybe_mark_dynamic])
def test_a_marked_size(mark: Callable[..., None]) -> None:
    x = batch()
    mark(x, 0)
    f = compiled(Scaled())
    step(f, x)
    step(f, batch(30))
    assert graphs() == 1
    assert told(f) == EACH


def test_a_second_length() -> None:
    """Dynamo makes a second graph, for any length, and both answer; with a number that changes, a third."""
    model = Scaled()
    f = compiled(model)
    for tokens in (20, 30, 40):
        step(f, batch(tokens))
    assert graphs() == 2
    assert told(f) == sorted(2 * EACH)
    f(batch(30), s=2.5)
    f(batch(30), s=3.5)
    assert set(told(f)) == set(EACH)


def test_the_same_model_for_each_of_its_uses() -> None:
    """Training, evaluation, without gradients, and another adapter: each its own graph."""
    model = adapt(mlp(), lora_dropout=0.5)
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    f = compiled(model)
    step(f)
    assert graphs() == 1
    model.eval()
    step(f)
    with torch.no_grad():
        f(batch())
    model.set_adapter("other")
    step(f)
    model.train()
    step(f)
    assert graphs() >= 4
    assert told(f) == sorted(list(layers(model)) * graphs())


def test_adapters_that_are_put_in_after_a_compile() -> None:
    """The graph without them answers no more where they are; the one with them is in the report."""
    model = mlp().requires_grad_(False)
    f = compiled(model)
    step(f, batch().requires_grad_(True))
    assert told(f) == []
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["0", "2"]), model)
    fill(model)
    step(f)
    assert set(told(f)) == set(layers(model)) == {"0", "2"}


@pytest.mark.parametrize("called", ["the module", "its forward"])
def test_a_model_that_another_backend_compiled_as_well(called: str) -> None:
    """Its compile is no work of ours: without a call to trace there is nothing to tell of it."""
    model = Scaled()
    ours = compiled(model if called == "the module" else model.forward)
    step(ours)
    other = torch.compile(model if called == "the module" else model.forward, backend="aot_eager")
    step(other)
    with pytest.raises(TypeError, match="explain"):
        peft_fx.explain(other)
    assert sorted(s.name for s in peft_fx.explain(ours).sites) == EACH
    assert sorted(s.name for s in peft_fx.explain(other, batch(), options=WEIGHT).sites) == EACH


def test_graph_breaks() -> None:
    f = compiled(Scaled(breaks=True))
    step(f)
    assert graphs() > 1
    assert told(f) == EACH


def test_a_graph_that_is_aborted_behind_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever starts the trace again when our graph is there already."""
    f, tries, real = compiled(Scaled()), [], torch._dynamo.output_graph.OutputGraph.call_user_compiler

    def call(self: Any, gm: Any, inputs: Any) -> Any:
        found = real(self, gm, inputs)
        tries.append(gm)
        if len(tries) < 3:
            raise exc.SpeculationRestartAnalysis(restart_reason="once more")
        return found

    monkeypatch.setattr(torch._dynamo.output_graph.OutputGraph, "call_user_compiler", call)
    step(f)
    assert len(tries) == 3
    assert told(f) == EACH


def failing(monkeypatch: pytest.MonkeyPatch, when: Callable[[Any], bool] = lambda gm: True) -> None:
    """Inductor fails on some graphs."""
    real = compiling._run_eagerly

    def lower(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        if when(gm):
            raise RuntimeError("no such kernel")
        return real(gm, inputs, **kwargs)

    monkeypatch.setattr(compiling, "_run_eagerly", lower)


def test_a_compile_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no graph, and its adapters are in no form; the report says why, until there is a graph."""
    model = Scaled(blocks=1)
    f = compiled(model)
    with monkeypatch.context() as m:
        failing(m)
        with pytest.raises(Exception, match="no such kernel"):
            step(f)
    report = peft_fx.explain(f)
    assert (report.graphs, report.sites) == (0, [])
    assert "no such kernel" in report.failures[0]
    torch._dynamo.reset()
    counters.clear()
    step(f)
    assert told(f) == ["layers.0.W"]
    assert peft_fx.explain(f).failures == []


@torch._dynamo.config.patch(suppress_errors=True)
def test_a_compile_that_fails_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two graphs, one behind a break: the other one is there, and answers."""
    model = Scaled(breaks=True)
    failing(monkeypatch, lambda gm: len(compiled_graphs) == 0 and not compiled_graphs.append(gm))
    compiled_graphs: list[Any] = []
    f = compiled(model)
    x = batch()
    torch.testing.assert_close(f(x), model(x))
    report = peft_fx.explain(f)
    assert report.graphs == graphs()
    assert len(report.sites) == len({s.name for s in report.sites})
    assert all("no such kernel" in failure for failure in report.failures)


@torch._dynamo.config.patch(suppress_errors=True)
def test_a_model_that_runs_in_eager_mode_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    f = compiled(Scaled())
    step(f)
    report = peft_fx.explain(f)
    assert (report.graphs, report.sites) == (0, [])
    assert report.failures
    assert all("no such kernel" in failure for failure in report.failures)


def test_a_pass_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, Inductor's, however often the pass fails."""
    monkeypatch.setattr(pipeline, "run", lambda *a: 1 / 0)
    f = compiled(adapt(mlp()), dynamic=True)
    with pytest.warns(RuntimeWarning, match="untouched"):
        step(f)
    report = peft_fx.explain(f)
    assert report.graphs == graphs() == 1
    assert len(report.failures) == 1
    assert report.sites == []


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_lengths_than_dynamo_compiles_for() -> None:
    f = compiled(Scaled(), dynamic=False)
    for tokens in (20, 30, 40, 50):
        step(f, batch(tokens))
    assert graphs() == 2
    assert told(f) == sorted(2 * EACH)


def test_a_graph_that_dynamo_drops() -> None:
    """What it was compiled of is gone: the code answers no more, and is told of no more."""

    class Chosen(Scaled):
        def forward(self, x: Tensor, s: Any = 0.5) -> Tensor:
            return super().forward(x, s.s if isinstance(s, Number) else s)

    class Number:
        s = 2.0

    model = Chosen()
    f, number = compiled(model), Number()
    step(f)
    f(batch(), number).sum().backward()
    assert told(f) == sorted(2 * EACH)
    before = len(records_of(model))
    torch._dynamo.eval_frame.reset_code(Chosen.forward.__code__)
    gc.collect()
    assert len(records_of(model)) < before
    assert not peft_fx.explain(model, batch()).failures


def test_models_that_are_gone() -> None:
    """One graph for two models: the report of the one that is left is its own."""
    one, other = Scaled(), Scaled()
    f, g = compiled(one), compiled(other)
    step(f)
    step(g)
    assert graphs() == 1
    assert told(f) == told(g) == EACH
    del one, f
    gc.collect()
    assert told(g) == EACH
    step(g)
    assert told(g) == EACH


def test_nothing_is_told_twice_of_a_call_either() -> None:
    """explain(model, ...) traces through the same restarts."""
    with torch._dynamo.config.patch(assume_static_by_default=False):
        report = peft_fx.explain(Scaled(), batch(), 0.25, options=WEIGHT)
    assert report.graphs == 1
    assert sorted(s.name for s in report.sites) == EACH
