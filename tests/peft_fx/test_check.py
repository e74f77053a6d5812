"""`peft_fx.check`: what it says of models that are fine, and of ones that are not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_fx
from peft_fx import checking
from peft_fx.passes.rewrite import merge_sums
from tests.support.oracle import EAGER, WEIGHT
from tests.support.spellings import BF16, Lora, linear, peft_casts
from zoo.architectures import ARCHITECTURES


class Dropped(Lora):
    """An adapter behind dropout, as PEFT has it in training."""

    def __init__(self) -> None:
        super().__init__(linear)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W + (self.dropout(x) @ self.A) @ self.B


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(200, 96, dtype=dtype)


@pytest.fixture(autouse=True)
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's place is taken by eager ops: what is checked here is what `check` makes of the numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    real = torch.compile

    def compile(model: Any = None, **kwargs: Any) -> Any:
        return real(model, **({"backend": "aot_eager"} if "backend" not in kwargs else kwargs))

    monkeypatch.setattr(torch, "compile", compile)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_model_that_is_fine(dtype: torch.dtype) -> None:
    module = Lora(peft_casts).to(torch.float32)
    module.W.data = module.W.data.to(dtype)
    given = x(dtype)
    before = {n: p.clone() for n, p in module.named_parameters()}
    found = peft_fx.check(module, given, options=WEIGHT)
    assert found.ok, found
    assert found.reference == "float64"
    assert [v.name for v in found.variants] == ["eager", "Inductor", "peft_fx"]
    assert all(0 < v.error < 0.1 and v.kept > 0 and v.peak >= v.kept for v in found.variants)
    assert "1 of 1 adapters in weight form" in found.verdict
    assert found.verdict in str(found)
    assert found.to_dict()["ok"] is True
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())


@contextlib.contextmanager
def wrong() -> Iterator[None]:
    """A rule broken: W' is too large by a hundredth."""
    real = merge_sums.Rewriter._merge

    def merge(self: Any, weight: Any, inner: Any, terms: Any, dtype: Any) -> Any:
        return self.edit.call(torch.ops.aten.mul.Tensor, real(self, weight, inner, terms, dtype), 1.01)

    with patch.object(merge_sums.Rewriter, "_merge", merge):
        yield


def test_a_wrong_rewrite_is_told() -> None:
    with wrong():
        found = peft_fx.check(Lora(linear), x().requires_grad_(), options=WEIGHT)
    assert not found.ok
    assert any("the loss errs" in p for p in found.problems)
    assert "Something speaks against it" in found.verdict


def test_a_failure_is_told() -> None:
    with (
        patch.object(merge_sums.Rewriter, "_merge", side_effect=RuntimeError("injected")),
        pytest.warns(RuntimeWarning, match="untouched"),
    ):
        found = peft_fx.check(Lora(linear), x(), options=WEIGHT)
    assert not found.ok
    assert "injected" in found.problems[0]


def test_what_is_drawn_is_judged_as_in_evaluation() -> None:
    module, given = Dropped(), x()
    state = torch.get_rng_state()
    found = peft_fx.check(module, given, options=EAGER)
    assert found.ok, found
    assert module.training
    assert [r.code for r in found.report.refusals] == ["dropout"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_adapters() -> None:
    assert "no adapter" in peft_fx.check(nn.Linear(4, 4), torch.randn(3, 4), options=EAGER).verdict


PROMPTS = [name for name, architecture in ARCHITECTURES.items() if architecture.prompt]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_keep_less_by_the_loss_in_chunks(name: str) -> None:
    """No layer is changed, and logits need not be kept: where the vocabulary is large, that is most of a step."""
    model, batch = ARCHITECTURES[name].build()
    found = peft_fx.check(model, **batch, options=EAGER)
    assert found.ok, found
    _, inductor, ours = found.variants
    assert ours.kept < 0.3 * inductor.kept
    assert "its loss in chunks" in found.verdict


def test_what_cannot_be_checked() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        peft_fx.check(lambda x: x, x())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to train"):
        peft_fx.check(nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4))
    with pytest.raises(ValueError, match="no option"):
        peft_fx.check(nn.Linear(4, 4), torch.randn(3, 4), options={"peft_fx.what": 1})


# --------------------------------------------------------------------------------------------- whatever was done before

OURS = {"backend": "peft_fx", "options": WEIGHT}
WIDTH = 32


