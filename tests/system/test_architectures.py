"""Transformers models with PEFT LoRA on all their linear layers: every adapter in weight form, forward and backward."""

from collections.abc import Callable

import pytest

import peft_fx
from tests.support.oracle import gate, weight_form
from tests.support.peft_models import adapt, bert, gpt2, layers, llama, roberta, t5, trained_inputs, vit


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2, bert, roberta, t5, vit])
def test_every_adapter_is_rewritten(make: Callable):
    """Every adapter a site in weight form, its input gradient too where there is one, no refusals; the gate."""
    model, batch = make()
    model = adapt(model, fan_in_fan_out=make is gpt2)
    f = weight_form(model)
    gate(f, model, batch)
    report = peft_fx.explain(f)
    assert report.refusals == []
    assert report.graph_breaks == []
    assert {s.name: s.forward for s in report.sites} == dict.fromkeys(layers(model), "weight")
    assert {s.name for s in report.sites if s.input_grad == "weight"} == trained_inputs(model, batch)
    assert sum(s.tokens >= 512 for s in report.sites) >= len(report.sites) - 1  # but for a pooler
