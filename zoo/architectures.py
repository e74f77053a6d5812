"""Architectures of transformers and diffusers, tiny and with random weights, as data: LoRA on all their layers.

Sizes follow one pattern: two layers of width 64, 4 heads, 512 tokens; dropout is off, so that runs can be compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peft_fx
from zoo.methods import disturb

T, K, VOCAB = 256, 64, 128  # tokens of each of two sequences
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Architecture:
    """A model class of a library and its config's options, in the sizes of `SIZES` where these have their names.

    `inputs` names a batch of `BATCHES`; `lora` are LoRA's options besides the rank; `layers` says which layers get an
    adapter: "linear" (PEFT's "all-linear") or "convolutions" (those, and linear layers; not depthwise ones, whose
    groups the rank cannot be divided by).
    """

    model: str
    config: str
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
            options["target_modules"] = _convolutions(model) if self.layers == "convolutions" else _linear(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
        disturb(adapted, seed=0)
        return adapted, self.batch()

    def batch(self) -> dict[str, Any]:
        return BATCHES[self.inputs]()

    def plain(self) -> nn.Module:
        """The model without adapters, all of it trained."""
        torch.manual_seed(0)
        library = importlib.import_module(self.library)
        model = getattr(library, self.model)
        if self.config:
            config = getattr(library, self.config)
            model = model(config(**_known(config, SIZES) | dict(self.options)))
        else:  # diffusers: the options are the model's own
            model = model(**self.options)
        return model.train()  # type: ignore[no-any-return]

    @property
    def described(self) -> str:
        return self.note

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.library,)


def _known(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a config has under these names."""
    names = config().to_dict()
    return {name: size for name, size in sizes.items() if name in names}


def _linear(model: nn.Module) -> Any:
    """PEFT's "all-linear" leaves out the output layer, of transformers models alone."""
    from transformers import PreTrainedModel

    return "all-linear" if isinstance(model, PreTrainedModel) else _names(model, (nn.Linear,))


def _convolutions(model: nn.Module) -> list[str]:
    return _names(model, PRODUCTS)


def _names(model: nn.Module, kinds: tuple[type, ...]) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1]


# ------------------------------------------------------------------------------------------------------------ sizes

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": K,
    "intermediate_size": 2 * K,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2 * T,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    **dict.fromkeys(
        (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "hidden_dropout",
            "attention_dropout",
            "dropout",
            "activation_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "dropout_rate",
            "drop_path_rate",
            "layerdrop",
        ),
        0.0,
    ),
}
GPT2 = {"n_embd": K, "n_layer": 2, "n_head": 4, "n_positions": T}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
T5 = {"d_model": K, "d_kv": 16, "d_ff": 2 * K, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
WHISPER = {
    "d_model": K,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * K,
    "decoder_ffn_dim": 2 * K,
    "max_source_positions": T,
    "max_target_positions": T,
    "num_mel_bins": 16,
    "decoder_start_token_id": 0,
}
SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 8}
CLIP_TEXT = {n: v for n, v in SIZES.items() if n in ("vocab_size", "hidden_size", "intermediate_size")} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": T,
    "eos_token_id": 2,
}
CLIP_VISION = {
    "hidden_size": K,
    "intermediate_size": 2 * K,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
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

EXPERT_WEIGHTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def diffusion(
    model: str, options: Mapping[str, Any], inputs: str, layers: str = "linear", note: str = ""
) -> Architecture:
    return Architecture(model, "", options, inputs, layers, library="diffusers", note=note)


def prompted(config: str, note: str) -> Architecture:
    """A Llama whose logits are most of a step, and that returns its loss alone."""
    options, already = {"vocab_size": 1 << 14}, "no layer is changed"
    batch = "tokens and labels"
    return Architecture("LlamaForCausalLM", "LlamaConfig", options, batch, note=note, prompt=config, already=already)


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig"),
    "Qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config"),
    "Gemma 3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {"sliding_window": 64}),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig", {"sliding_window": 64}),
    "Phi-3": Architecture("Phi3ForCausalLM", "Phi3Config", note="fused query, key and value; gate and up"),
    "GPT-2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2, lora={"fan_in_fan_out": True}, note="Conv1D"),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", note="fused query, key and value"),
    "OPT": Architecture("OPTForCausalLM", "OPTConfig", {"ffn_dim": 2 * K, "word_embed_proj_dim": K}, note="ReLU"),
    "Falcon": Architecture("FalconForCausalLM", "FalconConfig", note="parallel attention and MLP"),
    "Mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", EXPERTS, note="experts are parameters, not layers"),
    "Mixtral, experts": Architecture(
        "MixtralForCausalLM", "MixtralConfig", EXPERTS, lora=EXPERT_WEIGHTS, note="LoRA's target_parameters"
    ),
    "BERT": Architecture("BertForMaskedLM", "BertConfig"),
    "RoBERTa": Architecture("RobertaForMaskedLM", "RobertaConfig"),
    "DeBERTa-v2": Architecture(
        "DebertaV2ForMaskedLM", "DebertaV2Config", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "T5": Architecture("T5ForConditionalGeneration", "T5Config", T5, "encoder and decoder", note="ReLU"),
    "T5 v1.1": Architecture(
        "T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, "encoder and decoder"
    ),
    "Whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "speech"),
    "ViT": Architecture("ViTModel", "ViTConfig", {"image_size": 64, "patch_size": 4}, "pixels"),
    "Swin": Architecture("SwinModel", "SwinConfig", SWIN, "pixels", note="windows"),
    "CLIP": Architecture(
        "CLIPModel", "CLIPConfig", {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION}, "text and pixels"
    ),
    "ConvNeXt": Architecture(
        "ConvNextModel",
        "ConvNextConfig",
        {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2},
        "pixels",
        "convolutions",
    ),
    "ResNet": Architecture(
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
        "pixels",
        "convolutions",
        note="batch norms in training mode",
    ),
    "Mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
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
