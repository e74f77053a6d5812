"""Small models with real PEFT LoRA on every linear layer, the deltas half as large as the weights they adapt."""

from __future__ import annotations

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.support.oracle import Inputs, apply
from zoo.architectures import made, named

VOCAB = 128


def adapt(model: nn.Module, autocast: bool = True, dtype: torch.dtype | None = None, **config) -> nn.Module:
    """LoRA on all linear layers (or as configured); `dtype` is the base's, `autocast` PEFT's fp32 adapters."""
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **config})
    model = get_peft_model(model.to(dtype or torch.float32), config, autocast_adapter_dtype=autocast)
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """‖sBA‖ = ‖W‖/2 for every adapter: PEFT starts at B = 0, where a rewrite has nothing to get wrong."""
    g = torch.Generator().manual_seed(3)
    for layer in layers(model).values():
        for name, a in layer.lora_A.items():
            b = layer.lora_B[name].weight
            b.copy_(torch.randn(b.shape, generator=g))
            delta = layer.scaling[name] * (b.float() @ a.weight.float())
            b.mul_(layer.get_base_layer().weight.float().norm() / (2 * delta.norm()))


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def trained_inputs(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the adapted layers whose input needs a gradient, as eager tells."""
    found = set()

    def note(name):
        return lambda layer, args: found.add(name) if args[0].requires_grad else None

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers(model).items()]
    apply(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def mlp(act: type[nn.Module] = nn.SiLU) -> nn.Module:
    """Three layers. With ReLU integers stay integers.

    For the gate the activation is smooth: what errs behind a ReLU in bf16 is the sign of the few values near zero, and
    where xW and sxAB cancel, PEFT's two roundings are smaller than they are elsewhere, the rounding of W' is not.
    """
    return nn.Sequential(nn.Linear(64, 128), act(), nn.Linear(128, 96), act(), nn.Linear(96, 80))


def tokens(batch: int = 2, length: int = 256) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def llama_config(hidden: int, ffn: int, layers: int, vocab: int = VOCAB, heads: int = 4) -> tf.LlamaConfig:
    """Two query heads for each head of keys."""
    sizes = {"hidden": hidden, "ffn": ffn, "layers": layers, "vocab": vocab, "heads": heads, "kv_heads": heads // 2}
    return tf.LlamaConfig(**named(tf.LlamaConfig, sizes))


def t5_config(hidden: int, ffn: int, layers: int, vocab: int = VOCAB) -> tf.T5Config:
    """T5 v1.1, gated feed-forward; so many layers in the encoder, and in the decoder."""
    sizes = {"hidden": hidden, "ffn": ffn, "layers": layers, "vocab": vocab, "heads": 4, "head": hidden // 4}
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    return tf.T5Config(**named(tf.T5Config, sizes), **options)


SIZES = {"hidden": 128, "ffn": 256, "layers": 2, "heads": 4, "vocab": VOCAB, "tokens": 256}


def llama() -> tuple[nn.Module, dict]:
    return tf.LlamaForCausalLM(llama_config(128, 256, 2)), {"input_ids": tokens()}


def gpt2() -> tuple[nn.Module, dict]:
    return made("GPT2LMHeadModel", SIZES, n_inner=None), {"input_ids": tokens()}


def bert() -> tuple[nn.Module, dict]:
    return made("BertForMaskedLM", SIZES | {"tokens": 512}), attended()


def roberta() -> tuple[nn.Module, dict]:
    return made("RobertaModel", SIZES | {"tokens": 258}, pad_token_id=1), attended()


def attended() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 256, dtype=torch.long)}


def t5() -> tuple[nn.Module, dict]:
    """A layer of the encoder, a layer of the decoder."""
    return tf.T5ForConditionalGeneration(t5_config(128, 256, 1)), {"input_ids": tokens(), "decoder_input_ids": tokens()}


def vit() -> tuple[nn.Module, dict]:
    """2 images of 256 patches and a class token."""
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return made("ViTModel", SIZES, image_size=64, patch_size=4), {"pixel_values": pixels}
