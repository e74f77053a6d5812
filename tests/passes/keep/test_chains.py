"""What backward keeps: with adapters in weight form no more than the frozen model without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.fx import Graph, Node

import peft_fx
from peft_fx import compat
from peft_fx.inputs import roles_in
from peft_fx.passes.analyse.flow import Flow
from peft_fx.passes.graph.nodes import aten, prims, value
from tests.support import joint
from tests.support.peft_models import VOCAB, adapt, llama_config, t5_config
from tests.support.peft_models import layers as adapted
from tests.support.peft_models import tokens as draw_tokens
from tests.support.spellings import frozen, trained
from zoo.architectures import named

WEIGHT = {"peft_fx.form": "weight"}
BATCH, LENGTH, H, FFN, R = 2, 64, 64, 160, 8
Make = Callable[[int], tuple[nn.Module, dict[str, Tensor]]]  # of a number of layers
FP32, BF16 = torch.float32, torch.bfloat16
MARGIN = 1.02


def ids() -> Tensor:
    return draw_tokens(BATCH, LENGTH)


def llama(layers: int) -> tuple[nn.Module, dict]:
    return tf.LlamaForCausalLM(llama_config(H, FFN, layers)), {"input_ids": ids()}


def sized(kind: Any, layers: int, **options: Any) -> Any:
    sizes = {"hidden": H, "ffn": FFN, "heads": 4, "layers": layers, "vocab": VOCAB, "tokens": LENGTH}
    return kind(**named(kind, sizes), **options)


def gpt2(layers: int) -> tuple[nn.Module, dict]:
    return tf.GPT2Model(sized(tf.GPT2Config, layers)), {"input_ids": ids()}


def bert(layers: int) -> tuple[nn.Module, dict]:
    return tf.BertModel(sized(tf.BertConfig, layers), add_pooling_layer=False), {"input_ids": ids()}


def vit(layers: int) -> tuple[nn.Module, dict]:
    model = tf.ViTModel(sized(tf.ViTConfig, layers, image_size=32, patch_size=4), add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def t5(layers: int) -> tuple[nn.Module, dict]:
    """As many in the encoder and the decoder together."""
    return tf.T5Model(t5_config(H, FFN, layers // 2)), {"input_ids": ids(), "decoder_input_ids": ids()}


def opt(layers: int) -> tuple[nn.Module, dict]:
    return tf.OPTModel(sized(tf.OPTConfig, layers)), {"input_ids": ids()}


@cache
def without_adapters(make: Make, dtype: torch.dtype, layers: int) -> int:
    """Bytes that Inductor keeps of the frozen model, with a gradient going all the way to the embeddings."""
    model, inputs = make(layers)
    model.to(dtype).requires_grad_(False)
    train_embeddings(model)
    kept = peft_fx.explain(model, **in_dtype(inputs, dtype), options=WEIGHT).kept_bytes
    assert kept["after"] == kept["before"], "there is nothing here for us to change"
    return kept["before"]


def with_adapters(make: Make, dtype: torch.dtype, layers: int, **config: Any) -> int:
    """Bytes that are kept of the same with LoRA on every linear layer, rewritten."""
    base, inputs = make(layers)
    model = adapt(base, dtype=dtype, r=R, **config).train()
    train_embeddings(base)
    report = peft_fx.explain(model, **in_dtype(inputs, dtype), options=WEIGHT)
    assert len(report.sites) + len(report.refusals) == len(adapted(model))
    return report.kept_bytes["after"]


def train_embeddings(model: nn.Module) -> None:
    embedding = model.get_input_embeddings()
    first = embedding.weight if hasattr(embedding, "weight") else model.embeddings.position_embeddings
    first.requires_grad_(True)


def in_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}


SETTINGS = {
    "peft_default": (BF16, {}),
    "bf16": (BF16, {"autocast": False}),
    "fp32": (FP32, {}),
    "peft_default_dropout": (BF16, {"lora_dropout": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "config"), SETTINGS.values(), ids=SETTINGS)
def test_a_layer_of_llama_keeps_what_it_keeps_without_adapters(dtype: torch.dtype, config: dict) -> None:
    """What a second layer adds is at most 1.02 times as much, in each dtype setting, and with LoRA dropout."""
    more = with_adapters(llama, dtype, 2, **config) - with_adapters(llama, dtype, 1, **config)
    assert more <= MARGIN * (without_adapters(llama, dtype, 2) - without_adapters(llama, dtype, 1))


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, bert, t5, vit])
def test_architecture_keeps_what_it_keeps_without_adapters(make: Make) -> None:
    """The same of two layers of other models without a head, with PEFT's default dtypes on a bf16 base."""
    config = {"fan_in_fan_out": True} if make is gpt2 else {}
    assert with_adapters(make, BF16, 2, **config) <= MARGIN * without_adapters(make, BF16, 2)


