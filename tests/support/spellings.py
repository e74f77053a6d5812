"""LoRA `y = xW + s(xA)B` in the spellings people write, and maps that look like it but have no weight form.

Symbols: x [.., K], W [K, N] frozen, A [K, r], B [r, N] trained, s the scale, all as they multiply x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.oracle import to_dtype

K, N, R, S = 96, 64, 4, 2.0
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A module, its arguments, and what peft_fx should make of it."""

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    sites: int = 1
    mixed: bool = False  # the dtypes are the point: leave them, and keep integers within ±1 for bf16
    code: str | None = None  # near misses: the refusal expected
    options: dict[str, object] = field(default_factory=dict)

    def make(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The same module and arguments at every call, in `dtype` unless the case fixes its own."""
        torch.manual_seed(0)
        module, inputs = self.build(), self.inputs()
        if self.mixed or dtype is None:
            return module, inputs
        return module.to(dtype), to_dtype(inputs, dtype)


def tensor(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


def frozen(*shape: int, gain: float = 1.0) -> nn.Parameter:
    """A weight [.., fan in, fan out] that keeps the size of what it multiplies, but for the gain."""
    return nn.Parameter(torch.randn(shape) * gain / math.sqrt(shape[-2]), requires_grad=False)


def trained(*shape: int, gain: float = 1.0) -> nn.Parameter:
    return frozen(*shape, gain=gain).requires_grad_()


class Lora(nn.Module):
    """The tensors of one adapted layer; `spell(x, W, A, B, s)` is its forward.

    ‖sAB‖ = ‖W‖/2. Were they equal, the best weight form would miss the gate in fp32 at small ranks: on CPU the products
    with r columns run in kernels that err less, which leaves √(1 + ‖sAB‖²/‖W‖²) to be lost by a product with W + sAB.
    """

    def __init__(self, spell: Callable[..., Tensor], K: int = K, N: int = N, r: int = R, s: float = S, lead=()):
        super().__init__()
        self.W, self.A, self.B = frozen(*lead, K, N), trained(*lead, K, r), trained(*lead, r, N, gain=0.5 / S)
        self.s, self.spell = s, spell

    def forward(self, *x: Tensor) -> Tensor:
        return self.spell(*x, self.W, self.A, self.B, self.s)


# Spellings of one map, for x of any number of dimensions: the random graphs draw from these too.


def scale_right(x, W, A, B, s):
    return x @ W + (x @ A) @ B * s


def scale_left(x, W, A, B, s):
    return s * ((x @ A) @ B) + x @ W


def scale_between(x, W, A, B, s):
    return x @ W + ((x @ A) * s) @ B


def scale_on_input(x, W, A, B, s):
    return x @ W + ((s * x) @ A) @ B


def scale_on_factor(x, W, A, B, s):
    return x @ W + x @ (A * s) @ B


def scale_by_division(x, W, A, B, s):
    return x @ W + (x @ A) @ B / (1 / s)


def scale_tensor(x, W, A, B, s):
    return x @ W + (x @ A) @ B * torch.full((), s, dtype=x.dtype, device=x.device)


def scale_outer(x, W, A, B, s):
    return s * (x @ (W / s) + (x @ A) @ B)


def alpha(x, W, A, B, s):
    return torch.add(x @ W, (x @ A) @ B, alpha=s)


def subtract(x, W, A, B, s):
    return x @ W - (x @ A) @ (-B) * s


def subtract_alpha(x, W, A, B, s):
    return torch.sub(x @ W, -((x @ A) @ B), alpha=s)


def linear(x, W, A, B, s):
    return F.linear(x, W.t()) + F.linear(F.linear(x, A.t()), B.t()) * s


def matmul(x, W, A, B, s):
    return torch.matmul(x, W).add(torch.matmul(torch.matmul(x, A), B).mul(s))


def einsum(x, W, A, B, s):
    down = torch.einsum("...k,kr->...r", x, A)
    return torch.einsum("...k,kn->...n", x, W) + s * torch.einsum("...r,rn->...n", down, B)


def tensordot(x, W, A, B, s):
    return torch.tensordot(x, W, 1) + torch.tensordot(torch.tensordot(x, A, 1), B, 1) * s


def in_place(x, W, A, B, s):
    y = x @ W
    y += (x @ A) @ B * s
    return y


def flat_hidden(x, W, A, B, s):
    down = (x.reshape(-1, x.shape[-1]) @ A).view(*x.shape[:-1], A.shape[-1])
    return x @ W + down @ B * s


def halves(x, W, A, B, s):
    return (x @ W + (x @ A) @ B * (s / 2)) + (x @ A) @ B * (s / 2)


def merged_factors(x, W, A, B, s):
    return x @ W + x @ (A @ B) * s


ANY_RANK = [
    *(scale_right, scale_left, scale_between, scale_on_input, scale_on_factor, scale_by_division, scale_tensor),
    *(scale_outer, alpha, subtract, subtract_alpha, linear, matmul, einsum, tensordot, in_place, flat_hidden),
    *(halves, merged_factors),
]


# Spellings that fix the number of dimensions.


def weight_on_the_left(x, W, A, B, s):  # x [K, T]
    return W.t() @ x + B.t() @ (A.t() @ x) * s


def addmm(x, W, A, B, s):
    return torch.addmm(x @ W, x @ A, B, alpha=s)


def addmm_beta(x, W, A, B, s):
    return torch.addmm((x @ A) @ B, x, W, beta=s)


def einsum_tokens(x, W, A, B, s):
    return torch.einsum("btk,kn->btn", x, W) + torch.einsum("btk,kr,rn->btn", x, A, B) * s


def bmm_of_one(x, W, A, B, s):  # x [1, T, K]
    return torch.baddbmm(torch.bmm(x, W[None]), torch.bmm(x, A[None]), B[None], alpha=s)


def experts(x, W, A, B, s):  # x [E, T, K], W [E, K, N], A [E, K, r], B [E, r, N]
    return torch.bmm(x, W) + torch.bmm(torch.bmm(x, A), B) * s


def experts_baddbmm(x, W, A, B, s):
    return torch.baddbmm(torch.bmm(x, W), torch.bmm(x, A), B, alpha=s)


def transposed_inside(x, W, A, B, s):  # x [b, K, T], as after a convolution
    x = x.transpose(1, 2)
    return x @ W + (x @ A) @ B * s


def peft_casts(x, W, A, B, s):
    """PEFT with a bf16 base and fp32 adapters."""
    y = x @ W
    return (y + (x.to(A.dtype) @ A) @ B * s).to(y.dtype)


def autocast(x, W, A, B, s):
    with torch.autocast("cpu", BF16):
        return x @ W + (x @ A) @ B * s


class Bias(Lora):
    """A bias on the base, on the adapter (PEFT's lora_bias), or on both."""

    def __init__(self, base: bool, adapter: bool):
        super().__init__(linear)
        self.base = nn.Parameter(torch.randn(N), requires_grad=False) if base else None
        self.adapter = nn.Parameter(torch.randn(N)) if adapter else None

    def forward(self, x):
        low = F.linear(F.linear(x, self.A.t()), self.B.t(), self.adapter)
        return F.linear(x, self.W.t(), self.base) + low * self.s


class ScaleBuffer(Lora):
    """The scale is a 0-d buffer: a graph input, not a number."""

    def __init__(self):
        super().__init__(scale_right)
        del self.s
        self.register_buffer("s", torch.tensor(S))


class Int8Weight(Lora):
    """A weight of int8 numbers and a scale of each output, dequantised in every call, as torchao's int8 weight-only."""

    def __init__(self):
        super().__init__(scale_right)
        del self.W
        self.register_buffer("q", torch.randint(-127, 128, (K, N), dtype=torch.int8))
        self.scales = nn.Parameter((0.5 + torch.rand(N)) / 73 / math.sqrt(K), requires_grad=False)

    def forward(self, x):
        return self.spell(x, self.q.to(x.dtype) * self.scales, self.A, self.B, self.s)


class TwoAdapters(Lora):
    """Two adapters of different rank on one weight."""

    def __init__(self):
        super().__init__(scale_right)
        self.A2, self.B2 = trained(K, 3), trained(3, N, gain=0.5)

    def forward(self, x):
        return super().forward(x) + (x @ self.A2) @ self.B2 * 0.5


class SharedDown(nn.Module):
    """Two layers read one A: its product has two users."""

    def __init__(self):
        super().__init__()
        self.W, self.V, self.A = frozen(K, N), frozen(K, N), trained(K, R)
        self.B, self.C = trained(R, N, gain=0.5 / S), trained(R, N, gain=0.5 / S)

    def forward(self, x):
        low = x @ self.A
        return (x @ self.W + low @ self.B * S) * (x @ self.V + low @ self.C * S)


class ThreeFactors(Lora):
    """LoRA-XS: a trained r×r matrix between two frozen factors."""

    def __init__(self):
        super().__init__(scale_right)
        self.A.requires_grad_(False), self.B.requires_grad_(False)
        self.M = trained(R, R)

    def forward(self, x):
        return x @ self.W + x @ self.A @ self.M @ self.B * self.s


class QKV(nn.Module):
    """Three adapted layers read x and meet in a product: their input gradients arrive in one add tree."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (Lora(scale_right) for _ in range(3))

    def forward(self, x):
        return self.q(x) * self.k(x) + self.v(x)


class Stack(nn.Module):
    """Two adapted layers with a residual and a ReLU: the second one's input gradient feeds the first."""

    def __init__(self):
        super().__init__()
        self.up, self.down = Lora(linear), Lora(linear, K=N, N=K)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def lora(spell: Callable[..., Tensor], trainable: str = "AB", **sizes) -> Callable[[], nn.Module]:
    """A maker of a Lora whose parameters named in `trainable` are the trained ones."""

    def build() -> nn.Module:
        module = Lora(spell, **sizes)
        for name, p in module.named_parameters():
            p.requires_grad_(name in trainable)
        return module

    return build


def mixed(spell: Callable[..., Tensor], base: torch.dtype) -> Callable[[], nn.Module]:
    """A maker of a Lora whose base weight has its own dtype."""

    def build() -> nn.Module:
        module = Lora(spell)
        module.W.data = module.W.data.to(base)
        return module

    return build


def x(*shape: int, grad: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (tensor(*shape, grad=grad),)


def strided() -> tuple[Tensor]:
    """Every other row of a wider buffer."""
    return (torch.randn(66, 2 * K)[::2, ::2].requires_grad_(),)


def transposed() -> tuple[Tensor]:
    return (torch.randn(K, 33).t().requires_grad_(),)


SPELLINGS = [
    *(Case(spell.__name__, lora(spell), x(2, 17, K)) for spell in ANY_RANK),
    *(Case(spell.__name__, lora(spell), x(33, K)) for spell in (addmm, addmm_beta)),
    Case("weight_on_the_left", lora(weight_on_the_left), x(K, 33)),
    Case("einsum_tokens", lora(einsum_tokens), x(2, 17, K)),
    Case("bmm_of_one", lora(bmm_of_one), x(1, 33, K)),
    Case("experts", lora(experts, lead=(3,)), x(3, 17, K)),
    Case("experts_baddbmm", lora(experts_baddbmm, lead=(3,)), x(3, 17, K)),
    Case("scale_buffer", ScaleBuffer, x(33, K)),
    Case("scale_one", lora(scale_right, s=1.0), x(33, K)),
    Case("scale_integer", lora(scale_right, s=-1), x(33, K)),
    Case("int8_weight", Int8Weight, x(2, 17, K)),
    Case("base_bias", lambda: Bias(True, False), x(2, 17, K)),
    Case("adapter_bias", lambda: Bias(False, True), x(2, 17, K)),
    Case("both_biases", lambda: Bias(True, True), x(33, K)),
    Case("two_adapters", TwoAdapters, x(2, 17, K)),
    Case("three_factors", ThreeFactors, x(33, K)),
    Case("shared_down", SharedDown, x(33, K), sites=2),
    Case("qkv", QKV, x(2, 17, K), sites=3),
    Case("stack", Stack, x(2, 17, K), sites=2),
    Case("x_1d", lora(scale_right), x(K)),
    Case("x_2d", lora(scale_right), x(33, K)),
    Case("x_4d", lora(linear), x(2, 3, 5, K)),
    Case("one_token", lora(linear), x(1, K)),
    Case("one_token_3d", lora(scale_right), x(1, 1, K)),
    Case("no_token", lora(linear), x(0, K)),
    Case("no_token_3d", lora(scale_right), x(2, 0, K)),
    Case("x_transposed", lora(scale_right), transposed),
    Case("x_strided", lora(linear), strided),
    Case("x_transposed_inside", lora(transposed_inside), x(2, K, 17)),
    Case("x_without_gradient", lora(linear), x(2, 17, K, grad=False)),
    Case("rank_one", lora(linear, r=1), x(2, 17, K)),
    Case("rank_full", lora(scale_right, r=N), x(33, K)),
    Case("square", lora(scale_right, N=K), x(K, K)),
    Case("frozen_a", lora(linear, trainable="B"), x(2, 17, K)),
    Case("frozen_b", lora(linear, trainable="A"), x(2, 17, K)),
    Case("frozen_adapter", lora(linear, trainable=""), x(2, 17, K)),
    Case("trained_base", lora(linear, trainable="WAB"), x(2, 17, K)),
    Case("peft_casts", mixed(peft_casts, BF16), lambda: to_dtype(x(2, 17, K)(), BF16), mixed=True),
    Case("autocast", mixed(autocast, torch.float32), x(2, 17, K), mixed=True),
    Case("autocast_bf16_base", mixed(autocast, BF16), x(2, 17, K), mixed=True),
]


# Near misses: no W' gives the same map, or not in the precision asked for.


def other_input(x, z, W, A, B, s):
    return x @ W + (z @ A) @ B * s


def between(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, W, A, B, s: x @ W + act(x @ A) @ B * s


def on_delta(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, W, A, B, s: x @ W + act((x @ A) @ B) * s


def on_input(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, W, A, B, s: x @ W + (act(x) @ A) @ B * s


def dropout(x):
    return F.dropout(x, 0.25, training=True)


def layer_norm(h):
    return F.layer_norm(h, h.shape[-1:])


def factor_from_input(x, W, A, B, s):
    return x @ W + (x @ (A * x.mean())) @ B * s


def dropped_factor(x, W, A, B, s):
    """Rank dropout: some columns of a factor, drawn for all tokens at once."""
    return x @ W + x @ (A * (torch.rand(A.shape[-1], dtype=A.dtype) > 0.2)) @ B * s


def drawn_about_a_product(x, W, A, B, s):
    """PVeRA in training: a mean and a variance for each token."""
    mean, log_variance = (x @ A).chunk(2, dim=-1)
    return x @ W + (mean + torch.randn_like(mean) * torch.exp(log_variance / 2)) @ B[: R // 2] * s


def some_tokens(x, W, A, B, s):
    """aLoRA: the adapter begins at some token."""
    adapted = torch.arange(x.shape[-2])[:, None] > 5
    return x @ W + (x @ A) @ B * s * adapted


def mixed_by_sample(x, mix, W, A, B, s):  # mix [b, 1, 1]
    """Poly: factors of each sample."""
    return x @ W + torch.bmm(torch.bmm(x, A * mix), B.expand(len(mix), *B.shape)) * s


def adapters_by_sample(x, W, A, B, s):  # x [b, T, K], A [b, K, r], B [b, r, N], W [b, K, N]
    """One weight, an adapter of its own for each sample."""
    return x @ W[0] + torch.bmm(torch.bmm(x, A), B) * s


def mutated_between(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The base reads h before an in-place change, the adapter after it."""

    def spell(x, W, A, B, s):
        h = x * 2
        y = h @ W
        change(h)
        return y + (h @ A) @ B * s

    return spell


class TokenGate(Lora):
    """A gate per token on the adapter's output."""

    def __init__(self):
        super().__init__(scale_right)
        self.g = trained(K, 1)

    def forward(self, x):
        return x @ self.W + torch.sigmoid(x @ self.g) * ((x @ self.A) @ self.B)


class Mixture(Lora):
    """Adapters mixed by a router's softmax."""

    def __init__(self):
        super().__init__(scale_right)
        self.router, self.A2, self.B2 = trained(K, 2), trained(K, R), trained(R, N)

    def forward(self, x):
        p = torch.softmax(x @ self.router, -1)
        return x @ self.W + p[..., :1] * (x @ self.A @ self.B) + p[..., 1:] * (x @ self.A2 @ self.B2)


class Int8Base(nn.Module):
    """An int8 weight behind an int8 product; the adapter in bf16."""

    def __init__(self):
        super().__init__()
        self.register_buffer("W", torch.randint(-127, 128, (N, K), dtype=torch.int8))
        self.register_buffer("scales", torch.full((N,), 0.01, dtype=BF16))
        self.A, self.B = (nn.Parameter(trained(*shape).to(BF16)) for shape in ((K, R), (R, N)))

    def forward(self, x):
        return torch._weight_int8pack_mm(x, self.W, self.scales) + (x @ self.A) @ self.B * S


def miss(id: str, code: str, spell: Callable[..., Tensor] | type, inputs=None, **kw) -> Case:
    build = spell if isinstance(spell, type) or spell.__name__ == "build" else lora(spell)
    return Case(id, build, inputs or x(2, 17, K), sites=0, code=code, **kw)


STRICT = {"peft_fx.numerics": "strict"}

NEAR_MISSES = [
    miss("other_input", "different_input", other_input, lambda: (tensor(33, K), tensor(33, K))),
    miss("adapter_of_relu", "different_input", on_input(torch.relu)),
    miss("adapter_of_norm", "different_input", on_input(layer_norm)),
    miss("adapter_of_shifted_tokens", "different_input", on_input(lambda x: x.roll(1, -2))),
    miss("adapter_of_pooled_tokens", "different_input", on_input(lambda x: x.mean(-2, keepdim=True))),
    miss("relu_between", "nonlinear", between(torch.relu)),
    miss("gelu_between", "nonlinear", between(F.gelu)),
    miss("tanh_between", "nonlinear", between(torch.tanh)),
    miss("softmax_between", "nonlinear", between(lambda h: h.softmax(-1))),
    miss("layer_norm_between", "nonlinear", between(layer_norm)),
    miss("clamp_between", "nonlinear", between(lambda h: h.clamp(-1, 1))),
    miss("relu_on_delta", "nonlinear", on_delta(torch.relu)),
    miss("token_gate", "input_dependent", TokenGate),
    miss("mixture", "input_dependent", Mixture),
    miss("factor_from_input", "input_dependent", factor_from_input),
    miss("dropout_on_input", "dropout", on_input(dropout)),
    miss("dropout_between", "dropout", between(dropout)),
    miss("dropout_on_delta", "dropout", on_delta(dropout)),
    miss("dropped_factor", "dropout", dropped_factor),
    miss("drawn_about_a_product", "input_dependent", drawn_about_a_product),
    miss("some_tokens", "input_dependent", some_tokens),
    miss("mixed_by_sample", "input_dependent", mixed_by_sample, lambda: (tensor(2, 17, K), tensor(2, 1, 1))),
    miss("adapters_by_sample", "shape", lora(adapters_by_sample, lead=(2,))),
    miss("rectified_between_uses", "mutation", mutated_between(lambda h: h.relu_())),
    miss("cumsum_between", "unknown_op", between(lambda h: h.cumsum(-1))),
    miss("sorted_between", "unknown_op", between(lambda h: h.sort(-1).values)),
    Case(
        "dtype_boundary",
        mixed(peft_casts, BF16),
        lambda: to_dtype(x(33, K)(), BF16),
        sites=0,
        mixed=True,
        code="dtype",
        options=STRICT,
    ),
    Case(
        "int8_base",
        Int8Base,
        lambda: to_dtype(x(33, K, grad=False)(), BF16),
        sites=0,
        mixed=True,
        code="quantized",
    ),
]
