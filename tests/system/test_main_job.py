"""The main job: a Llama with PEFT LoRA on every linear layer, in the three dtype settings that people train in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import peft_fx
from peft_fx import compiling
from tests.support.peft_models import adapt, llama_config

# A rank and a number of tokens that are no other size of the model. All of them are small, for a CPU without bf16 units
# multiplies bf16 a hundred times slower than fp32.
T, R, LAYERS = 320, 12, 2
H, FFN, VOCAB = 64, 176, 128
SETTINGS = {
    "fp32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "bf16 base, fp32 adapters": (torch.bfloat16, True),
}


def model(dtype: torch.dtype, autocast: bool) -> nn.Module:
    from transformers import LlamaForCausalLM

    config = llama_config(H, FFN, LAYERS, vocab=VOCAB)
    return adapt(LlamaForCausalLM(config).to(dtype), autocast=autocast, r=R)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The partitioned graphs, forward and backward, that would reach code generation."""
    graphs: list[GraphModule] = []
    real = compiling._run_eagerly
    monkeypatch.setattr(compiling, "_run_eagerly", lambda gm, *a, **kw: graphs.append(gm) or real(gm, *a, **kw))
    return graphs


def products(gm: GraphModule, *sizes: int) -> int:
    """Products that have all of these among the sizes of their operands."""
    found = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and "mm" in str(node.target):
            of = {n for a in node.all_input_nodes for n in a.meta["val"].shape}
            found += of.issuperset(sizes)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_adapter_is_rewritten(setting: str, lowered: list[GraphModule]) -> None:
    """Seven sites in each layer, forward and input gradient in weight form, nothing of [T, r] left in forward, and less
    kept than by Inductor alone."""
    module = model(*SETTINGS[setting])
    ids = torch.randint(0, VOCAB, (1, T))
    batch = {"input_ids": ids, "labels": ids}
    options = {"peft_fx.form": "weight", "peft_fx.lowering": "aot_eager"}
    compiled = torch.compile(module, backend=peft_fx.backend, options=options)
    compiled(**batch).loss.backward()
    report = peft_fx.explain(compiled)
    assert len(report.sites) == 7 * LAYERS, str(report)
    assert report.refusals == [], str(report)
    assert {s.forward for s in report.sites} == {"weight"}
    without = [s.name.rpartition(".")[2] for s in report.sites if s.input_grad != "weight"]
    assert without == ["q_proj", "k_proj", "v_proj"], "the first layer's input needs no gradient, all others do"
    forward = lowered[0]
    assert products(forward, T) > 7 * LAYERS, "the products of the model itself"
    assert products(forward, T, R) == 0
    explained = peft_fx.explain(module, options=options, **batch)
    assert [(s.name, s.forward, s.input_grad) for s in explained.sites] == [
        (s.name, s.forward, s.input_grad) for s in report.sites
    ]
    assert explained.kept_bytes["after"] < 0.75 * explained.kept_bytes["before"]