@pytest.mark.slow
def test_behind_a_relu_the_input_is_kept_once() -> None:
    """The frozen model keeps a bool mask, from which relu's result cannot be rebuilt: one copy, in the base's dtype."""
    once = BATCH * LENGTH * FFN * BF16.itemsize
    assert with_adapters(opt, BF16, 2) <= MARGIN * without_adapters(opt, BF16, 2) + 2 * once


VECTORS: dict[str, Any] = {
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "up_proj"], feedforward_modules=[]),
    "vera": peft.VeraConfig(target_modules="all-linear", r=R),
    "dora": peft.LoraConfig(target_modules="all-linear", r=R, use_dora=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", VECTORS.values(), ids=VECTORS)
def test_vectors_behind_a_layer_do_not_keep_its_result(config: peft.PeftConfig) -> None:
    """Their gradients come from xᵀ·dy: a second layer keeps what the frozen one does."""

    def kept(layers: int) -> int:
        base, inputs = llama(layers)
        model = peft_fx.prepare(peft.get_peft_model(base.to(BF16), config).train())
        train_embeddings(base)
        report = peft_fx.explain(model, **inputs, options=WEIGHT)
        assert report.graphs == 1
        assert report.refusals == []
        return report.kept_bytes["after"]

    frozen = without_adapters(llama, BF16, 2) - without_adapters(llama, BF16, 1)
    assert kept(2) - kept(1) <= MARGIN * frozen


# ----------------------------------------------------------------------------------------------------------- LoRA-FA


class Behind(nn.Module):
    """An adapted layer whose input no chain of pointwise ops rebuilds, and whose own backward keeps nothing of it."""

    def __init__(self, trainable: str):
        super().__init__()
        self.W, self.A, self.B = frozen(H, FFN), trained(H, R), trained(R, FFN)
        for name, p in self.named_parameters():
            p.requires_grad_(name in trainable)

    def forward(self, z: Tensor) -> Tensor:
        x = z.cumsum(0)
        return x @ self.W + (x @ self.A) @ self.B


CASES = {"": 0, "B": LENGTH * R, "A": LENGTH * H, "AB": LENGTH * H}


@pytest.mark.parametrize(("trainable", "numbers"), CASES.items(), ids=lambda v: str(v) or "frozen")
def test_an_input_is_kept_only_where_a_gradient_reads_it(trainable: str, numbers: int) -> None:
    """LoRA-FA (A frozen): x·A of r columns, not x. With A trained x, and not x·A, which x gives again."""
    z = torch.randn(LENGTH, H, requires_grad=True)
    assert peft_fx.explain(Behind(trainable), z, options=WEIGHT).kept_bytes["after"] == 4 * numbers


def test_no_copy_of_the_input_is_kept_in_the_adapters_dtype() -> None:
    """bf16 x and fp32 adapters: x is kept as it is."""
    model = Behind("AB")
    model.W.data = model.W.data.to(BF16)

    def forward(z: Tensor) -> Tensor:
        x = z.cumsum(0)
        return x @ model.W + ((x.float() @ model.A) @ model.B).to(BF16)

    model.forward = forward
    z = torch.randn(LENGTH, H, dtype=BF16, requires_grad=True)
    kept = peft_fx.explain(model, z, options=WEIGHT).kept_bytes
    assert kept["after"] == 2 * LENGTH * H < kept["before"]


# ------------------------------------------------------------------------------------------------------------ the tags


@cache
def captured(dropout: float = 0.0) -> joint.Joint:
    """The joint graph of a two-layer Llama in PEFT's default dtypes, with Inductor's own random draws."""
    torch.manual_seed(0)
    model, inputs = llama(2)
    model = adapt(model, dtype=BF16, r=R, lora_dropout=dropout).train()
    real = compat.compile_fx

    def with_seeds(*args: Any, config_patches: dict, **kwargs: Any) -> Any:
        return real(*args, config_patches=config_patches | {"fallback_random": False}, **kwargs)

    with patch.object(compat, "compile_fx", with_seeds):
        return joint.capture(model, **inputs)


def tagged(graph: Graph, case: joint.Joint) -> list[Node]:
    """The nodes to rebuild but for W', which depends on weights alone."""
    flow = Flow(graph, roles_in(graph, case.roles))
    return [n for n in graph.nodes if "recompute" in n.meta and not flow.is_weight(n)]


def test_keep_inductor_marks_nothing() -> None:
    """Only W' is rebuilt; what else is kept is for Inductor to say."""
    graph, outcome = captured().rewritten(form="weight", keep="inductor")
    assert {s.forward for s in outcome.sites} == {"weight"}
    assert outcome.rebuilt == 0
    assert tagged(graph, captured()) == []
    assert any("recompute" in n.meta for n in graph.nodes)


def test_keep_recompute_marks_as_many_as_it_says() -> None:
    """The counterpart: tags there are, and each on a node of forward."""
    graph, outcome = captured().rewritten(form="weight")
    flow = Flow(graph, roles_in(graph, captured().roles))
    nodes = tagged(graph, captured())
    assert 0 < len(nodes) <= outcome.rebuilt
    assert flow.backward.isdisjoint(nodes)


COPIES = {aten.cat.default, aten.clone.default, aten._unsafe_view.default, aten.reshape.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


DRAWS = {aten.rand.default}


def is_cheap(node: Node) -> bool:
    """Pointwise, a layout, a random draw, or a product with few columns: r, or the two halves of a factor's bits."""
    if node.target in PRODUCTS:
        return value(node).shape[-1] <= 2 * R
    tags = getattr(node.target, "tags", ())
    is_cast = node.target is prims.convert_element_type.default
    return (
        torch.Tag.pointwise in tags
        or getattr(node.target, "is_view", False)
        or node.target in COPIES
        or is_cast
        or node.target in DRAWS
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_cheap_nodes_are_rebuilt(dropout: float) -> None:
    """No product as wide as a layer, no reduction, no attention."""
    case = captured(dropout)
    graph, _ = case.rewritten(form="weight")
    dear = [n.format_node() for n in tagged(graph, case) if not is_cheap(n)]
    assert dear == []


class Narrowing(nn.Module):
    """IA3 on a layer with a quarter of its input's features."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.l = frozen(H, H // 4), nn.Parameter(torch.ones(H // 4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.W) * self.l).relu()


def test_a_layers_own_product_is_not_rebuilt() -> None:
    """However few columns it has: that is no x·A."""
    case = joint.trace(Narrowing(), torch.ones(LENGTH, H, requires_grad=True))
    graph, outcome = case.rewritten()
    assert {(s.forward, s.adapter_grad) for s in outcome.sites} == {("activation", "low_rank")}
    assert not {n.target for n in tagged(graph, case)} & PRODUCTS


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_residual_stream_is_not_rebuilt(dropout: float) -> None:
    """Of the sums of two layers' outputs none is tagged: one would pull in all before it."""
    case = captured(dropout)
    graph, _ = case.rewritten(form="weight")
    flow = Flow(graph, roles_in(graph, case.roles))
    stream = residual_sums(graph, flow)
    assert len(stream) == 4
    assert not stream & set(tagged(graph, case))


def residual_sums(graph: Graph, flow: Flow) -> set[Node]:
    """The stream begins at the embedding; what adds to it goes on with it."""
    (start,) = (n for n in graph.nodes if n.target is aten.embedding.default)
    stream = {start}
    for node in graph.nodes:
        if node.target is aten.add.Tensor and node not in flow.backward and stream & set(node.args):
            stream.add(node)
    return stream - {start}


def test_attention_is_not_rebuilt() -> None:
    """Not even where its operands are there anyway: it is as dear as a layer."""

    class Attention(Behind):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            h = nn.functional.scaled_dot_product_attention(q, k, v)
            return h @ self.W + (h @ self.A) @ self.B

    case = joint.capture(Attention("AB"), *(torch.randn(1, 2, LENGTH, H) for _ in "qkv"))
    graph, outcome = case.rewritten(form="weight")
    assert len(outcome.sites) == 1
    assert any("attention" in str(n.target) for n in graph.nodes)
    assert not [n for n in tagged(graph, case) if "attention" in str(n.target)]


def test_eager_random_draws_are_not_repeated() -> None:
    """Without Inductor's seeds a mask drawn again would be another mask."""
    case = captured(0.1)
    graph, _ = case.rewritten(form="weight", lowering="aot_eager")
    flow = Flow(graph, roles_in(graph, case.roles))
    assert sum(n.target in DRAWS for n in graph.nodes) == 14
    assert not [n for n in tagged(graph, case) if n.target in DRAWS or flow.is_mask(n)]


def test_masks_are_drawn_again_by_inductor() -> None:
    """There the seed is all that is kept of them: every draw is tagged."""
    case = captured(0.1)
    graph, _ = case.rewritten(form="weight")
    draws = {n for n in graph.nodes if n.target in DRAWS}
    assert len(draws) == 14
    assert draws <= set(tagged(graph, case))
