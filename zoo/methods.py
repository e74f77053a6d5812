"""Every PEFT configuration that can sit on a layer: as data, each with its formula, on a block of two such layers.

Symbols: x the layer's input, y what the base layer alone gives, W its weight as it multiplies x, A and B low-rank
factors, s a scale, D(·) a dense matrix made of few parameters, ∘ the elementwise product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.noise import disturb

T, K, N = 512, 64, 128  # tokens of each of two sequences; the width of the blocks, inner and outer
TARGETS = ["up", "down"]


@dataclass(frozen=True)
class Method:
    """A configuration of PEFT's. `already` is set where the method has no adapter beside the weight to rewrite."""

    config: str
    formula: str
    options: dict[str, Any] = field(default_factory=dict)
    block: str = "linear"
    already: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)  # besides the block's own

    def configured(self) -> peft.PeftConfig:
        return getattr(peft, self.config)(**{"target_modules": TARGETS, **self.options})

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """An adapted block in training mode, its trained parameters away from their start, and its inputs."""
        torch.manual_seed(0)
        block, inputs = BLOCKS[self.block]()
        model = peft.get_peft_model(block, self.configured()).train()
        disturb(model, seed=0)
        called = model.base_model if "task_ids" in self.inputs else model  # PeftModel hands those on for text alone
        return called, inputs | self.inputs

    @property
    def described(self) -> str:
        return self.formula

    @property
    def packages(self) -> tuple[str, ...]:
        return ("scikit-learn",) if self.config == "AdamssConfig" else ()


# ---------------------------------------------------------------------------------------------------------- blocks


class Block(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Embedded(nn.Module):
    """An embedding, then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(N, K), nn.Linear(K, N)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.embed(ids))


class Attention(nn.Module):
    """PyTorch's own attention, then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(K, 4, batch_first=True), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.attention(x, x, x, need_weights=False)[0])


class Expert(nn.Module):
    """Two experts, one for each sequence, their weights [2, N, K] a parameter."""

    def __init__(self, K: int, N: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, N, K) / K**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight.mT)


class Normed(Block):
    """The block behind a norm."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(K, N), nn.Linear(N, K))
        self.norm = nn.LayerNorm(K)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _sequences() -> dict[str, Any]:
    return {"x": _random(2, T, K)}


def _conv(dimensions: int, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Kernels of 3 at about 500 positions of each of two samples, 16 and 32 channels, then of 1."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    side = (512, 23, 8)[dimensions - 1]
    block = Block(kind(16, 32, 3, padding=1, **options), kind(32, 16, 1))
    return block, {"x": _random(2, 16, *[side] * dimensions)}


def _conv1d() -> tuple[nn.Module, dict[str, Any]]:
    """GPT-2's Conv1D: a linear layer whose weight is stored [K, N]."""
    from transformers.pytorch_utils import Conv1D

    return Block(Conv1D(N, K), Conv1D(K, N)), _sequences()


BLOCKS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "linear": lambda: (Block(nn.Linear(K, N), nn.Linear(N, K)), _sequences()),
    "Conv1D": _conv1d,
    "conv1d": lambda: _conv(1),
    "conv2d": lambda: _conv(2),
    "conv2d, groups": lambda: _conv(2, groups=2),
    "conv3d": lambda: _conv(3),
    "embedding": lambda: (
        Embedded(),
        {"ids": torch.randint(N, (2, T), generator=torch.Generator().manual_seed(1))},
    ),
    "attention": lambda: (Attention(), _sequences()),
    "experts": lambda: (Block(Expert(K, N), Expert(N, K)), _sequences()),
    "norm": lambda: (Normed(), _sequences()),
}

# ---------------------------------------------------------------------------------------------------------- methods


def lora(formula: str, block: str = "linear", **options: Any) -> Method:
    return Method("LoraConfig", formula, {"r": 8, **options}, block)


WEIGHT = "PEFT adds to the weight itself"
LORA = "xW + s(xA)B"
DORA = "m∘(xW + s(xA)B) / ‖W + sAB‖"
EMBED = {"target_modules": ["embed", "up"]}
EXPERTS = {"target_modules": [], "target_parameters": ["up.weight", "down.weight"]}