class Two(nn.Module):
    """Two layers, each called in one way."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(Lora(linear, WIDTH, WIDTH) for _ in range(2)), how

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(self.how(layer, x))
        return x


def broken(layer: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return layer(x)


def ran(f: Callable[..., Tensor], rows: int = 40) -> None:
    f(torch.randn(rows, WIDTH)).sum().backward()


def plain() -> nn.Module:
    return Two()


def compiled_before() -> nn.Module:
    model = Two()
    ran(torch.compile(model, **OURS))
    return model


def compiled_itself() -> Any:
    model = torch.compile(Two(), **OURS)
    ran(model)
    return model


def in_place(how: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x), runs: bool = True) -> nn.Module:
    model = Two(how)
    model.compile(**OURS)
    if runs:
        ran(model)
    return model


def layer_by_layer() -> nn.Module:
    model = Two(broken)
    for layer in model.layers:
        layer.compile(**OURS)
    ran(model)
    return model


def layers_replaced() -> nn.Module:
    model = Two(broken)
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, **OURS)
    ran(model)
    return model


def function_inside() -> nn.Module:
    model = Two(torch.compile(lambda layer, x: layer(x), **OURS))
    ran(model)
    return model


def checkpointed() -> nn.Module:
    """Called again in backward, layers compiled one by one."""
    model = Two(functools.partial(checkpoint, use_reentrant=False))
    for layer in model.layers:
        layer.compile(**OURS)
    ran(model)
    return model


def class_compiled() -> nn.Module:
    class Own(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    Own.forward = torch.compile(Own.forward, **OURS)
    model = Own()
    ran(model)
    return model


def hooked() -> nn.Module:
    model = Two()
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.layers[0].register_forward_hook(lambda module, args, y: y + 1)
    model.layers[1].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,))
    model.compile(**OURS)
    ran(model)
    return model


def partly_disabled() -> nn.Module:
    model = Two()
    model.layers[1] = torch.compiler.disable(model.layers[1])
    ran(torch.compile(model, **OURS))
    return model


@torch._dynamo.config.patch(recompile_limit=2)
def out_of_recompiles() -> nn.Module:
    model = in_place(broken)
    for rows in (5, 6, 7, 8):
        ran(model, rows)
    return model


MADE: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "compiled_before": compiled_before,
    "compiled_itself": compiled_itself,
    "in_place": in_place,
    "in_place_with_breaks": functools.partial(in_place, broken),
    "in_place_not_run_yet": functools.partial(in_place, runs=False),
    "layer_by_layer": layer_by_layer,
    "layers_replaced": layers_replaced,
    "function_inside": function_inside,
    "checkpointed": checkpointed,
    "class_compiled": class_compiled,
    "hooked": hooked,
    "partly_disabled": partly_disabled,
    "out_of_recompiles": out_of_recompiles,
}
AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "fail_on_recompile": lambda: torch.compiler.set_stance("fail_on_recompile"),
    "force_backend": lambda: torch.compiler.set_stance("default", force_backend="eager"),
    "switched_off": lambda: patch.dict("os.environ", PEFT_FX_DISABLE="1"),
    "compiled_autograd": lambda: torch._dynamo.compiled_autograd._enable(torch.compile(**OURS)),
}


def told(model: Any) -> list[str]:
    """What speaks against a model, in a word each."""
    found = peft_fx.check(model, torch.randn(200, WIDTH), options=WEIGHT)
    return [p.split(" err")[0].split(" is kept")[0] for p in found.problems]


KEPT = {"checkpointed": ["more"]}  # of the model as it is, too: beside the inputs of layers this small W' is large


@pytest.mark.parametrize("name", MADE)
def test_what_was_compiled_before_is_not_what_is_checked(name: str) -> None:
    """A rule broken by then is told of: each row is what it is called."""
    model = MADE[name]()
    with wrong():
        assert told(model) == ["gradients", "the loss", *KEPT.get(name, [])]


@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_the_check_is_not_what_is_checked(name: str) -> None:
    model = in_place()
    with AROUND[name](), wrong():
        assert told(model) == ["gradients", "the loss"]


@pytest.mark.parametrize("name", ["in_place_with_breaks", "layers_replaced"])
def test_a_model_that_was_compiled_before_is_fine(name: str) -> None:
    assert told(MADE[name]()) == []


def test_what_was_compiled_is_as_it_was() -> None:
    """It answers after a check, is told of alone, and a later length is compiled for."""
    model = in_place()
    impl, report = model._compiled_call_impl, peft_fx.explain(model)
    peft_fx.check(model, torch.randn(200, WIDTH), options=WEIGHT)
    assert model._compiled_call_impl is impl
    assert peft_fx.explain(model) == report
    with torch.compiler.set_stance("fail_on_recompile"):
        ran(model)
    ran(model, 200)
    assert peft_fx.explain(model).graphs == report.graphs + 1


def test_a_model_that_runs_uncompiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keeps Dynamo from it: rows that are not what they are called are a problem."""
    monkeypatch.setattr(checking, "compiled_call", lambda backend: checking._call)
    found = peft_fx.check(Two(), torch.randn(200, WIDTH), options=WEIGHT)
    assert [p for p in found.problems if "ran in eager mode" in p]
