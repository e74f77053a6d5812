"""Architectures of transformers and diffusers, with random weights, as data; `ARCHITECTURES` are tiny ones, LoRA on all
their layers.

Sizes of those follow one pattern: two layers of width 64, 4 heads, 512 tokens. Dropout of a base is always off, so that
runs can be compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import peft_fx
from zoo.noise import disturb

# ------------------------------------------------------------------------------------------------------------ sizes

NAMES = {  # of sizes, in the configs of transformers
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"),
    "ffn": ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"),
    "heads": ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head": ("head_dim", "d_kv"),
    "tokens": ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"),
    "pad": ("pad_token_id",),
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
}
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout"),
    *("activation_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate", "drop_path_rate", "layerdrop"),
)


def named(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes under the names that a class of transformers' configs has for them; no dropout, no cache."""
    known = config().to_dict()
    found = {n: sizes[size] for size, names in NAMES.items() for n in names if size in sizes and n in known}
    return found | {n: 0.0 for n in DROPOUTS if n in known} | ({"use_cache": False} if "use_cache" in known else {})


def made(name: str, sizes: Mapping[str, Any], **options: Any) -> Any:
    """A model of transformers' by the name of its class, in some sizes, with further options of its config."""
    model = getattr(transformers, name)
    return model(model.config_class(**named(model.config_class, sizes) | options))


T, K, VOCAB = 256, 64, 128  # tokens of each of two sequences
TINY = {"vocab": VOCAB, "hidden": K, "ffn": 2 * K, "layers": 2, "heads": 4, "kv_heads": 2, "head": 16, "tokens": 2 * T}
TINY |= {"pad": 0, "bos": 1, "eos": 2}
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, with options of its config besides the sizes `TINY`; or one of diffusers, with all
    of its options.

    `inputs` names a batch of `BATCHES`; `lora` are LoRA's options besides the rank; `layers` says which layers get an
    adapter: "linear" (PEFT's "all-linear") or "convolutions" (those, and linear layers; not depthwise ones, whose
    groups the rank cannot be divided by).
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = "tokens"
    layers: str = "linear"
    lora: Mapping[str, Any] = field(default_factory=dict)
    library: str = "transformers"
    note: str = ""
    prompt: str = ""  # in LoRA's place a config of PEFT's that adds tokens or keys, and changes no layer
    already: str = ""

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model with LoRA, in training mode, its adapters away from their start, and a batch."""
        model = self.plain()
        if self.prompt:
            config = getattr(peft, self.prompt)(task_type="CAUSAL_LM", num_virtual_tokens=8)
            return peft_fx.loss_only(peft.get_peft_model(model, config)).train(), self.batch()
        options = {"r": 8, "lora_alpha": 16, **self.lora}
        if not options.keys() & {"target_parameters", "target_modules"}:
            options["target_modules"] = self._targets(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
        disturb(adapted, seed=0)
        return adapted, self.batch()

    def batch(self) -> dict[str, Any]:
        return BATCHES[self.inputs]()

    def plain(self) -> nn.Module:
        """The model without adapters, all of it trained."""
        torch.manual_seed(0)
        if self.library == "diffusers":
            return getattr(importlib.import_module("diffusers"), self.model)(**self.options).train()
        return made(self.model, TINY, **self.options).train()

    @property
    def described(self) -> str:
        return self.note

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.library,)

    def _targets(self, model: nn.Module) -> Any:
        """PEFT's "all-linear" leaves out the output layer, of transformers models alone."""
        if self.layers == "linear" and self.library == "transformers":
            return "all-linear"
        kinds = (nn.Linear,) if self.layers == "linear" else PRODUCTS
        return [n for n, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1]


T5 = {"decoder_start_token_id": 0}
WHISPER = {"max_source_positions": T, "max_target_positions": T, "num_mel_bins": 16, "decoder_start_token_id": 0}
SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 8}
PATCHES = {"image_size": 64, "patch_size": 4}
CLIP = {
    "text_config": named(transformers.CLIPTextConfig, TINY | {"tokens": T}),
    "vision_config": named(transformers.CLIPVisionConfig, TINY) | PATCHES,
}
MAMBA = {"hidden_size": 32, "state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 32,
    "patch_size": 2,
    "norm_num_groups": 4,
    "num_embeds_ada_norm": 10,
}
SD3 = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": K,
    "pooled_projection_dim": 32,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
UNET = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

# ---------------------------------------------------------------------------------------------------------- batches


