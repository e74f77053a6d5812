"""Noise on what is trained: most methods start as the identity, where errors cannot be seen."""

from __future__ import annotations

import torch
from torch import nn

NOISE = 0.05  # makes a delta about as large as the weight


@torch.no_grad()
def disturb(model: nn.Module, seed: int, noise: float = NOISE) -> None:
    """Adds noise to every trained parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
