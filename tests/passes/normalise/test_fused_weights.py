"""LoRA on bitsandbytes' layers: the delta joins the dequantised weight, which is never quantised again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_fx
from tests.support.oracle import Run, assert_no_worse, pooled, run, shuffle, to_dtype, weight_form

bnb = pytest.importorskip("bitsandbytes")

K, N, T = 128, 256, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def four_bit(layer: nn.Linear) -> Any:
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    return made.to("cpu")


def eight_bit(layer: nn.Linear) -> Any:
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


def adapt(base: nn.Module) -> Any:
    """LoRA with deltas about half as large as the weights."""
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["up", "down"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.09 * torch.randn(parameter.shape, generator=generator))
    return model


def make(quantise: Any) -> tuple[Any, Block]:
    """The adapted model on a quantised base, and its base with the weights dequantised."""
    torch.manual_seed(0)
    base = Block().to(torch.bfloat16)
    plain = copy.deepcopy(base)
    for name in ("up", "down"):
        layer = quantise(getattr(base, name))
        setattr(base, name, layer)
        eye = torch.eye(layer.in_features, dtype=torch.bfloat16)
        getattr(plain, name).weight.data = (layer(eye) - layer.bias).T.contiguous().detach()
    return adapt(base), plain


def reference(model: Any, plain: Block) -> Any:
    """The same adapters on the dequantised base, in fp64."""
    made = adapt(copy.deepcopy(plain))
    weights = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = weights[name].data.clone()
    made = made.double()
    for module in made.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    return made


@pytest.mark.parametrize("quantise", [four_bit, eight_bit])
def test_the_delta_joins_the_dequantised_weight(quantise: Any) -> None:
    """Both layers in weight form, no fused product left; no further from the dequantised model in fp64 than eager."""
    model, plain = make(quantise)
    x = torch.randn(2, T, K, dtype=torch.bfloat16, requires_grad=True)
    f = weight_form(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def of_adapters(r: Run) -> Run:
        return Run(r.y, r.inputs, {name: r.params[name] for name in trained})

    def once(seed: int) -> tuple[Run, ...]:
        shuffle(nn.ParameterList(trained.values()), seed)
        ref = reference(model, plain)
        ref64 = run(ref, ref, to_dtype((x,), torch.float64), seed)
        return tuple(of_adapters(r) for r in (ref64, *(run(g, model, (x,), seed) for g in (model, f))))

    assert_no_worse(*pooled(once))
    report = peft_fx.explain(f)
    assert [(s.forward, s.input_grad) for s in report.sites] == [("weight", "weight")] * 2, str(report)
    assert report.refusals == []


@pytest.mark.parametrize("quantise", [four_bit, eight_bit])
def test_explained_before_it_runs(quantise: Any) -> None:
    """The same sites, and the quantised numbers as they were."""
    model, _ = make(quantise)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    x = torch.randn(2, T, K, dtype=torch.bfloat16, requires_grad=True)
    report = peft_fx.explain(model, x, options={"peft_fx.form": "weight"})
    assert [(s.forward, s.input_grad) for s in report.sites] == [("weight", "weight")] * 2, str(report)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    run(model, model, (x,))  # and the layers still know their states


def test_left_fused_where_nothing_joins() -> None:
    """In activation form the fused product stays as bitsandbytes made it: eager's bits."""
    model, _ = make(four_bit)
    x = torch.randn(2, T, K, dtype=torch.bfloat16, requires_grad=True)
    f = weight_form(model, **{"peft_fx.form": "activation", "peft_fx.keep": "inductor"})
    got, eager = run(f, model, (x,)), run(model, model, (x,))
    assert torch.equal(got.y[0], eager.y[0])
    assert [s.forward for s in peft_fx.explain(f).sites] == ["activation"] * 2
