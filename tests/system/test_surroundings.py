"""What torch.compile may be surrounded with: contexts, checkpoints, hooks, graph breaks, threads, other backends. The
results are those of eager mode to the bit, and the report has every layer once."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import peft_fx
from peft_fx.records import records_of
from tests.support.oracle import (
    WEIGHT,
    Run,
    assert_bit_equal,
    assert_no_worse,
    integers,
    pooled,
    run,
    shuffle,
    weight_form,
)
from tests.support.spellings import BF16, Lora, scale_right, to_dtype

FP32, FP16 = torch.float32, torch.float16
WIDTH, BOTH = 32, ("weight", "weight", "low_rank")
How = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """Two adapted layers and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Lora(scale_right, WIDTH, 48), Lora(scale_right, 48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Blocks, each called in the same way."""

    def __init__(self, how: How = lambda block, x: block(x), blocks: int = 2) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(Block() for _ in range(blocks)), how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = self.how(block, x)
        return x


def made(how: How = lambda block, x: block(x)) -> tuple[Net, tuple[Tensor]]:
    """Integers in fp64, which no order of additions rounds."""
    net = Net(how).double()
    integers(net, 0, 1)
    return net, (integers((torch.zeros(5, WIDTH, dtype=torch.float64),), 2, 1)[0].requires_grad_(),)


def forms(report: peft_fx.Report) -> dict[str, tuple[str, str, str]]:
    """By name; a site told twice is a failure."""
    assert (report.refusals, report.failures) == ([], [])
    found = {s.name: (s.forward, s.input_grad, s.adapter_grad) for s in report.sites}
    assert len(found) == len(report.sites)
    return found


def every_layer(*form: str) -> dict[str, tuple[str, ...]]:
    return {f"layers.{i}.{name}.W": form for i in range(2) for name in ("up", "down")}


# ------------------------------------------------------------------------------------------- around each block


def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op == torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, policy)


def checkpointed(block: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return checkpoint(block, x, **{"use_reentrant": False, **kwargs})


def checkpointed_twice(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: x + checkpoint(block, x, use_reentrant=False), x, use_reentrant=False)


def broken(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    torch._dynamo.graph_break()
    return y


def hooked(block: nn.Module, x: Tensor) -> Tensor:
    y = block(2 * x)
    y.register_hook(lambda dy: 2 * dy)
    return y


def packed(block: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t + 1, lambda t: t - 1):
        return block(x)


def without_gradients(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = block(x)
    return x + y


@torch.compiler.nested_compile_region
def as_region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


# how, the forms of its layers, and whether explain of a call is asked as well
HOWS: dict[str, tuple[How, tuple[str, str, str], bool]] = {
    "reentrant_checkpoint": (functools.partial(checkpointed, use_reentrant=True), BOTH, False),
    "nested_checkpoint": (checkpointed_twice, BOTH, False),
    "selective_policy": (functools.partial(checkpointed, context_fn=selective), BOTH, False),
    "graph_break": (broken, BOTH, True),
    "tensor_hook": (hooked, BOTH, False),
    "saved_tensors_hooks": (packed, BOTH, False),
    "no_grad": (without_gradients, ("weight", "none", "none"), False),
    "region": (lambda block, x: as_region(block, 2 * x) + 1, BOTH, True),
}


@pytest.mark.parametrize("name", HOWS)
def test_around_a_block(name: str) -> None:
    """The layers of all blocks are told, also where Dynamo runs one graph, or one region of a graph, for both; and
    explain of a call tells the same as explain of what was compiled."""
    how, form, is_traced = HOWS[name]
    net, inputs = made(how)
    f = weight_form(net)
    assert_bit_equal(run(f, net, inputs), run(net, net, inputs))
    report = peft_fx.explain(f)
    assert forms(report) == every_layer(*form)
    if is_traced:
        traced = peft_fx.explain(net, *inputs, options=WEIGHT)
        assert sorted(traced.sites, key=str) == sorted(report.sites, key=str)
        assert traced.nodes.keys() == every_layer().keys()


def test_a_region_without_gradients() -> None:
    net, (x,) = made(as_region)
    f = weight_form(net)
    with torch.no_grad():
        assert torch.equal(f(x), net(x))
    assert forms(peft_fx.explain(f)) == every_layer("weight", "none", "none")


def test_regions_of_the_same_sizes_are_told_apart() -> None:
    """Their inputs are alike, their code is not: one has an adapter without a weight form."""

    class Gated(Lora):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.W + torch.relu(x @ self.A) @ self.B * self.s

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gated = Lora(scale_right, WIDTH, WIDTH), Gated(scale_right, WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.linear, self.gated, self.linear, self.gated):
                x = as_region(layer, x)
            return x

    net = Two().double()
    inputs = integers((torch.zeros(5, WIDTH, dtype=torch.float64, requires_grad=True),), 2, 1)
    f = weight_form(integers(net, 0, 1))
    assert_bit_equal(run(f, net, inputs), run(net, net, inputs))
    report = peft_fx.explain(f)
    assert {s.name for s in report.sites} == {"linear.W"}
    assert {(r.name, r.code) for r in report.refusals} == {("gated.W", "nonlinear")}


# ------------------------------------------------------------------------------------------------ around the call


def budget() -> contextlib.AbstractContextManager[Any]:
    return torch._functorch.config.patch(activation_memory_budget=0.3)  # type: ignore[no-any-return]


def compiled_autograd() -> contextlib.AbstractContextManager[Any]:
    compiler = torch.compile(backend="peft_fx", options=WEIGHT)
    return torch._dynamo.compiled_autograd._enable(compiler)  # type: ignore[no-any-return]


AROUND = {"memory_budget": budget, "compiled_autograd": compiled_autograd}


@pytest.mark.parametrize("name", AROUND)
def test_around_a_step(name: str) -> None:
    net, inputs = made()
    want, f = run(net, net, inputs), weight_form(net)
    with AROUND[name]():
        assert_bit_equal(run(f, net, inputs), want)
    assert forms(peft_fx.explain(f)) == every_layer(*BOTH)


def test_gradient_modes_take_turns() -> None:
    """One compiled model, with and without gradients and in inference mode, one after the other."""
    net, inputs = made()
    f, want = weight_form(net), net(*inputs).detach()
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(f(*inputs).detach(), want)
    assert_bit_equal(run(f, net, inputs), run(net, net, inputs))


def test_hooks_of_modules() -> None:
    """Forward, before and after; backward, before and after; of a parameter, and after its accumulation."""
    net, inputs = made()
    steps: list[Tensor] = []
    net.layers[0].up.register_forward_hook(lambda module, args, y: y + 1)
    net.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.layers[1].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,))
    net.layers[1].down.register_full_backward_pre_hook(lambda module, dy: (dy[0] * 2,))
    net.layers[0].up.A.register_hook(lambda dA: dA * 2)
    net.layers[0].up.B.register_post_accumulate_grad_hook(steps.append)
    want, f = run(net, net, inputs), weight_form(net)
    assert_bit_equal(run(f, net, inputs), want)
    assert len(steps) == 2
    assert set(forms(peft_fx.explain(f))) == set(every_layer())


def test_a_break_inside_an_adapter_is_refused() -> None:
    class Broken(Lora):
        def forward(self, x: Tensor) -> Tensor:
            h = x @ self.A
            torch._dynamo.graph_break()
            return x @ self.W + h @ self.B * self.s

    layer = integers(Broken(scale_right).double(), 0, 1)
    inputs = integers((torch.zeros(5, 96, dtype=torch.float64),), 2, 1)
    f = weight_form(layer)
    assert_bit_equal(run(f, layer, inputs), run(layer, layer, inputs))
    report = peft_fx.explain(f)
    assert report.sites == []
    assert [r.name for r in report.refusals] == ["W"]


def test_export_is_left_alone() -> None:
    """An exported model has the ops that were written, whoever compiled it before; and can be compiled itself."""
    net, inputs = made()
    before = torch.export.export(net, inputs)
    f = weight_form(net)
    f(*inputs)
    after = torch.export.export(net, inputs)
    assert str(after.graph) == str(before.graph)
    exported = after.module()
    torch._dynamo.reset()
    g = torch.compile(exported, backend="peft_fx", options=WEIGHT)
    assert torch.equal(g(*inputs), net(*inputs))
    assert set(forms(peft_fx.explain(g))) == set(every_layer())


def test_a_function_transform_inside() -> None:
    """Gradients that the graph takes itself; names are the module's also where a function closes over it."""
    net, (x,) = made()

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: net(x).square().sum())(x)

    f = torch.compile(gradient, backend="peft_fx", options=WEIGHT)
    assert torch.equal(f(x), gradient(x))
    assert {s.name.partition("#")[0] for s in peft_fx.explain(net).sites} == set(every_layer())


