"""Row-wise affine adapters that are no sums of products, in the spellings people write, and maps that are not row-wise.

Symbols as in `spellings.py`; l, d, g, c are trained vectors: a scale after the layer, one between two factors, a
magnitude, a shift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.spellings import Case, K, N, R, S, dropout, strided, transposed, x
from tests.support.spellings import frozen as frozen_weight

Shapes = Mapping[str, tuple[int, ...]]
Spell = Callable[["Layer", Tensor], Tensor]


@dataclass(frozen=True)
class Spelling(Case):
    """A case that says more: what a site is called, and what is left of it.

    `exact`: the map adds and multiplies integers alone. `grad` is the form of the input gradient where x has one.
    `products` are those over all tokens that the rewritten forward needs, one for each base layer.
    """

    exact: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    grad: str = "weight"
    names: tuple[str, ...] = ("W",)
    products: int = 1


def weight(*shape: int, gain: float = 1.0) -> nn.Parameter:
    """As `frozen` makes them; vectors of the size of 1."""
    return frozen_weight(*shape, gain=gain) if len(shape) > 1 else nn.Parameter(torch.randn(shape), requires_grad=False)


class Layer(nn.Module):
    """Frozen W [K, N] and b [N], and an adapter's tensors; `spell(layer, x)` is its forward.

    B is so small that ‖sAB‖ = ‖W‖/2, for the reason that `spellings.Lora` gives; so are the last factors, D, of others.
    """

    def __init__(self, spell: Spell, trained: Shapes, frozen: Shapes, K: int = K, N: int = N):
        super().__init__()
        self.spell = spell
        self.W, self.b = weight(K, N), weight(N)
        for name, shape in (*trained.items(), *frozen.items()):
            setattr(self, name, weight(*shape, gain=0.5 / S if name in "BD" else 1.0).requires_grad_(name in trained))

    def forward(self, x: Tensor) -> Tensor:
        return self.spell(self, x)


def layer(spell: Spell, trained: Shapes, frozen: Shapes | None = None, **sizes: int) -> Callable[[], nn.Module]:
    return lambda: Layer(spell, trained, frozen or {}, **sizes)


LORA = {"A": (K, R), "B": (R, N)}
INPUT = x(2, 17, K)


def spelling(spell: Spell, trained: Shapes, frozen: Shapes | None = None, inputs=INPUT, **kw) -> Spelling:
    id = kw.pop("id", spell.__name__)
    return Spelling(id, layer(spell, trained, frozen), inputs, **kw)


# Vectors.


def scale_after(m, x):
    """IA3 on a layer."""
    return (x @ m.W + m.b) * m.l


def scale_before(m, x):
    """IA3 on a feed-forward layer."""
    return (x * m.g) @ m.W + m.b


def scale_both_sides(m, x):
    return F.linear(x * m.g, m.W.t(), m.b) * m.l


def scale_and_shift(m, x):
    """SSF."""
    return F.linear(x, m.W.t(), m.b) * m.l + m.c


def shift_then_scale(m, x):
    return m.l * (m.c - x @ m.W)


def vera(m, x):
    """Frozen random A and B, two trained vectors."""
    return x @ m.W + m.b + (((x @ m.A) * m.d) @ m.B) * m.l


def kasa(m, x):
    """A trained diagonal between trained factors."""
    return x @ m.W + S * (((x @ m.A) * m.d) @ m.B)


def dora(m, x):
    """DoRA as PEFT writes it, the norm without gradient."""
    norm = (m.W + S * (m.A @ m.B)).norm(dim=0).detach()
    g = m.g / norm
    y = x @ m.W + m.b
    return y + (g - 1) * (y - m.b) + g * ((x @ m.A) @ m.B) * S


def dora_given_norm(m, x):
    """DoRA with a norm that divides without rounding."""
    g = m.g / torch.full((), 4.0, dtype=x.dtype)
    y = x @ m.W + m.b
    return y + (g - 1) * (y - m.b) + g * ((x @ m.A) @ m.B) * S


def gate_of_a_parameter(m, x):
    return (x @ m.W + m.b) * torch.sigmoid(m.l)


def scale_per_head(m, x):
    return ((x @ m.W + m.b).unflatten(-1, (8, -1)) * m.h).flatten(-2)


def scale_and_lora(m, x):
    """One layer with a LoRA, a scale after both, and a VeRA."""
    return (x @ m.W + m.b + S * ((x @ m.A) @ m.B)) * m.l + ((x @ m.C) * m.d) @ m.D


def scale_of_a_part(m, x):
    h = x @ m.W + m.b
    return torch.cat([h[..., : N // 2], h[..., N // 2 :] * m.l], -1)


def scale_of_a_mean(m, x):
    """The mean of the layer scaled and not."""
    h = x @ m.W + m.b
    return torch.stack([h, h * m.l], -2).mean(-2)


# Products on the layer's output.


def loreft(m, x):
    h = x @ m.W + m.b
    return h + ((h @ m.R2 + m.c) - h @ m.R) @ m.R.t()


def hydra(m, x):
    """A parallel and a sequential branch."""
    h = x @ m.W
    return h + (x @ m.A) @ m.B + ((h + m.b) @ m.C) @ m.D


def deft(m, x):
    h = x @ m.W
    return (h + m.b) - (h @ m.Q) @ m.P.t() + (x @ m.A) @ m.P.t()


def glora(m, x):
    """The layer's own product taken off again, and a scaled one put in its place."""
    h = F.linear(x, m.W.t(), m.b)
    return h - x @ m.W + x @ (m.W * m.l + m.A @ m.B) + m.b * m.c


