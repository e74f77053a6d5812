"""Real PEFT LoRA, every option that a linear layer can carry, on an MLP and on small transformers."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import peft_fx
from tests.support.oracle import Run, assert_bit_equal, gate, integers, run, weight_form
from tests.support.peft_models import adapt, fill, gpt2, layers, llama, mlp, tokens, trained_inputs

T = 512


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor]:
    x = torch.randn(T, 64, generator=torch.Generator().manual_seed(2))
    return (x.to(dtype).requires_grad_(),)


def integer_run(f: Callable, model: nn.Module, batch) -> Run:
    """A step on parameters and inputs of -1, 0 and 1."""
    integers(model, 1, 1), integers(batch, 2, 1)
    return run(f, model, batch)


def assert_rewritten(f: Callable, model: nn.Module, batch) -> None:
    """Each adapted layer is a site, in weight form forward and, where its input needs one, in the input gradient."""
    report = peft_fx.explain(f)
    assert report.refusals == []
    assert report.graph_breaks == []
    assert {s.name for s in report.sites} == set(layers(model)), str(report)
    assert {s.name for s in report.sites if s.forward == "weight"} == set(layers(model)), str(report)
    assert {s.name for s in report.sites if s.input_grad == "weight"} == trained_inputs(model, batch), str(report)


CONFIGS = {
    "default": {},
    "rslora": {"use_rslora": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "rank_one": {"r": 1},
    "scale_one": {"r": 16, "lora_alpha": 16},
    "rank_pattern": {"rank_pattern": {"0": 3, "4": 12}, "alpha_pattern": {"2": 4}},
    "modules_to_save": {"target_modules": ["0", "2"], "modules_to_save": ["4"]},
    "one_layer": {"target_modules": ["2"]},
    "dropout_zero": {"lora_dropout": 0.0},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_is_rewritten(config: dict):
    """In fp32: all sites, and the fp64 gate."""
    model, batch = adapt(mlp(), **config), inputs()
    f = weight_form(model)
    gate(f, model, batch)
    assert_rewritten(f, model, batch)


EXACT = {name: config for name, config in CONFIGS.items() if name not in ("rslora", "rank_pattern")}


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
def test_config_is_bit_equal_on_integers(config: dict):
    """Where PEFT's scale is a power of two and the activation a ReLU, no operation rounds."""
    model, batch = adapt(mlp(nn.ReLU), **config), inputs()
    f = weight_form(model)
    assert_bit_equal(*(integer_run(g, model, batch) for g in (f, model)))
    assert_rewritten(f, model, batch)


DTYPES = {
    "fp16_base": (torch.float16, True),
    "fp16": (torch.float16, False),
    "bf16_base": (torch.bfloat16, True),
    "bf16": (torch.bfloat16, False),
}


@pytest.mark.parametrize(("dtype", "autocast"), DTYPES.values(), ids=DTYPES)
def test_dtype_is_rewritten(dtype: torch.dtype, autocast: bool):
    """The base in `dtype`, the adapters in fp32 (PEFT's autocast_adapter_dtype) or in the base's."""
    model, batch = adapt(mlp(), dtype=dtype, autocast=autocast), inputs(dtype)
    f = weight_form(model)
    gate(f, model, batch)
    assert_rewritten(f, model, batch)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32_base", "bf16_base"])
def test_autocast_is_rewritten(base: torch.dtype):
    """torch.autocast around the compiled model."""
    model, batch = adapt(mlp(), dtype=base), inputs(base)
    compiled = weight_form(model)

    def under_autocast(f: Callable) -> Callable:
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return f(x)

        return call

    gate(under_autocast(compiled), model, batch, eager=under_autocast(model))
    report = peft_fx.explain(compiled)
    assert report.refusals == []
    assert {(s.forward, s.input_grad) for s in report.sites} == {("weight", "weight")}
    assert {s.name for s in report.sites} == set(layers(model))