# ------------------------------------------------------------------------------------------------------- autocast


class Cast(Lora):
    """A layer in whose forward autocast is on in some places."""

    def __init__(self, where: str, dtype: torch.dtype, base: torch.dtype, adapter: torch.dtype) -> None:
        super().__init__(scale_right)
        self.where, self.dtype = where, dtype
        for name, p in self.named_parameters():
            p.data = p.data.to(base if name == "W" else adapter)

    def autocast(self, *places: str) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.where in places)

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast("all"):
            with self.autocast("all", "base"):
                y = x @ self.W
            with self.autocast("all", "adapter"):
                return y + (x.to(self.A.dtype) if self.where == "base" else x) @ self.A @ self.B * self.s


CASTS = {  # where, its dtype, the dtypes of W, of A and B and of x; whether the sum is rounded as W·x is
    "around_fp32": ("all", BF16, FP32, FP32, FP32, True),
    "around_in_fp16": ("all", FP16, FP32, FP32, FP32, True),
    "base_alone": ("base", BF16, FP32, BF16, BF16, True),
    "base_alone_before_a_finer_adapter": ("base", BF16, BF16, FP32, BF16, False),
    "adapter_alone_behind_bf16_base": ("adapter", BF16, BF16, FP32, BF16, True),
    "adapter_alone_and_finer": ("adapter", FP16, BF16, FP32, BF16, False),
}


