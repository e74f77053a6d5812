"""The backend as torch.compile meets it: failures, the entry point, what calls may change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peft_fx
from peft_fx.passes import pipeline
from peft_fx.passes.analyse import find
from peft_fx.passes.decide import price
from peft_fx.passes.graph import joint as joints
from peft_fx.passes.keep import chains, in_place_reads
from peft_fx.passes.rewrite import merge_sums
from peft_fx.records import records_of
from tests.support.oracle import Run, assert_bit_equal, integers, run, weight_form
from tests.support.peft_models import adapt, mlp
from tests.support.spellings import Case, K, Stack, lora, scale_right, x
from tests.support.stepping import T, assert_falls_back, boom, plain, plain_step, python, step

# ---------------------------------------------------------------------------------------------------------- disabled


@pytest.mark.parametrize("setting", ["1", "true"])
def test_disabled_is_plain_lowering(setting: str, monkeypatch) -> None:
    """PEFT_FX_DISABLE: the bits of Inductor alone, no pass, no record."""
    monkeypatch.setenv("PEFT_FX_DISABLE", setting)
    monkeypatch.setattr(pipeline, "run", lambda *a: pytest.fail("a pass ran"))
    got, f = step()
    assert_bit_equal(got, plain_step())
    assert records_of(f._orig_mod) == []


@pytest.mark.parametrize("setting", ["", "0"])
def test_disabled_is_off(setting: str, monkeypatch) -> None:
    """An empty or zero PEFT_FX_DISABLE disables nothing."""
    monkeypatch.setenv("PEFT_FX_DISABLE", setting)
    assert len(peft_fx.explain(step()[1]).sites) == 2


# ---------------------------------------------------------------------------------------------------------- failures


FAULTS = {
    "contract": (pipeline.Contract, "of"),
    "analysis": (joints, "Sums"),
    "refusals": (find, "refusals"),
    "price": (price, "decide"),
    "rewrite": (merge_sums.Rewriter, "rewrite"),
    "merge": (merge_sums.Rewriter, "_merge"),
    "transients": (in_place_reads, "read_in_place"),
    "keep": (chains.Recompute, "mark"),
    "verify": (pipeline, "verify"),
}


@pytest.mark.parametrize(("where", "name"), FAULTS.values(), ids=FAULTS)
def test_a_failure_of_ours_is_one_warning(where: Any, name: str, monkeypatch) -> None:
    """Whatever stage fails, training goes on with the untouched graph."""
    monkeypatch.setattr(where, name, boom)
    assert_falls_back(because="Injected: on purpose")


def test_a_failure_of_ours_in_inference_is_one_warning(monkeypatch) -> None:
    """The same without gradients."""
    monkeypatch.setattr(pipeline, "verify", boom)
    module, inputs = Stack(), x(*T)()
    f = weight_form(module)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"^peft_fx"):
        got = f(*inputs)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(got, torch.compile(module, backend=plain)(*inputs))


def test_a_failure_of_ours_is_told_by_explain(monkeypatch) -> None:
    """explain before a compile foretells the failure instead of dying of it."""
    monkeypatch.setattr(pipeline, "verify", boom)
    report = peft_fx.explain(Stack(), *x(*T)())
    assert report.failures == ["Injected: on purpose"]
    assert "Injected: on purpose" in str(report)


# ----------------------------------------------------------------------------------------------- entry point, logging


BY_NAME = """
    import sys, torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.A, self.B = nn.Parameter(torch.randn(32, 2)), nn.Parameter(torch.randn(2, 32))

        def forward(self, x):
            return self.layer(x) + (x @ self.A) @ self.B

    print("peft_fx" in sys.modules)
    model = Model()
    options = {"peft_fx.lowering": "aot_eager", "peft_fx.form": "weight"}
    f = torch.compile(model, backend="peft_fx", options=options)
    f(torch.randn(8, 32)).sum().backward()
    assert model.A.grad is not None
    print([s.name for s in sys.modules["peft_fx"].explain(f).sites])
"""


def test_the_backend_has_a_name(tmp_path) -> None:
    """backend="peft_fx" works without importing peft_fx, from any folder, and says nothing."""
    done = python(BY_NAME, tmp_path)
    assert done.stdout.splitlines() == ["False", "['layer']"]
    assert "layer" not in done.stderr


def test_decisions_are_logged(tmp_path) -> None:
    """TORCH_LOGS="+peft_fx" prints each decision, with the prices that it came from."""
    done = python(BY_NAME, tmp_path, TORCH_LOGS="+peft_fx")
    (line,) = (line for line in done.stderr.splitlines() if "layer: forward weight" in line)
    assert "vs activation" in line


def test_refusals_are_logged(caplog) -> None:
    """With the reason."""
    case = Case("", lora(lambda x, W, A, B, s: x @ W + torch.relu(x @ A) @ B), x(*T))
    with caplog.at_level("DEBUG", "peft_fx"):
        module, inputs = case.make()
        weight_form(module)(*inputs)
    assert any("refused, nonlinear" in message for message in caplog.messages)


# --------------------------------------------------------------------------------------------------- between the calls


def assert_steps_agree(module: nn.Module, inputs: Any) -> None:
    """Three steps of SGD and momentum, compiled and in eager: the same integers throughout, without a recompile."""
    twin = copy.deepcopy(module)
    nets = (weight_form(module), module), (twin, twin)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.5) for _, m in nets]
    for _ in range(3):
        runs = []
        for (f, m), optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            y = f(*inputs)
            y.backward(torch.ones_like(y))
            runs.append(Run([y.detach()], [], {n: p.grad for n, p in m.named_parameters()}))
            optimizer.step()
        assert_bit_equal(*runs)
    assert_bit_equal(*(Run([], [], dict(m.named_parameters())) for _, m in nets))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_an_optimizer_step_is_followed() -> None:
    """W' is built from the weights as they are at each call."""
    module, _ = Case("", lora(scale_right), x(5, K)).make(torch.float64)
    integers(module, 1, 1)
    assert_steps_agree(module, integers((torch.zeros(5, K, dtype=torch.float64),), 2, 1))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_new_values_need_no_new_compile() -> None:
    """Adapters and base weights written to in place, and loaded from a state dict."""
    module = adapt(mlp(nn.ReLU))
    batch = integers((torch.zeros(9, 64),), 2, 1)
    f = weight_form(module)
    for seed in range(3):
        integers(module, seed, 1)
        assert_bit_equal(run(f, module, batch), run(module, module, batch))
    state = {name: torch.randint_like(p, -1, 2) for name, p in module.state_dict().items()}
    module.load_state_dict(state)
    assert_bit_equal(run(f, module, batch), run(module, module, batch))


def test_two_compiles_of_one_model_tell_apart() -> None:
    """Each compiled model is explained by its own compile, whatever the other was asked for."""
    module, inputs = Stack(), x(*T)()
    forms = {form: weight_form(module, **{"peft_fx.form": form}) for form in ("weight", "activation")}
    for f in forms.values():
        run(f, module, inputs)
    for form, f in forms.items():
        assert {(s.forward, s.input_grad) for s in peft_fx.explain(f).sites} == {(form, form)}