METHODS = {
    # LoRA on a linear layer
    "lora": lora(LORA),
    "rslora": lora("LoRA, s = α/√r", use_rslora=True),
    "lora_bias": lora("LoRA, and B has a bias", lora_bias=True),
    "lora, pissa": lora("LoRA from the largest singular vectors of W", init_lora_weights="pissa"),
    "lora, olora": lora("LoRA from a QR decomposition of W", init_lora_weights="olora"),
    "lora, orthogonal": lora("LoRA from orthogonal factors", init_lora_weights="orthogonal"),
    "lora+dropout": lora("xW + s(drop(x)A)B", lora_dropout=0.1),
    "dora": lora(DORA, use_dora=True),
    "dora+dropout": lora("DoRA, its adapter reads drop(x)", use_dora=True, lora_dropout=0.1),
    "velora": lora("LoRA; backward reads a compressed x", velora_config=lora_config.VeloraConfig(num_groups=8)),
    "kasa": lora("xW + s(xA∘d)B, W truncated", kasa_config=lora_config.KasaConfig()),
    "monteclora": lora("LoRA, A drawn anew each step", monteclora_config=lora_config.MontecloraConfig()),
    "bdlora": lora(
        "LoRA, A or B block-diagonal", use_bdlora=lora_config.BdLoraConfig(target_modules_bd_a=TARGETS, nblocks=2)
    ),
    "qalora": lora("LoRA on means of groups of x; for GPTQ weights alone", use_qalora=True, qalora_group_size=16),
    "alora": Method(
        "LoraConfig",
        "LoRA from the invocation token on",
        {"r": 8, "alora_invocation_tokens": [1]},
        inputs={"alora_offsets": [256, 256]},
    ),
    # LoRA on other layers
    "lora, Conv1D": lora(LORA, "Conv1D", fan_in_fan_out=True),
    "dora, Conv1D": lora(DORA, "Conv1D", fan_in_fan_out=True, use_dora=True),
    "lora, conv1d": lora("conv(x, W) + s·conv(conv(x, A), B)", "conv1d"),
    "lora, conv2d": lora("conv(x, W) + s·conv(conv(x, A), B)", "conv2d"),
    "lora, conv2d, groups": lora("the same, in two groups", "conv2d, groups"),
    "lora, conv3d": lora("conv(x, W) + s·conv(conv(x, A), B)", "conv3d"),
    "dora, conv2d": lora("DoRA of convolutions", "conv2d", use_dora=True),
    "lora, embedding": lora("W[i] + s·A[i]B, and LoRA", "embedding", **EMBED),
    "dora, embedding": lora("DoRA of an embedding, and DoRA", "embedding", use_dora=True, **EMBED),
    "lora, attention": Method(
        "LoraConfig",
        "merged into attention's weights and back; no backend compiles that",
        {"target_modules": ["attention"]},
        "attention",
        WEIGHT,
    ),
    "lora, target_parameters": Method(
        "LoraConfig", "x(W + sAB) for each expert", {"r": 8, **EXPERTS}, "experts", WEIGHT
    ),
    "lora, token indices": lora(
        "LoRA; some rows of the embedding trained",
        "embedding",
        target_modules=["up"],
        trainable_token_indices={"embed": [1]},
    ),
    # others, in the order of the alphabet
    "adalora": Method("AdaLoraConfig", "xW + s(xA∘e)B / r", {"total_step": 10}),
    "adalora, Conv1D": Method("AdaLoraConfig", "the same", {"total_step": 10, "fan_in_fan_out": True}, "Conv1D"),
    "adamss": Method("AdamssConfig", "x·W, some subspaces of W low-rank", {"r": 8}),
    "beft": Method("BeftConfig", "xW + b", already="a bias alone"),
    "boft": Method("BOFTConfig", "x·R·W∘s, R a butterfly of rotations", {"boft_block_size": 8}),
    "boft, 2 factors": Method(
        "BOFTConfig", "the same, R of 2 factors", {"boft_block_size": 8, "boft_n_butterfly_factor": 2}
    ),
    "boft, conv2d": Method("BOFTConfig", "conv(x, R·W∘s)", {"boft_block_size": 8}, "conv2d", WEIGHT),
    "c3a": Method("C3AConfig", "xW + x·D(circulant), by FFT", {"block_size": 16}),
    "deft": Method("DeftConfig", "y - (yR)Q + (xA)Q", {"r": 8}),
    "delora": Method("DeloraConfig", "xW + ((x∘w)A∘λ/(r‖A‖‖B‖))B", {"r": 8}),
    "fourierft": Method("FourierFTConfig", "xW + x·D(spectrum)", {"n_frequency": 64}),
    "frod": Method("FrodConfig", "xV(S∘z + L∘z)U"),
    "glora": Method("GloraConfig", "x(W + W∘A + B) + b", {"r": 8}),
    "gralora": Method("GraloraConfig", "LoRA in k × k blocks", {"r": 8, "gralora_k": 2}),
    "gralora, hybrid": Method("GraloraConfig", "the same, and LoRA", {"r": 8, "gralora_k": 2, "hybrid_r": 4}),
    "hira": Method("HiraConfig", "xW + x(W∘AB)", {"r": 8}),
    "hira, conv2d": Method("HiraConfig", "conv(x, W) + conv(x, W∘AB)", {"r": 8}, "conv2d"),
    "hra": Method("HRAConfig", "x·H₁…Hᵣ·W, Householder reflections", {"r": 4}, already=WEIGHT),
    "hra, conv2d": Method("HRAConfig", "conv(x, H₁…Hᵣ·W)", {"r": 4}, "conv2d", WEIGHT),
    "ia3": Method("IA3Config", "xW∘l", {"feedforward_modules": []}),
    "ia3, feed-forward": Method("IA3Config", "(x∘l)W", {"feedforward_modules": TARGETS}),
    "ia3, conv2d": Method("IA3Config", "conv(x, W)∘l", {"feedforward_modules": []}, "conv2d"),
    "lily": Method("LilyConfig", "xW + s(xA)·Σ wᵢ(x)Bᵢ", {"r": 8}),
    "ln_tuning": Method("LNTuningConfig", "trains norms", {"target_modules": ["norm"]}, "norm", "norms alone"),
    "loha": Method("LoHaConfig", "xW + s·x(A₁B₁∘A₂B₂)", {"r": 4}),
    "loha, rank dropout": Method("LoHaConfig", "the same, columns of the delta dropped", {"r": 4, "rank_dropout": 0.1}),
    "loha, conv2d": Method("LoHaConfig", "conv(x, W) + s·conv(x, A₁B₁∘A₂B₂)", {"r": 4}, "conv2d"),
    "loha, conv2d effective": Method(
        "LoHaConfig", "the same, by a Tucker decomposition", {"r": 4, "use_effective_conv2d": True}, "conv2d"
    ),
    "lokr": Method("LoKrConfig", "xW + s·x(A ⊗ B)", {"r": 4}),
    "lokr, decompose both": Method("LoKrConfig", "the same, both low-rank", {"r": 2, "decompose_both": True}),
    "lokr, rank dropout": Method("LoKrConfig", "the same, columns of the delta dropped", {"r": 4, "rank_dropout": 0.1}),
    "lokr, conv2d": Method("LoKrConfig", "conv(x, W) + s·conv(x, A ⊗ B)", {"r": 4}, "conv2d"),
    "miss": Method("MissConfig", "xW + Σ(chunks of x)M", {"r": 8}),
    "miss, bat": Method("MissConfig", "x(W + W·M + M)", {"r": 8, "init_weights": "bat"}, already=WEIGHT),
    "miss, mini": Method("MissConfig", "MiSS, M repeated", {"r": 8, "init_weights": "mini", "mini_r": 8}),
    "oft": Method("OFTConfig", "x·R·W, R block-diagonal", {"oft_block_size": 16, "r": 0}),
    "oft, shared": Method("OFTConfig", "the same, one block", {"oft_block_size": 16, "r": 0, "block_share": True}),
    "oft, Cayley": Method("OFTConfig", "OFT by a solve", {"oft_block_size": 16, "r": 0, "use_cayley_neumann": False}),
    "oft, constrained": Method("OFTConfig", "OFT near the identity", {"oft_block_size": 16, "r": 0, "coft": True}),
    "oft, conv2d": Method("OFTConfig", "conv(R·x, W)", {"oft_block_size": 16, "r": 0}, "conv2d"),
    "osf": Method("OSFConfig", "xUSV, the largest singular vectors frozen"),
    "peanut": Method("PeanutConfig", "xW + x·f(W·A)·B", {"r": 8}),
    "poly": Method(
        "PolyConfig",
        "LoRA, factors mixed for each sample",
        {"r": 8, "n_tasks": 2, "n_skills": 2},
        inputs={"task_ids": torch.tensor([0, 1])},
    ),
    "psoft": Method("PsoftConfig", "xW + xA(R - 1)B", {"r": 8}),
    "pvera": Method("PveraConfig", "VeRA, its inner vector drawn about xA", {"r": 16}),
    "randlora": Method("RandLoraConfig", "xW + x·Σ Bᵢ·λᵢ·Aᵢ·γᵢ", {"r": 8}),
    "road": Method("RoadConfig", "rotates pairs of y", {"group_size": 16}),
    "road, 4 parameters": Method("RoadConfig", "the same", {"group_size": 16, "variant": "road_4"}),
    "shira": Method("ShiraConfig", "x(W + sparse)", {"r": 8}, already=WEIGHT),
    "supertuning": Method("SupertuningConfig", "x(W + sparse)", already=WEIGHT),
    "supertuning, rank 8": Method("SupertuningConfig", "x(W + sparse) and LoRA", {"r": 8}),
    "tinylora": Method("TinyLoraConfig", "xW + x·A·(Σ vᵢPᵢ)·B", {"r": 2}),
    "trainable tokens": Method(
        "TrainableTokensConfig",
        "rows of the embedding",
        {"target_modules": ["embed"], "token_indices": [0, 1, 2]},
        "embedding",
        "rows of an embedding alone",
    ),
    "unilora": Method("UniLoraConfig", "LoRA, factors gathered from one vector", {"r": 8}),
    "vblora": Method(
        "VBLoRAConfig", "LoRA, factors from a bank of vectors", {"r": 4, "vector_length": 16, "num_vectors": 32}
    ),
    "vera": Method("VeraConfig", "xW + ((xA)∘d B)∘b, A and B frozen", {"r": 16}),
    "vera+dropout": Method("VeraConfig", "VeRA, its adapter reads drop(x)", {"r": 16, "vera_dropout": 0.1}),
    "waveft": Method("WaveFTConfig", "xW + x·D(wavelets)", {"n_frequency": 64}),
}