@pytest.mark.parametrize("name", CASTS)
def test_autocast(name: str) -> None:
    """No further from fp64 than eager mode; where eager adds what is finer than W·x, and nothing rounds the sum, there
    is no weight form."""
    where, dtype, base, adapter, given, rounded = CASTS[name]
    layer = Cast(where, dtype, base, adapter)
    inputs = (torch.randn(2, 24, 96).to(given).requires_grad_(),)
    exact = Cast("nowhere", dtype, torch.float64, torch.float64)
    f = weight_form(layer)

    def once(seed: int) -> tuple[Run, ...]:
        shuffle(layer, seed)
        exact.load_state_dict(layer.state_dict())
        ref64 = run(exact, exact, to_dtype(inputs, torch.float64), seed)
        return ref64, *(run(g, layer, inputs, seed) for g in (layer, f))

    assert_no_worse(*pooled(once))
    report = peft_fx.explain(f)
    assert [s.forward for s in report.sites] == ["weight"] * rounded
    assert [r.code for r in report.refusals] == ["dtype"] * (not rounded)


@pytest.mark.parametrize("around", [False, True])
def test_a_report_made_later_knows_the_autocast(around: bool) -> None:
    """Where a cache answered, explain runs the passes, whatever autocast is on there and then."""
    net, x = Lora(scale_right), torch.randn(32, 96)
    f = weight_form(net)
    with torch.autocast("cpu", BF16, enabled=around):
        f(x).float().sum().backward()
    first = peft_fx.explain(f)
    assert {s.dtype for s in first.sites} == {"bfloat16" if around else "float32"}
    for record in records_of(net):
        record.outcomes.clear()  # as after a hit
    with torch.autocast("cpu", BF16, enabled=not around):
        assert peft_fx.explain(f) == first


