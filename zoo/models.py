"""The models measured: shapes of transformers' own architectures, random weights, base dropout 0, no download.

Symbols: T tokens of one sequence, K or hidden the width, r the rank. ViT's tokens are its patches, its class token one
more; T5 has as many tokens in the encoder as in the decoder, and a layer of it is one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

import peft_fx

DTYPES = {
    "peft": "bf16 base, fp32 adapters (what PEFT does by default)",
    "bf16": "bf16 base and adapters",
    "fp32": "fp32 base and adapters",
    "autocast": "fp32 base and adapters under bf16 autocast",
}
TARGETS = ("all-linear", "attention")
METHODS = {
    "lora": "LoraConfig",
    "dora": "LoraConfig",
    "ia3": "IA3Config",
    "vera": "VeraConfig",
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "hira": "HiraConfig",
    "fourierft": "FourierFTConfig",
    "oft": "OFTConfig",
    "boft": "BOFTConfig",
    "miss": "MissConfig",
}  # PEFT's classes
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
    """An architecture and its defaults; `ffn` in units of hidden, `head` the width of a head, `kv` queries per key."""

    build: Callable[[Setup], Any]
    layers: int
    hidden: int
    tokens: int
    vocab: int
    ffn: float = 4.0
    head: int = 64
    kv: int = 1
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")  # names of attention's layers
    relu: bool = False


def setup_of(model: str, **overrides: Any) -> Setup:
    """A model's own shape, except where an override is not None."""
    family = FAMILIES[model]
    setup = Setup(model, family.layers, family.hidden, family.tokens, family.vocab)
    return replace(setup, **{k: v for k, v in overrides.items() if v is not None})


# ------------------------------------------------------------------------------------------------- architectures


def _llama(setup: Setup) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden,
        intermediate_size=setup.ffn,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=max(1, setup.heads // setup.family.kv),
        max_position_embeddings=setup.tokens,
        tie_word_embeddings=setup.model == "llama-3.2-1b",
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _roberta(setup: Setup) -> Any:
    config = transformers.RobertaConfig(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden,
        intermediate_size=setup.ffn,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        max_position_embeddings=setup.tokens + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_cache=False,
    )
    return transformers.RobertaForMaskedLM(config)


def _gpt2(setup: Setup) -> Any:
    config = transformers.GPT2Config(
        vocab_size=setup.vocab,
        n_embd=setup.hidden,
        n_inner=setup.ffn,
        n_layer=setup.layers,
        n_head=setup.heads,
        n_positions=setup.tokens,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def _t5(setup: Setup) -> Any:
    gated = setup.model == "t5-v1.1"
    config = transformers.T5Config(
        vocab_size=setup.vocab,
        d_model=setup.hidden,
        d_kv=setup.family.head,
        d_ff=setup.ffn,
        num_layers=setup.layers,
        num_heads=setup.heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def _opt(setup: Setup) -> Any:
    config = transformers.OPTConfig(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden,
        word_embed_proj_dim=setup.hidden,
        ffn_dim=setup.ffn,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        max_position_embeddings=setup.tokens,
        dropout=0.0,
        use_cache=False,
    )
    return transformers.OPTForCausalLM(config)


def _vit(setup: Setup) -> Any:
    config = transformers.ViTConfig(
        hidden_size=setup.hidden,
        intermediate_size=setup.ffn,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        image_size=_pixels(setup),
        patch_size=PATCH,
        num_labels=setup.vocab,
    )
    return transformers.ViTForImageClassification(config)


_BERT = ("query", "key", "value", "attention.output.dense")
_T5 = ("q", "k", "v", "o")
FAMILIES = {
    "llama-tiny": Family(_llama, 2, 64, 128, 512, ffn=2.75, head=16, kv=2),
    "llama-256": Family(_llama, 4, 256, 512, 512, ffn=2.75, head=32, kv=2),
    "llama-512": Family(_llama, 8, 512, 1024, 512, ffn=2.75, head=64, kv=2),
    "llama-3.2-1b": Family(_llama, 16, 2048, 2048, 128256, kv=4),
    "roberta": Family(_roberta, 12, 768, 512, 50265, attention=_BERT),
    "gpt2": Family(_gpt2, 12, 768, 1024, 50257, attention=("c_attn", "attn.c_proj")),
    "t5": Family(_t5, 6, 512, 512, 32128, attention=_T5, relu=True),
    "t5-v1.1": Family(_t5, 12, 768, 512, 32128, ffn=8 / 3, attention=_T5),
    "opt": Family(_opt, 12, 768, 1024, 50272, relu=True),
    "vit": Family(_vit, 12, 768, 196, 1000),
}


# --------------------------------------------------------------------------------------- weights, batches, adapters


def make_base(setup: Setup) -> Any:
    """The model without adapters, every weight frozen, in training mode, in the setup's dtype and on its device."""
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = setup.family.build(setup)
    dtype = torch.bfloat16 if setup.dtype in ("peft", "bf16") else torch.float32
    return model.to(dtype).train().requires_grad_(False)


def make_batch(setup: Setup) -> dict[str, torch.Tensor]:
    """A batch of random tokens, or pixels, with labels: the same for every variant."""
    generator = torch.Generator().manual_seed(1)
    if setup.model == "vit":
        side = _pixels(setup)
        pixels = torch.randn(setup.batch, 3, side, side, generator=generator)
        pixels = pixels.to(torch.float32 if setup.dtype in ("fp32", "autocast") else torch.bfloat16)
        batch = {"pixel_values": pixels, "labels": torch.randint(setup.vocab, (setup.batch,), generator=generator)}
    else:  # ids from 3: below are padding and other special tokens
        ids = torch.randint(3, setup.vocab, (setup.batch, setup.tokens), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
    return {name: tensor.to(setup.device) for name, tensor in batch.items()}


def _pixels(setup: Setup) -> int:
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

    chosen: dict[str, Any] = {
        "target_modules": "all-linear" if setup.targets == "all-linear" else _attention(setup),
    }
    if setup.method in ("lora", "dora"):
        chosen |= {"lora_alpha": 2 * setup.rank, "lora_dropout": setup.dropout, "use_dora": setup.method == "dora"}
    elif setup.dropout:
        raise ValueError(f"dropout is for lora and dora, not for {setup.method}")
    if setup.method == "oft":
        chosen |= {"oft_block_size": 32, "r": 0}
    elif setup.method == "ia3":
        chosen |= {"feedforward_modules": []}
    elif setup.method == "boft":  # in PEFT's own of 4 there are 352, over which Inductor alone compiles for minutes
        chosen |= {"boft_block_size": 64}
    elif setup.method != "fourierft":
        chosen |= {"r": setup.rank}
    return getattr(peft, METHODS[setup.method])(**chosen)


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