# Products between and around frozen factors.


def psoft(m, x):
    """A trained rotation between frozen factors, less what they give unrotated."""
    return x @ m.W + (x @ m.A) @ (m.M - torch.eye(R, dtype=x.dtype)) @ m.B


def frod(m, x):
    z = x @ m.V
    return x @ m.W + (z * m.d + z @ m.L) @ m.U


def householder(m, x):
    """HRA: two reflections of the input, of unit vectors."""
    for v in (m.v, m.w):
        v = v / v.norm()
        x = x - 2 * (x @ v[:, None]) * v
    return x @ m.W + m.b


def reflection(m, x):
    """One reflection of the input, of a vector of any length."""
    return F.linear(x - 2 * (x @ m.v) @ m.v.t(), m.W.t(), m.b)


def constant_between(m, x):
    return x @ m.W + ((x + 1) * m.g) @ m.A @ m.B


# Layouts of features.


def rotation_of_pairs(m, x):
    """RoAd with its two columns trained."""
    h = x @ m.W + m.b
    pairs = h.view(*h.shape[:-1], -1, 2)
    return h * m.l + torch.stack([-pairs[..., 1], pairs[..., 0]], -1).view(h.shape) * m.c


def road(m, x):
    """RoAd as PEFT writes it: halves of groups, by an angle and a magnitude."""
    h = F.linear(x, m.W.t(), m.b)
    groups = h.reshape(-1, N // 8, 2, 4)
    turned = torch.stack((-groups[:, :, 1, :], groups[:, :, 0, :]), dim=2).reshape(h.shape)
    return h * (m.g * torch.cos(m.l)) + turned * (m.g * torch.sin(m.l))


def oft(m, x):
    """A block-diagonal matrix on the input."""
    blocks = x.view(*x.shape[:-1], 8, -1)
    return F.linear(torch.einsum("...gi,gij->...gj", blocks, m.M).reshape(x.shape), m.W.t(), m.b)


def oft_after(m, x):
    """A block-diagonal matrix on the output, in one bmm."""
    h = x @ m.W + m.b
    blocks = h.reshape(-1, 8, h.shape[-1] // 8).transpose(0, 1)
    return torch.bmm(blocks, m.M).transpose(0, 1).reshape(h.shape)


def bdlora(m, x):
    """A is block-diagonal."""
    blocks = x.view(*x.shape[:-1], 4, -1)
    return x @ m.W + torch.einsum("...gi,gir->...gr", blocks, m.M).flatten(-2) @ m.D * S


def gralora(m, x):
    """Blocks of A scatter their ranks over the blocks of B."""
    blocks = x.view(*x.shape[:-1], 2, -1)
    low = torch.einsum("btgi,gir->btgr", blocks, m.M)
    low = low.view(*low.shape[:-1], 2, -1).permute(0, 1, 3, 2, 4).reshape(low.shape)
    return x @ m.W + torch.einsum("btgr,gro->btgo", low, m.P).flatten(-2)


def qalora(m, x):
    """A reads means of groups of features."""
    return x @ m.W + (x.view(*x.shape[:-1], -1, 4).mean(-1) @ m.A @ m.B) * S


def miss(m, x):
    """One matrix reads sums of features."""
    return x @ m.W + x.view(*x.shape[:-1], -1, R).sum(-2) @ m.D / 4


def c3a(m, x):
    """Blocks of circulants, by FFT."""
    blocks = torch.fft.rfft(x.view(*x.shape[:-1], -1, 1, 32))
    product = blocks * torch.fft.rfft(m.C)
    return x @ m.W + torch.fft.irfft(product.sum(-3), n=32).flatten(-2)


def parts(h):
    """The parts of a fused layer meet as queries, keys and values do."""
    q, k, v = h.split(N // 4, -1)[:3]
    return q * k + v


def merged_parts(m, x):
    """loralib's MergedLinear: zeros beside the parts that have an adapter."""
    zeros = torch.zeros(*x.shape[:-1], N // 2, dtype=x.dtype)
    return parts(x @ m.W + m.b + torch.cat([x @ m.A @ m.B, zeros, x @ m.C @ m.D], -1))


def scattered_parts(m, x):
    """The same as a product put where some features are."""
    delta = torch.zeros(*x.shape[:-1], N, dtype=x.dtype)
    delta[..., m.order] = (x @ m.A) @ m.B
    return parts(x @ m.W + delta * 2.0)


def parts_in_place(m, x):
    h = x @ m.W + m.b
    h[..., : N // 4] += x @ m.A @ m.B
    h[..., N // 2 : 3 * N // 4] += x @ m.C @ m.D
    return parts(h)


def parts_of_a_split(m, x):
    """One part of the layer's result scaled, another shifted, and put together again."""
    q, k, v, w = (x @ m.W + m.b).chunk(4, -1)
    return torch.cat([q, k * m.l, v + m.c, w], -1)


def adapters_of_a_split(m, x):
    """Queries, keys and values of one product: two of them have an adapter each, of which one comes late."""
    q, k, v, w = (x @ m.W + m.b).chunk(4, -1)
    k = k * w
    return (q + x @ m.A @ m.B) * k + (v + S * (x @ m.C @ m.D))


def adapters_of_slices(m, x):
    """Unequal parts in any order, the columns between them read by nobody."""
    h = x @ m.W
    v, q = h[..., N // 2 :], h[..., : N // 4]
    return q + x @ m.A @ m.B + (v + x @ m.C @ m.D).sum(-1, keepdim=True)


def two_adapters_of_a_part(m, x):
    q, k = (x @ m.W + m.b).split([N // 4, 3 * N // 4], -1)
    return torch.cat([k, q + x @ m.A @ m.B + x @ m.C @ m.D], -1)


def parts_unbound(m, x):
    q, k = (x @ m.W + m.b).unflatten(-1, (2, N // 2)).unbind(-2)
    return torch.stack([q * m.l, k], -2).flatten(-2)


def split_into_sizes(m, x):
    """An adapter reads two unequal parts of the input."""
    few, many = x.split_with_sizes([K // 4, 3 * K // 4], -1)
    return x @ m.W + (few @ m.A + many @ m.C) @ m.B


def index_select(m, x):
    return x @ m.W + x.index_select(-1, m.order) @ m.A @ m.B


def flip(m, x):
    return x @ m.W + (x.flip(-1) @ m.A) @ m.B.flip(-1)


def roll(m, x):
    return (x.roll(5, -1) @ m.W + m.b) * m.l


def regrouped(m, x):
    """One small LoRA for both halves of the features."""
    low = x.reshape(-1, K // 2) @ m.A @ m.B
    return x @ m.W + low.view(*x.shape[:-1], N)


def repeated(m, x):
    """One small product, of which the output has as many copies as it has groups."""
    return x @ m.W + (x @ m.A)[..., None, :].expand(*x.shape[:-1], N // R, R).reshape(*x.shape[:-1], N) * m.l


# Layouts of tokens.


def bmm_of_one(m, x):  # x [1, T, K]
    h = torch.baddbmm(m.b.expand(1, 1, N), x, m.W[None])
    return torch.baddbmm(h, torch.bmm(x, m.A[None]) * m.d, m.B[None])


def addmm(m, x):  # x [T, K]
    return torch.addmm(m.b, x, m.W) * m.l + torch.addmm(m.c, x @ m.A, m.B)


class Permuted(Layer):
    """The order of the features that A reads is a buffer."""

    def __init__(self):
        super().__init__(index_select, LORA, {})
        self.register_buffer("order", torch.arange(K - 1, -1, -1) ^ 1)


class Scattered(Layer):
    """The features that have an adapter are a buffer."""

    def __init__(self):
        super().__init__(scattered_parts, {"A": (K, R), "B": (R, N // 2)}, {})
        self.register_buffer("order", torch.cat([torch.arange(N // 4), torch.arange(N // 2, 3 * N // 4)]))


class Wrapped(nn.Module):
    """The base layer is a module of its own, as in PEFT."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.l = nn.Linear(K, N).requires_grad_(False), weight(N).requires_grad_()

    def forward(self, x):
        return self.base_layer(x) * self.l


class NormAndVector(nn.Module):
    """What scales a normalised value is a norm's own vector; the next one is an adapter's."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(K), layer(scale_before, {"g": (K,)})()

    def forward(self, x):
        return self.layer(self.norm(x))


class QKV(nn.Module):
    """Three adapted layers of different kinds read x: their input gradients arrive in one add tree."""

    def __init__(self):
        super().__init__()
        self.q = layer(scale_after, {"l": (N,)})()
        self.k = layer(vera, {"d": (R,), "l": (N,)}, LORA)()
        self.v = layer(rotation_of_pairs, {"l": (N,), "c": (N,)})()

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


class Chained(nn.Module):
    """Two adapted layers with nothing between them."""

    def __init__(self):
        super().__init__()
        self.up = layer(scale_and_shift, {"l": (N,), "c": (N,)})()
        self.down = layer(scale_after, {"l": (K,)}, K=N, N=K)()

    def forward(self, x):
        return self.down(self.up(x))


class ChainedLora(nn.Module):
    """A layer that is no sum of products, then a LoRA."""

    def __init__(self):
        super().__init__()
        self.up = layer(vera, {"d": (R,), "l": (N,)}, LORA)()
        self.down = layer(lora, {"A": (N, R), "B": (R, K)}, K=N, N=K)()

    def forward(self, x):
        return x + self.down(self.up(x))


class Tied(nn.Module):
    """One adapted layer called twice."""

    def __init__(self):
        super().__init__()
        self.tied = layer(scale_after, {"l": (K,)}, N=K)()

    def forward(self, x):
        return x + self.tied(self.tied(x).square())


class TiedWeight(nn.Module):
    """One frozen weight, an adapter of its own for each of two uses."""

    def __init__(self):
        super().__init__()
        self.W, self.l, self.c = weight(K, K), weight(K).requires_grad_(), weight(K).requires_grad_()

    def forward(self, x):
        return ((x @ self.W) * self.l).square() @ self.W * self.c


def lora(m, x):
    return x @ m.W + m.b + (x @ m.A) @ m.B * S


SPELLINGS: list[Spelling] = [
    spelling(scale_after, {"l": (N,)}),
    spelling(scale_before, {"g": (K,)}, grad="activation"),
    spelling(scale_both_sides, {"g": (K,), "l": (N,)}),
    spelling(scale_and_shift, {"l": (N,), "c": (N,)}),
    spelling(shift_then_scale, {"l": (N,), "c": (N,)}),
    spelling(vera, {"d": (R,), "l": (N,)}, LORA),
    spelling(kasa, LORA | {"d": (R,)}),
    spelling(dora, LORA | {"g": (N,)}, exact=False),
    spelling(dora_given_norm, LORA | {"g": (N,)}),
    spelling(gate_of_a_parameter, {"l": (N,)}, exact=False),
    spelling(scale_per_head, {"h": (8, 1)}),
    spelling(scale_and_lora, LORA | {"l": (N,), "C": (K, R), "d": (R,), "D": (R, N)}),
    spelling(scale_of_a_part, {"l": (N // 2,)}),
    spelling(scale_of_a_mean, {"l": (N,)}),
    spelling(loreft, {"R": (N, R), "R2": (N, R), "c": (R,)}),
    spelling(hydra, LORA | {"C": (N, R), "D": (R, N)}),
    spelling(deft, {"Q": (N, R), "P": (N, R), "A": (K, R)}),
    spelling(glora, LORA | {"l": (N,), "c": (N,)}),
    spelling(psoft, {"M": (R, R)}, LORA),
    spelling(frod, {"d": (R,), "L": (R, R)}, {"V": (K, R), "U": (R, N)}),
    spelling(householder, {"v": (K,), "w": (K,)}, exact=False, grad="activation"),
    spelling(reflection, {"v": (K, 1)}),
    spelling(constant_between, LORA | {"g": (K,)}),
    spelling(rotation_of_pairs, {"l": (N,), "c": (N,)}),
    spelling(road, {"g": (N,), "l": (N,)}, exact=False),
    spelling(oft, {"M": (8, K // 8, K // 8)}, grad="activation"),
    spelling(oft_after, {"M": (8, N // 8, N // 8)}),
    spelling(bdlora, {"M": (4, K // 4, R), "D": (4 * R, N)}),
    spelling(gralora, {"M": (2, K // 2, R), "P": (2, R, N // 2)}),
    spelling(qalora, {"A": (K // 4, R), "B": (R, N)}),
    spelling(miss, {"D": (R, N)}),
    spelling(c3a, {"C": (K // 32, N // 32, 32)}, exact=False, dtypes=(torch.float32,)),
    spelling(merged_parts, {"A": (K, R), "B": (R, N // 4), "C": (K, R), "D": (R, N // 4)}),
    Spelling("scattered_parts", Scattered, INPUT),
    spelling(parts_in_place, {"A": (K, R), "B": (R, N // 4), "C": (K, R), "D": (R, N // 4)}),
    spelling(parts_of_a_split, {"l": (N // 4,), "c": (N // 4,)}),
    spelling(adapters_of_a_split, {"A": (K, R), "B": (R, N // 4), "C": (K, R), "D": (R, N // 4)}),
    spelling(adapters_of_slices, {"A": (K, R), "B": (R, N // 4), "C": (K, R), "D": (R, N // 2)}),
    spelling(two_adapters_of_a_part, {"A": (K, R), "B": (R, N // 4), "C": (K, R), "D": (R, N // 4)}),
    spelling(parts_unbound, {"l": (N // 2,)}),
    spelling(split_into_sizes, {"A": (K // 4, R), "C": (3 * K // 4, R), "B": (R, N)}),
    Spelling("index_select", Permuted, INPUT),
    spelling(flip, LORA),
    spelling(roll, {"l": (N,)}),
    spelling(regrouped, {"A": (K // 2, R), "B": (R, N // 2)}),
    spelling(repeated, {"A": (K, R), "l": (N,)}),
    spelling(bmm_of_one, LORA | {"d": (R,)}, inputs=x(1, 33, K)),
    spelling(addmm, LORA | {"l": (N,), "c": (N,)}, inputs=x(33, K)),
    spelling(scale_and_shift, {"l": (N,), "c": (N,)}, id="x_4d", inputs=x(2, 3, 5, K)),
    spelling(scale_and_shift, {"l": (N,), "c": (N,)}, id="no_token", inputs=x(0, K)),
    spelling(vera, {"d": (R,), "l": (N,)}, LORA, id="x_strided", inputs=strided),
    spelling(kasa, LORA | {"d": (R,)}, id="x_transposed", inputs=transposed),
    spelling(loreft, {"R": (N, R), "R2": (N, R), "c": (R,)}, id="x_without_gradient", inputs=x(2, 17, K, grad=False)),
    Spelling("wrapped", Wrapped, INPUT, names=("base_layer",)),
    Spelling("norm_and_vector", NormAndVector, INPUT, names=("layer.W",), exact=False, grad="activation"),
    Spelling("qkv", QKV, INPUT, sites=3, names=("q.W", "k.W", "v.W"), products=3),
    Spelling("chained", Chained, INPUT, sites=2, names=("up.W", "down.W"), products=2),
    Spelling("chained_lora", ChainedLora, INPUT, sites=2, names=("up.W", "down.W"), products=2),
    Spelling("tied", Tied, x(2, 17, K), sites=2, names=("tied.W", "tied.W#2"), products=2),
    Spelling("tied_weight", TiedWeight, x(2, 17, K), sites=2, names=("W", "W#2"), products=2),
]


# Near misses: some rows are not treated as the others are, or nothing is trained, or the product is needed for itself.


def gate_of_each_token(m, x):
    return (x @ m.W + m.b) * torch.sigmoid(x @ m.g)


def vector_along_tokens(m, x):
    return (x @ m.W + m.b) * m.t


def bias_along_tokens(m, x):
    return (x @ m.W + m.t) * m.l


def sum_over_tokens(m, x):
    return (x @ m.W).sum(-2, keepdim=True) @ m.Q


def mean_of_tokens_inside(m, x):
    h = x @ m.W + m.b
    return (h - h.mean(-2, keepdim=True)) * m.l


def tokens_mixed_with_features(m, x):
    """A view that reads the features of several tokens as one row's."""
    return (x @ m.W).reshape(*x.shape[:-2], N, x.shape[-2]) * m.l[:, None]


def tokens_in_pairs(m, x):
    """Two tokens side by side as one of twice the features."""
    return (x @ m.W).view(*x.shape[:-2], -1, 2 * N) * m.u


def tokens_flipped(m, x):
    return (x @ m.W).flip(-2) * m.l


def cumsum_over_tokens(m, x):
    return x @ m.W + ((x @ m.A) * m.d).cumsum(-2) @ m.B


def dropout_inside(m, x):
    return x @ m.W + (dropout(x @ m.A) * m.d) @ m.B


def relu_inside(m, x):
    return torch.relu(x @ m.W + m.b) * m.l


def used_elsewhere(m, x):
    h = x @ m.W
    return h * m.l + torch.relu(h)


def read_without_its_adapter(m, x):
    h = x @ m.W + m.b
    return (h + x @ m.A @ m.B) * torch.relu(h)


def returned_without_its_adapter(m, x):
    h = x @ m.W
    return h + S * (x @ m.A @ m.B), h


def adapter_of_heads(m, x):
    """The heads of queries and keys come before the tokens."""
    q, k = (x @ m.W).unflatten(-1, (2, 4, N // 8)).permute(2, 0, 3, 1, 4).unbind(0)
    q = q + (x @ m.A @ m.B).unflatten(-1, (4, N // 8)).transpose(1, 2)
    return q @ k.transpose(-1, -2)


def adapter_of_a_part_of_a_whole(m, x):
    h = x @ m.W
    return h[..., : N // 2] + x @ m.A @ m.B, torch.relu(h)


def frozen_vectors(m, x):
    """Only what is not trained scales the layer; what is, comes after a ReLU."""
    return torch.relu((x @ m.W + m.b) * m.f) * m.l


class TrainedNorm(nn.Module):
    """A norm whose γ and β are trained before a frozen layer, side by side or each in a module of its own."""

    def __init__(self, norm: Callable[[int], nn.Module], deep: bool = False):
        super().__init__()
        linear = nn.Linear(K, N).requires_grad_(False)
        self.norm, self.mlp = norm(K), nn.Sequential(linear, nn.ReLU()) if deep else linear

    def forward(self, x):
        return self.mlp(self.norm(x))


class HandWrittenNorm(nn.Module):
    """As Llama's, Gemma's and T5's are: in fp32, with the scale beside one."""

    def __init__(self, K: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(K))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h.to(x.dtype) * (1 + self.gamma)).to(x.dtype)


def miss(spell: Spell, trained: Shapes, frozen: Shapes | None = None, inputs=INPUT, **kw) -> Case:
    return Case(kw.pop("id", spell.__name__), layer(spell, trained, frozen), inputs, sites=0, **kw)


NEAR_MISSES: list[Case] = [
    miss(gate_of_each_token, {"g": (K, 1)}),
    miss(vector_along_tokens, {"t": (17, 1)}),
    miss(bias_along_tokens, {"l": (N,), "t": (17, 1)}),
    miss(sum_over_tokens, {"Q": (N, R)}),
    miss(mean_of_tokens_inside, {"l": (N,), "c": (N,)}, inputs=x(2, 16, K)),
    miss(tokens_mixed_with_features, {"l": (N,)}),
    miss(tokens_in_pairs, {"u": (2 * N,)}, inputs=x(2, 16, K)),
    miss(tokens_flipped, {"l": (N,)}),
    miss(cumsum_over_tokens, LORA | {"d": (R,)}, code="unknown_op"),
    miss(dropout_inside, LORA | {"d": (R,)}, code="dropout"),
    miss(relu_inside, {"l": (N,)}),
    miss(used_elsewhere, {"l": (N,)}),
    miss(read_without_its_adapter, LORA, code="shared"),
    miss(returned_without_its_adapter, LORA, code="shared"),
    miss(adapter_of_heads, {"A": (K, R), "B": (R, N // 2)}, code="shape"),
    miss(adapter_of_a_part_of_a_whole, {"A": (K, R), "B": (R, N // 2)}, code="shape"),
    miss(frozen_vectors, {"l": (N,)}, {"f": (N,)}),
    miss(rotation_of_pairs, {"l": (N,), "c": (N,)}, id="one_token", inputs=x(1, K)),
    Case("trained_norm", lambda: TrainedNorm(nn.LayerNorm), INPUT, sites=0),
    Case("trained_norm_apart", lambda: TrainedNorm(nn.LayerNorm, deep=True), INPUT, sites=0),
    Case("trained_rms_norm", lambda: TrainedNorm(nn.RMSNorm), INPUT, sites=0),
    Case("trained_norm_by_hand", lambda: TrainedNorm(HandWrittenNorm), INPUT, sites=0),
]