# ---------------------------------------------------------------------------------- threads, backends, subclasses


def test_threads_call_one_compiled_model() -> None:
    net, inputs = made()
    f, found = weight_form(net), []
    want = run(net, net, inputs)

    def call() -> None:
        x = inputs[0].detach().clone().requires_grad_()
        found.append((f(x).detach(), torch.autograd.grad(f(x).sum(), x)[0]))

    run(f, net, inputs)
    threads = [threading.Thread(target=call) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    for y, dx in found:
        assert torch.equal(y, want.y[0])
        assert torch.equal(dx, found[0][1])
    assert forms(peft_fx.explain(f)) == every_layer(*BOTH)


def test_backends_take_turns_and_are_forgotten() -> None:
    """Three compiled forms of one model, before and after a reset; each is told of by its own last compile."""
    net, inputs = made()
    want = run(net, net, inputs)
    weight, activation = weight_form(net), weight_form(net, **{"peft_fx.form": "activation"})
    other = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        torch._dynamo.reset()
        for f in (weight, other, activation, weight):
            assert_bit_equal(run(f, net, inputs), want)
        assert forms(peft_fx.explain(weight)) == every_layer(*BOTH)
        assert forms(peft_fx.explain(activation)) == every_layer("activation", "activation", "low_rank")


class Changed(Lora):
    """Its input, or its weight, is changed in place before the layer reads it."""

    def __init__(self, name: str):
        super().__init__(scale_right, WIDTH, 48)
        self.name = name
        if name == "weight":
            weight = self.W.detach()
            del self.W
            self.register_buffer("W", weight)

    def forward(self, x: Tensor) -> Tensor:
        (x if self.name == "input" else self.W).mul_(3)
        return super().forward(x).square()


@pytest.mark.parametrize("keep", ["recompute", "inductor"])
@pytest.mark.parametrize("name", ["input", "weight"])
def test_what_is_changed_in_place_is_not_rebuilt(name: str, keep: str) -> None:
    """In backward an input that forward changed has its new value: 3·x and W' are what they were in forward."""

    def step(compiled: bool) -> list[Tensor]:
        layer = integers(Changed(name).double(), 0, 1)
        integers([layer.W], 1, 1)
        x = integers((torch.zeros(64, WIDTH, dtype=torch.float64),), 2, 1)[0].requires_grad_(name == "weight")
        f = weight_form(layer, **{"peft_fx.keep": keep}) if compiled else layer
        f(x).sum().backward()
        if compiled:
            assert [s.forward for s in peft_fx.explain(f).sites] == ["weight"]
        return [layer.A.grad, layer.B.grad, *([x.grad] if name == "weight" else [])]

    assert all(map(torch.equal, step(compiled=True), step(compiled=False)))


@pytest.mark.parametrize("name", ["W", "A"])
def test_a_tensor_subclass(name: str) -> None:
    """Of two tensors in one: two layers, each rewritten; with one W they share a product, which two W' would not."""
    layer = Lora(scale_right, WIDTH, 48).double()
    (x,) = integers((torch.zeros(5, WIDTH, dtype=torch.float64),), 2, 1)
    integers(layer, 0, 1)
    own = getattr(layer, name).detach()
    setattr(layer, name, nn.Parameter(TwoTensor(own, own + 1), requires_grad=name != "W"))

    def step(f: Callable[..., Tensor]) -> Run:
        given = x.detach().requires_grad_()
        y = f(given)
        found = torch.autograd.grad(y.sum(), [given, layer.A, layer.B])
        parts = [part for t in (y.detach(), *found) for part in ((t.a, t.b) if isinstance(t, TwoTensor) else (t,))]
        return Run(parts, [], {})

    f = weight_form(layer)
    assert_bit_equal(step(f), step(layer))
    report = peft_fx.explain(f)
    rewritten = [(s.forward, s.input_grad, s.adapter_grad) for s in report.sites]
    assert rewritten == ([BOTH, BOTH] if name == "W" else [])
    assert [r.code for r in report.refusals] == ([] if name == "W" else ["shared"])
