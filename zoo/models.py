"""The models measured: shapes of transformers' own architectures, random weights, base dropout 0, no download.

Symbols: T tokens of one sequence, K or hidden the width, r the rank. ViT's tokens are its patches, its class token one
more; T5 has as many tokens in the encoder as in the decoder, and a layer of it is one of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import peft_fx
from zoo.architectures import made

DTYPES = {
    "peft": "bf16 base, fp32 adapters (what PEFT does by default)",
    "bf16": "bf16 base and adapters",
    "fp32": "fp32 base and adapters",
    "autocast": "fp32 base and adapters under bf16 autocast",
}
BASES = dict.fromkeys(("peft", "bf16"), torch.bfloat16) | dict.fromkeys(("fp32", "autocast"), torch.float32)
TARGETS = ("all-linear", "attention")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # PEFT's classes, and options besides the rank
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "vera": ("VeraConfig", {}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "hira": ("HiraConfig", {}),
    "fourierft": ("FourierFTConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 32, "r": 0}),
    "boft": ("BOFTConfig", {"boft_block_size": 64}),  # of PEFT's 4 there are 352, which Inductor compiles for minutes
    "miss": ("MissConfig", {}),
}
PATCH = 16  # pixels of ViT's patches, each way


@dataclass(frozen=True)
class Setup:
    """One configuration: a model, its adapters, and what a training step of it is."""

    model: str
    layers: int
    hidden: int
    tokens: int
    vocab: int
    batch: int = 1
    rank: int = 16
    method: str = "lora"
    targets: str = "all-linear"
    dtype: str = "peft"
    dropout: float = 0.0
    optimizer: str = "adamw"
    device: str = "cpu"

    @property
    def family(self) -> Family:
        return FAMILIES[self.model]

    @property
    def ffn(self) -> int:
        """Width of the MLP's inner activations."""
        return int(self.hidden * self.family.ffn) // 16 * 16

    @property
    def heads(self) -> int:
        return max(1, self.hidden // self.family.head)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of what the base's products read."""
        return 4 if self.dtype == "fp32" else 2


@dataclass(frozen=True)
class Family:
    """A class of transformers' and its defaults; `ffn` in units of hidden, `head` the width of a head, `kv` queries per
    key, `options` of its config."""

    name: str
    layers: int
    hidden: int
    tokens: int
    vocab: int
    ffn: float = 4.0
    head: int = 64
    kv: int = 1
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")  # names of attention's layers
    relu: bool = False
    more_positions: int = 0  # than tokens
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, setup: Setup) -> Any:
        """The model in a setup's sizes, random weights."""
        sizes = {"vocab": setup.vocab, "hidden": setup.hidden, "ffn": setup.ffn, "layers": setup.layers}
        sizes |= {"heads": setup.heads, "kv_heads": max(1, setup.heads // self.kv), "head": setup.hidden // setup.heads}
        options = dict(self.options)
        if self.name.startswith("ViT"):
            options |= {"image_size": side_of(setup), "patch_size": PATCH, "num_labels": setup.vocab}
        return made(self.name, sizes | {"tokens": setup.tokens + self.more_positions}, **options)


def setup_of(model: str, **overrides: Any) -> Setup:
    """A model's own shape, except where an override is not None."""
    family = FAMILIES[model]
    setup = Setup(model, family.layers, family.hidden, family.tokens, family.vocab)
    return replace(setup, **{k: v for k, v in overrides.items() if v is not None})


_BERT = ("query", "key", "value", "attention.output.dense")
_T5 = ("q", "k", "v", "o")
_START = {"decoder_start_token_id": 0}
_GATED = _START | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FAMILIES = {
    "llama-tiny": Family("LlamaForCausalLM", 2, 64, 128, 512, ffn=2.75, head=16, kv=2),
    "llama-256": Family("LlamaForCausalLM", 4, 256, 512, 512, ffn=2.75, head=32, kv=2),
    "llama-512": Family("LlamaForCausalLM", 8, 512, 1024, 512, ffn=2.75, head=64, kv=2),
    "llama-3.2-1b": Family("LlamaForCausalLM", 16, 2048, 2048, 128256, kv=4, options={"tie_word_embeddings": True}),
    "roberta": Family("RobertaForMaskedLM", 12, 768, 512, 50265, attention=_BERT, more_positions=2),
    "gpt2": Family("GPT2LMHeadModel", 12, 768, 1024, 50257, attention=("c_attn", "attn.c_proj")),
    "t5": Family("T5ForConditionalGeneration", 6, 512, 512, 32128, attention=_T5, relu=True, options=_START),
    "t5-v1.1": Family("T5ForConditionalGeneration", 12, 768, 512, 32128, ffn=8 / 3, attention=_T5, options=_GATED),
    "opt": Family("OPTForCausalLM", 12, 768, 1024, 50272, relu=True),
    "vit": Family("ViTForImageClassification", 12, 768, 196, 1000),
}


# --------------------------------------------------------------------------------------- weights, batches, adapters


def make_base(setup: Setup) -> Any:
    """The model without adapters, every weight frozen, in training mode, in the setup's dtype and on its device."""
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = setup.family.build(setup)
    return model.to(BASES[setup.dtype]).train().requires_grad_(False)


def make_batch(setup: Setup) -> dict[str, torch.Tensor]:
    """A batch of random tokens, or pixels, with labels: the same for every variant."""
    generator = torch.Generator().manual_seed(1)
    if setup.model == "vit":
        side = side_of(setup)
        pixels = torch.randn(setup.batch, 3, side, side, generator=generator)
        batch = {
            "pixel_values": pixels.to(BASES[setup.dtype]),
            "labels": torch.randint(setup.vocab, (setup.batch,), generator=generator),
        }
    else:  # ids from 3: below are padding and other special tokens
        ids = torch.randint(3, setup.vocab, (setup.batch, setup.tokens), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
    return {name: tensor.to(setup.device) for name, tensor in batch.items()}


def side_of(setup: Setup) -> int:
    """Side of an image with about `tokens` patches."""
    return PATCH * max(1, round(setup.tokens**0.5))


def with_adapters(base: Any, setup: Setup) -> Any:
    """The model with PEFT's adapters, without graph breaks. None is zero: an untrained adapter would be a special case
    of every kernel."""
    from peft import get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(base, _config(setup), autocast_adapter_dtype=setup.dtype == "peft")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if setup.method not in ("lora", "dora") and parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        elif "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return peft_fx.prepare(model.train())


def _config(setup: Setup) -> Any:
    """PEFT's configuration of a method: its own defaults, but for the rank where it has one."""
    import peft

    name, options = METHODS[setup.method]
    config, is_lora = getattr(peft, name), name == "LoraConfig"
    if setup.dropout and not is_lora:
        raise ValueError(f"dropout is for lora and dora, not for {setup.method}")
    chosen = {"r": setup.rank} if "r" in config.__dataclass_fields__ else {}
    chosen |= {"lora_alpha": 2 * setup.rank, "lora_dropout": setup.dropout} if is_lora else {}
    targets = "all-linear" if setup.targets == "all-linear" else _attention(setup)
    return config(target_modules=targets, **chosen | options)


def _attention(setup: Setup) -> str:
    """The names of attention's layers, as the pattern of whole module paths that PEFT takes."""
    names = "|".join(name.replace(".", r"\.") for name in setup.family.attention)
    return rf".*\.({names})"


@contextmanager
def precision(setup: Setup) -> Iterator[None]:
    """What the forward pass runs under: bf16 autocast, or nothing."""
    enabled = setup.dtype == "autocast"
    with torch.autocast(torch.device(setup.device).type, dtype=torch.bfloat16, enabled=enabled):
        yield


# ----------------------------------------------------------------------------------------------------------- one layer


@dataclass(frozen=True)
class Layer:
    """A linear layer [K,N] with a float32 adapter of rank r; `dtype` is the base's, a key of `BASES`."""

    K: int
    N: int
    r: int
    dtype: str

    def build(self) -> Any:
        """The layer under PEFT, with a B that is not zero."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(self.K, self.N, bias=False, dtype=BASES[self.dtype]))
        model = get_peft_model(base, LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules=["0"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
        return model

    def batch(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T,K], which wants a gradient, and dy [T,N]."""
        dtype = BASES[self.dtype]
        return torch.randn(T, self.K, dtype=dtype, requires_grad=True), torch.randn(T, self.N, dtype=dtype)