def _tokens() -> Tensor:
    """Ids from 3: below are padding and other special tokens."""
    return torch.randint(3, VOCAB, (2, T), generator=torch.Generator().manual_seed(1))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "tokens": lambda: {"input_ids": _tokens(), "attention_mask": torch.ones(2, T, dtype=torch.long)},
    "tokens and labels": lambda: BATCHES["tokens"]() | {"labels": _tokens()},
    "encoder and decoder": lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens()},
    "pixels": lambda: {"pixel_values": _random(2, 3, 64, 64)},
    "speech": lambda: {"input_features": _random(2, 16, 2 * T), "decoder_input_ids": _tokens()},
    "text and pixels": lambda: {"input_ids": _tokens(), "pixel_values": _random(2, 3, 64, 64)},
    "class and latents": lambda: {
        "hidden_states": _random(2, 4, 32, 32),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 2]),
    },
    "prompt and latents": lambda: {
        "hidden_states": _random(2, 4, 32, 32),
        "encoder_hidden_states": _random(2, T, 32),
        "pooled_projections": _random(2, 32),
        "timestep": torch.tensor([3, 500]),
    },
    "prompt and packed latents": lambda: {
        "hidden_states": _random(2, T, 16),
        "encoder_hidden_states": _random(2, T, 32),
        "pooled_projections": _random(2, 32),
        "timestep": torch.tensor([0.1, 0.5]),
        "img_ids": _random(T, 3),
        "txt_ids": torch.zeros(T, 3),
    },
    "prompt and image": lambda: {
        "sample": _random(2, 4, 32, 32),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": _random(2, T, 32),
    },
}

# ----------------------------------------------------------------------------------------------------- architectures

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERT_WEIGHTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def diffusion(
    model: str, options: Mapping[str, Any], inputs: str, layers: str = "linear", note: str = ""
) -> Architecture:
    return Architecture(model, options, inputs, layers, library="diffusers", note=note)


def prompted(config: str, note: str) -> Architecture:
    """A Llama whose logits are most of a step, and that returns its loss alone."""
    options, already = {"vocab_size": 1 << 14}, "no layer is changed"
    batch = "tokens and labels"
    return Architecture("LlamaForCausalLM", options, batch, note=note, prompt=config, already=already)


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM"),
    "Qwen3": Architecture("Qwen3ForCausalLM"),
    "Gemma 3": Architecture("Gemma3ForCausalLM", {"sliding_window": 64}),
    "Mistral": Architecture("MistralForCausalLM", {"sliding_window": 64}),
    "Phi-3": Architecture("Phi3ForCausalLM", note="fused query, key and value; gate and up"),
    "GPT-2": Architecture(
        "GPT2LMHeadModel", {"n_positions": T, "n_inner": None}, lora={"fan_in_fan_out": True}, note="Conv1D"
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", note="fused query, key and value"),
    "OPT": Architecture("OPTForCausalLM", note="ReLU"),
    "Falcon": Architecture("FalconForCausalLM", note="parallel attention and MLP"),
    "Mixtral": Architecture("MixtralForCausalLM", EXPERTS, note="experts are parameters, not layers"),
    "Mixtral, experts": Architecture(
        "MixtralForCausalLM", EXPERTS, lora=EXPERT_WEIGHTS, note="LoRA's target_parameters"
    ),
    "BERT": Architecture("BertForMaskedLM"),
    "RoBERTa": Architecture("RobertaForMaskedLM"),
    "DeBERTa-v2": Architecture("DebertaV2ForMaskedLM", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "T5": Architecture("T5ForConditionalGeneration", T5, "encoder and decoder", note="ReLU"),
    "T5 v1.1": Architecture(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, "encoder and decoder"
    ),
    "Whisper": Architecture("WhisperForConditionalGeneration", WHISPER, "speech"),
    "ViT": Architecture("ViTModel", PATCHES, "pixels"),
    "Swin": Architecture("SwinModel", SWIN, "pixels", note="windows"),
    "CLIP": Architecture("CLIPModel", CLIP, "text and pixels"),
    "ConvNeXt": Architecture(
        "ConvNextModel",
        {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2},
        "pixels",
        "convolutions",
    ),
    "ResNet": Architecture(
        "ResNetModel",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
        "pixels",
        "convolutions",
        note="batch norms in training mode",
    ),
    "Mamba": Architecture(
        "MambaForCausalLM",
        MAMBA,
        lora={"target_modules": ["in_proj", "x_proj", "dt_proj"]},
        note="PEFT allows no other layers",
    ),
    "DiT": diffusion("DiTTransformer2DModel", DIT, "class and latents"),
    "SD3": diffusion("SD3Transformer2DModel", SD3, "prompt and latents"),
    "Flux": diffusion("FluxTransformer2DModel", FLUX, "prompt and packed latents"),
    "UNet": diffusion("UNet2DConditionModel", UNET, "prompt and image", "convolutions", note="cross-attention"),
    "Llama, prompt tuning": prompted("PromptTuningConfig", "8 tokens in front of the input"),
    "Llama, prefix tuning": prompted("PrefixTuningConfig", "8 keys and values a layer"),
    "Llama, P-tuning": prompted("PromptEncoderConfig", "8 tokens from a small encoder"),
}
