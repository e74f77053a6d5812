"""Losses of logits as people write them, each of `[T,V]` logits, labels, and a second model's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T, K, V = 24, 8, 50
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {}


def wide(z: Tensor) -> Tensor:
    """As transformers does it, `z.float()`; exact in fp64."""
    return z if z.dtype == torch.float64 else z.float()


def loss(f: Loss) -> Loss:
    LOSSES[f.__name__] = f
    return f


def _added(name: str, **options) -> None:
    LOSSES[name] = lambda z, y, _: F.cross_entropy(wide(z), y, **options)


_added("mean")
_added("sum", reduction="sum")
_added("smoothed", label_smoothing=0.1)


@loss
def another_index_ignored(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(wide(z), y.clamp_min(0), ignore_index=0)


@loss
def weighted(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(wide(z), y, weight=torch.linspace(0.5, 2, z.shape[-1], dtype=wide(z).dtype))


@loss
def weighted_and_smoothed(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(
        wide(z), y, weight=torch.linspace(0.5, 2, z.shape[-1], dtype=wide(z).dtype), label_smoothing=0.2
    )


@loss
def by_a_number_of_items(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    """As transformers does under gradient accumulation."""
    return F.cross_entropy(wide(z), y, reduction="sum") / ((y != -100).sum() * 3)


@loss
def in_its_own_dtype(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


@loss
def scaled(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(wide(z) * 0.25 / 1.5, y)


@loss
def capped(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    """As Gemma-2 does."""
    return F.cross_entropy(wide(torch.tanh(z / 5.0) * 5.0), y)


@loss
def with_z_loss(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    z = wide(z)
    return F.cross_entropy(z, y) + 1e-2 * (torch.logsumexp(z, -1) ** 2).mean()


@loss
def distilled(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(wide(z) / 2, -1), F.log_softmax(wide(other) / 2, -1), reduction="none", log_target=True)
    return kl.sum(-1).mean() * 4


@loss
def distilled_by_batches(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(wide(z), -1), F.softmax(wide(other), -1), reduction="batchmean")
    return 0.5 * F.cross_entropy(wide(z), y) + 0.5 * kl


@loss
def weighted_by_row(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    """A policy gradient's: log-probabilities of the labels, each with its advantage."""
    p = F.log_softmax(wide(z), -1).gather(-1, y.clamp_min(0)[:, None])[:, 0]
    return -(p * torch.linspace(-1, 1, len(p))).sum() / len(p)


@loss
def focal(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    each = F.cross_entropy(wide(z), y, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


@loss
def perplexity(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    """No sum: what the gradient is multiplied by is known behind the last row only."""
    return torch.exp(F.cross_entropy(wide(z), y))


@loss
def with_entropy(z: Tensor, y: Tensor, other: Tensor) -> Tensor:
    p = F.softmax(wide(z), -1)
    return F.cross_entropy(wide(z), y) - 0.01 * (-(p * torch.log(p + 1e-9)).sum(-1)).mean()


class Head(nn.Module):
    """A vocabulary's matrix, a second model's beside it; `shape` of the tokens is `[batch, length]`."""

    def __init__(self, loss: Loss, train: bool = False, bias: bool = False, rank: int = 0):
        super().__init__()
        self.loss = loss
        self.head = nn.Linear(K, V, bias=bias).requires_grad_(train)
        self.other = nn.Linear(K, V, bias=False).requires_grad_(False)
        self.rank = rank
        if rank:
            self.A, self.B = nn.Parameter(torch.randn(rank, K)), nn.Parameter(torch.randn(V, rank) / 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.head(x)
        if self.rank:
            z = z + 2 * F.linear(F.linear(x, self.A), self.B)
        with torch.no_grad():
            other = self.other(torch.tanh(x.detach()))
        return self.loss(z.view(-1, V), y.view(-1), other.view(-1, V))


def inputs(tokens: tuple[int, ...] = (2, T // 2), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Every fifth label is ignored."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*tokens, K, generator=g).to(dtype).requires_grad_()
    y = torch.randint(0, V, tokens, generator=g)
    y.view(-1)[::5] = -100
    return x, y
