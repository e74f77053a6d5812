"""Models without any adapter, as data: layers and blocks of many kinds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

K, H, T = 32, 8, 6  # width, width between two narrow layers, tokens


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module, skip: nn.Module | None = None):
        super().__init__()
        self.block, self.skip = nn.Sequential(*layers), skip or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.block(x)


class Gated(nn.Module):
    """Two narrow layers multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.skip = (nn.Linear(*s) for s in ((K, H), (K, H), (H, K), (K, K)))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.down(F.silu(self.gate(x)) * self.up(x))


class Excited(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(h.mean((2, 3))))))
        return x + h * gate[:, :, None, None]


class Mixer(nn.Module):
    """Tokens and features mixed in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(T, 3), nn.GELU(), nn.Linear(3, T))
        self.features = nn.Sequential(nn.Linear(K, H), nn.GELU(), nn.Linear(H, K))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.mT).mT
        return x + self.features(x)


class Attention(nn.Module):
    """Few heads of keys and values, and an MLP beside them, as in GPT-NeoX and Falcon."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(K, K), nn.Linear(K, K // 2), nn.Linear(K, K)
        self.norm, self.mlp = nn.LayerNorm(K), nn.Sequential(nn.Linear(K, 2 * K), nn.GELU(), nn.Linear(2 * K, K))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        k, v = self.kv(h).repeat_interleave(4, -1).chunk(2, -1)
        return x + self.o((self.q(h) @ k.mT).softmax(-1) @ v) + self.mlp(h)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(K, 4), nn.Linear(K, K)
        self.up, self.down = nn.Parameter(torch.randn(4, K, H)), nn.Parameter(torch.randn(4, H, K))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btk,ekh->bteh", x, self.up).relu()
        mixed = torch.einsum("bteh,ehk->btek", h, self.down) * self.router(x).softmax(-1)[..., None]
        return self.shared(x) + mixed.sum(-2)


class Sums(nn.Module):
    """Layers of one size that read one input, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(H, K)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x) + self.b(x) + self.c(torch.relu(x)[..., :H]))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.place, self.kind = nn.Embedding(50, K), nn.Embedding(T, K), nn.Embedding(2, K)
        self.head = nn.Linear(K, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.word(ids) + self.place(torch.arange(T)) + self.kind(ids % 2)))


def _tokens() -> Tensor:
    return torch.randn(2, T, K, requires_grad=True)


def _image() -> Tensor:
    return torch.randn(2, 16, 5, 5, requires_grad=True)


def _mlp(width: int) -> Callable[[], nn.Module]:
    def layers() -> list[nn.Module]:
        return [nn.LayerNorm(K), nn.Linear(K, width), nn.GELU(), nn.Linear(width, K)]

    return lambda: nn.Sequential(Residual(*layers()), Residual(*layers(), skip=nn.Linear(K, K)), nn.Linear(K, 5))


def _bottleneck(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = [
            nn.Conv2d(16, 4, 1),
            norm(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 24, 1),
        ]
        return nn.Sequential(Residual(*layers, norm(24), skip=nn.Conv2d(16, 24, 1)), nn.ReLU(), nn.Conv2d(24, 8, 1))

    return make


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (_mlp(2 * K), _tokens),
    "narrow_mlp": (_mlp(H), _tokens),
    "gated": (lambda: nn.Sequential(Gated(), Gated()), _tokens),
    "mixer": (Mixer, _tokens),
    "parallel_attention": (lambda: nn.Sequential(Attention(), Attention()), _tokens),
    "experts": (Experts, _tokens),
    "sums": (Sums, _tokens),
    "factorised": (lambda: nn.Sequential(nn.Linear(K, H), nn.Linear(H, K), nn.ReLU(), nn.Linear(K, 5)), _tokens),
    "linear_layers": (lambda: nn.Sequential(nn.Linear(K, 16), nn.Linear(16, 16), nn.Linear(16, 5)), _tokens),
    "words": (Words, lambda: torch.randint(50, (2, T))),
    "excited": (Excited, _image),
    "bottleneck": (_bottleneck(lambda n: nn.Identity()), _image),
    "bottleneck_with_norms": (_bottleneck(nn.BatchNorm2d), _image),
    "two_windows": (lambda: Residual(nn.Conv2d(16, 24, 3, padding=1), skip=nn.Conv2d(16, 24, 1)), _image),
}
