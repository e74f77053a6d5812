"""Adapters of other packages, unmodified: each on the same block of two layers as PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.methods import BLOCKS, Block, K, N
from zoo.noise import disturb


@dataclass(frozen=True)
class Module:
    """`make` gives a block with adapters of a package, named as it is installed; the base's weights are frozen.

    `already` is set where the package itself adds to the weight.
    """

    package: str
    formula: str
    make: Callable[[], nn.Module]
    already: str = ""
    block: str = "linear"

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        model, (_, inputs) = self.make().train(), BLOCKS[self.block]()
        disturb(model, seed=0)
        return model, inputs

    @property
    def described(self) -> str:
        return f"{self.formula} ({self.package})"

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.package, "torchao") if self.package == "torchtune" else (self.package,)


class Beside(nn.Module):
    """A model whose adapters are modules of another one, which owns their parameters."""

    def __init__(self, model: nn.Module, adapters: nn.Module):
        super().__init__()
        self.model, self.adapters = model, adapters

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Edited(Block):
    """The block, an intervention on what each layer gives."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__(nn.Sequential(nn.Linear(K, N), up), nn.Sequential(nn.Linear(N, K), down))


def _loralib(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import loralib

        layer = getattr(loralib, kind)
        if kind == "Conv2d":
            block = Block(layer(16, 32, kernel_size=3, padding=1, **options), layer(32, 16, kernel_size=1, **options))
        else:
            block = Block(layer(K, N, **options), layer(N, K, **options))
        loralib.mark_only_lora_as_trainable(block)
        return block

    return make


def _lycoris(algorithm: str, block: str = "linear", **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from lycoris import LycorisNetwork, create_lycoris

        model, _ = BLOCKS[block]()
        model.requires_grad_(False)
        LycorisNetwork.apply_preset({"target_module": ["Block"], "enable_conv": True})
        sizes = {"linear_dim": 8, "linear_alpha": 8, "conv_dim": 8, "conv_alpha": 8}
        network = create_lycoris(model, 1.0, algo=algorithm, **sizes, **options)
        network.apply_to()
        assert network.loras, "no layer was given an adapter"
        return Beside(model, network)

    return make


def _torchtune(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchtune.modules import peft

        layer = getattr(peft, kind)
        block = Block(layer(K, N, rank=8, alpha=16), layer(N, K, rank=8, alpha=16))
        if kind == "DoRALinear":
            block.up.initialize_dora_magnitude()
            block.down.initialize_dora_magnitude()
        peft.set_trainable_params(block, peft.get_adapter_params(block))
        return block

    return make


def _pyreft(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import pyreft

        intervention = getattr(pyreft, kind)
        block = Edited(*(intervention(embed_dim=n, low_rank_dimension=4, dtype=torch.float32) for n in (N, K)))
        block.up[0].requires_grad_(False)
        block.down[0].requires_grad_(False)
        return block

    return make


WEIGHT = "the package adds to the weight itself"

MODULES = {
    "loralib Linear": Module("loralib", "xW + s(xA)B", _loralib("Linear", r=8)),
    "loralib MergedLinear": Module(
        "loralib", "x(W + sAB), in parts of W", _loralib("MergedLinear", r=4, enable_lora=[True, False]), WEIGHT
    ),
    "loralib Conv2d": Module("loralib", "conv(x, W + sAB)", _loralib("Conv2d", r=4), WEIGHT, "conv2d"),
    "LyCORIS LoCon": Module("lycoris-lora", "xW + s·x(AB)", _lycoris("locon")),
    "LyCORIS LoCon, bypass": Module("lycoris-lora", "xW + s(xA)B", _lycoris("locon", bypass_mode=True)),
    "LyCORIS LoCon, conv2d": Module(
        "lycoris-lora", "conv(x, W) + s·conv(x, AB)", _lycoris("locon", "conv2d"), block="conv2d"
    ),
    "LyCORIS LoHa": Module("lycoris-lora", "xW + s·x(A₁B₁∘A₂B₂)", _lycoris("loha")),
    "LyCORIS LoKr": Module("lycoris-lora", "xW + s·x(A ⊗ B)", _lycoris("lokr")),
    "LyCORIS (IA)³": Module("lycoris-lora", "xW∘l", _lycoris("ia3")),
    "LyCORIS GLoRA": Module("lycoris-lora", "x(W + W·A + B)", _lycoris("glora")),
    "LyCORIS diag-OFT": Module("lycoris-lora", "x·W·R", _lycoris("diag-oft")),
    "LyCORIS BOFT": Module("lycoris-lora", "x·W·R, R a butterfly", _lycoris("boft")),
    "torchtune LoRALinear": Module("torchtune", "xW + s(xA)B", _torchtune("LoRALinear")),
    "torchtune DoRALinear": Module("torchtune", "DoRA", _torchtune("DoRALinear")),
    "pyreft LoReFT": Module("pyreft", "y + (yP + b - yR)Rᵀ, R orthogonal", _pyreft("LoreftIntervention")),
    "pyreft DiReFT": Module("pyreft", "y + (yP + b)Rᵀ", _pyreft("DireftIntervention")),
}