def two_adapters() -> nn.Module:
    model = adapt(mlp(nn.ReLU))
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]))
    fill(model)
    return model


def test_two_active_adapters_are_merged():
    """Two adapters of different rank on each layer, both active, become one weight."""
    model, batch = two_adapters(), inputs()
    model.base_model.set_adapter(["default", "other"])
    f = weight_form(model)
    gate(f, model, batch)
    assert_rewritten(f, model, batch)
    assert_bit_equal(*(integer_run(g, model, batch) for g in (f, model)))


def test_adapter_switch_is_followed():
    """After set_adapter the compiled model gives the other adapter's results."""
    model, batch = two_adapters(), inputs()
    f = weight_form(model)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert_bit_equal(*(integer_run(g, model, batch) for g in (f, model)))


def test_disabled_adapters_leave_nothing_to_do():
    """Under disable_adapter there is neither site nor refusal."""
    model, batch = adapt(mlp(nn.ReLU)), inputs()
    f = weight_form(model)
    with model.disable_adapter():
        assert_bit_equal(*(integer_run(g, model, batch) for g in (f, model)))
    report = peft_fx.explain(f)
    assert (report.sites, report.refusals) == ([], [])


def test_dropout_in_training_is_refused_and_untouched(monkeypatch):
    """lora_dropout > 0 in training: refused as `dropout`, with the bits of the same lowering without peft_fx."""

    def step():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = adapt(mlp(), lora_dropout=0.1).train()
        f = weight_form(model)
        torch.manual_seed(5)
        return run(f, model, inputs()), f, model

    got, f, model = step()
    report = peft_fx.explain(f)
    assert {(r.name, r.code) for r in report.refusals} == {(name, "dropout") for name in layers(model)}
    assert not any(s.forward == "weight" for s in report.sites)
    monkeypatch.setenv("PEFT_FX_DISABLE", "1")
    assert_bit_equal(got, step()[0])


def test_dropout_in_eval_is_rewritten():
    """The same model in eval mode has no dropout to refuse; back in training it is refused again."""
    model, batch = adapt(mlp(), lora_dropout=0.1).eval(), inputs()
    f = weight_form(model)
    gate(f, model, batch)
    assert_rewritten(f, model, batch)
    model.train()
    run(f, model, batch)
    assert "dropout" in {r.code for r in peft_fx.explain(f).refusals}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_rewritten(mode):
    """Without gradients: every site's forward, no input gradient."""
    model, batch = adapt(mlp(nn.ReLU)).eval(), inputs()
    integers(model, 1, 1), integers(batch, 2, 1)
    f = weight_form(model)
    with mode():
        assert torch.equal(f(*batch), model(*batch))
    report = peft_fx.explain(f)
    assert {s.name for s in report.sites} == set(layers(model))
    assert {(s.forward, s.input_grad) for s in report.sites} == {("weight", "none")}


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32_adapters", "bf16_adapters"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_bf16_transformer_is_rewritten(make: Callable, autocast: bool):
    """A Llama and a GPT-2 (Conv1D weights, fan_in_fan_out) in bf16; fp32 is tested with the other architectures."""
    model, _ = make()
    batch = {"input_ids": tokens(length=32)}  # few: CPUs without bf16 units multiply bf16 at 1 GFLOP/s
    model = adapt(model, autocast, torch.bfloat16, fan_in_fan_out=make is gpt2)
    f = weight_form(model)
    gate(f, model, batch)
    assert_rewritten(f, model, batch)


def test_gradients_accumulate_over_two_backwards():
    """Two steps without zero_grad add up as in eager."""
    model, batch = adapt(mlp(nn.ReLU)), inputs()
    integers(model, 1, 1), integers(batch, 2, 1)
    f, twin = weight_form(model), copy.deepcopy(model)
    for net, module in ((f, model), (twin, twin)):
        for _ in range(2):
            net(*batch).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in module.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)
