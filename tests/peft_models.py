"""Small models with real PEFT LoRA on every linear layer, the deltas half as large as the weights they adapt."""

from __future__ import annotations

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.oracle import Inputs, apply

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
    return tf.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=vocab,
        use_cache=False,
    )


def t5_config(hidden: int, ffn: int, layers: int, vocab: int = VOCAB) -> tf.T5Config:
    """T5 v1.1, gated feed-forward; so many layers in the encoder, and in the decoder."""
    return tf.T5Config(
        d_model=hidden,
        d_kv=hidden // 4,
        d_ff=ffn,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=4,
        vocab_size=vocab,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )


def llama() -> tuple[nn.Module, dict]:
    return tf.LlamaForCausalLM(llama_config(128, 256, 2)), {"input_ids": tokens()}


def gpt2() -> tuple[nn.Module, dict]:
    config = tf.GPT2Config(
        n_embd=128,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return tf.GPT2LMHeadModel(config), {"input_ids": tokens()}


def encoder(model: type, config: type, **extra) -> tuple[nn.Module, dict]:
    """BERT and RoBERTa differ by name only."""
    config = config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **extra,
    )
    return model(config), {"input_ids": tokens(), "attention_mask": torch.ones(2, 256, dtype=torch.long)}


def bert() -> tuple[nn.Module, dict]:
    return encoder(tf.BertForMaskedLM, tf.BertConfig)


def roberta() -> tuple[nn.Module, dict]:
    return encoder(tf.RobertaModel, tf.RobertaConfig, max_position_embeddings=258, pad_token_id=1)


def t5() -> tuple[nn.Module, dict]:
    """A layer of the encoder, a layer of the decoder."""
    return tf.T5ForConditionalGeneration(t5_config(128, 256, 1)), {"input_ids": tokens(), "decoder_input_ids": tokens()}


def vit() -> tuple[nn.Module, dict]:
    """2 images of 256 patches and a class token."""
    config = tf.ViTConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return tf.ViTModel(config), {"pixel_values": pixels}
