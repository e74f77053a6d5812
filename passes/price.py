"""What each form of a site costs on a machine: a roofline, `max(FLOPs / peak, bytes / bandwidth) + launch` for each
kernel.

Only what differs between the forms is priced. The base product `u·W`, and in training the low-rank products `x·A` and
`dy·Bᵀ` that the adapter's own gradients need, are the same in both:

    activation form, forward        T·r·N product, one more pass over [T,N]   (and T·K·r where no gradient needs xA)
    activation form, input gradient T·r·K product, one more pass over [T,K]
    weight form, each of the two    K·r·N product, one pass over W and W'

In FLOPs alone the forms meet at T* = K·N / (K + N) in an inference graph, and at 2·K·N / (K + N) in training, where
W' is built twice: once in forward and, never kept, again in backward.

>>> flop_crossover(4096, 4096, training=False), flop_crossover(4096, 4096, training=True)
(2048.0, 4096.0)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from peft_fx.passes.algebra import Size, Term, cheapest_order, finer

FORMS = ("weight", "activation")
MIX = 0.75  # a mix must be this much cheaper: it has temporaries of [T,N] that no roofline sees


@dataclass(frozen=True)
class Machine:
    """Peak FLOP/s by dtype (`other` for the rest), bytes/s of main memory, seconds to launch a kernel."""

    name: str
    flops: tuple[tuple[torch.dtype, float], ...]
    bandwidth: float
    launch: float

    def rate(self, dtype: torch.dtype) -> float:
        rates: dict[torch.dtype, float] = dict(self.flops)
        return rates.get(dtype, min(rates.values()))

    def seconds(self, flops: float, bytes_: float, dtype: torch.dtype, launches: int = 1) -> float:
        return max(flops / self.rate(dtype), bytes_ / self.bandwidth) + launches * self.launch


def _machine(name: str, half: float, single: float, double: float, bandwidth: float, launch: float) -> Machine:
    """Rates in TFLOP/s and TB/s, launch in microseconds; fp32 without TF32."""
    rates = ((torch.bfloat16, half), (torch.float16, half), (torch.float32, single), (torch.float64, double))
    return Machine(name, tuple((d, r * 1e12) for d, r in rates), bandwidth * 1e12, launch * 1e-6)


# Dense peaks of the makers' data sheets, times 0.7 for what large products reach of them. Without a launch term on
# CPU, where a kernel is a function call.
MACHINES: Mapping[str, Machine] = {
    m.name: m
    for m in (
        _machine("h200", 690, 47, 23, 4.3, 4),
        _machine("h100", 690, 47, 23, 3.0, 4),
        _machine("a100", 218, 13.6, 6.8, 1.6, 4),
        _machine("l40s", 253, 64, 1.0, 0.78, 4),
        _machine("rtx4090", 115, 57, 0.9, 0.9, 4),
        _machine("rtx3090", 50, 25, 0.4, 0.84, 4),
        _machine("t4", 45, 5.6, 0.18, 0.29, 5),
        _machine("cuda", 100, 15, 0.5, 0.8, 5),
        _machine("cpu", 0.1, 0.1, 0.05, 0.012, 2),
    )
}


def machine_for(device: torch.device) -> Machine:
    """The table's entry for a device, by the name its driver gives; the closest class for an unknown one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return MACHINES["cuda" if device.type == "cuda" else "cpu"]
    name = torch.cuda.get_device_name(device).lower().replace(" ", "").replace("geforce", "")
    return next((m for key, m in MACHINES.items() if key in name), MACHINES["cuda"])


@dataclass(frozen=True)
class Step:
    """A product of a region that is no sum of terms, by `batch` weights [K,N]; `first` where it reads the input as it
    is, or scaled, so that for W' it is the weight itself."""

    batch: int
    K: int
    N: int
    first: bool
    base: bool


@dataclass(frozen=True)
class Shape:
    """One group's sizes as numbers: `K`, `N` as W multiplies u, the inner sizes of each adapter term, or the steps of
    a region, and the dtypes."""

    T: int
    K: int
    N: int
    terms: tuple[tuple[tuple[int, int], ...], ...]
    base_dtype: torch.dtype
    adapter_dtype: torch.dtype
    batch: int = 1
    steps: tuple[Step, ...] = ()

    @property
    def rank(self) -> int:
        if self.steps:
            return min((s.batch * s.N for s in self.steps if not s.base), default=min(self.K, self.N))
        return min((n for term in self.terms for _, n in term[:-1]), default=min(self.K, self.N))


@dataclass(frozen=True)
class Price:
    """Seconds, FLOPs and bytes moved of one way to compute the adapter's part of a group."""

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Price) -> Price:
        return Price(self.seconds + other.seconds, self.flops + other.flops, self.bytes + other.bytes)


def product(machine: Machine, m: int, k: int, n: int, dtype: torch.dtype, batch: int = 1) -> Price:
    flops = 2 * batch * m * k * n
    bytes_ = batch * (m * k + k * n + m * n) * dtype.itemsize
    return Price(machine.seconds(flops, bytes_, dtype), flops, bytes_)


def one_pass(machine: Machine, bytes_: int) -> Price:
    return Price(machine.seconds(0, bytes_, torch.float32), 0, bytes_)


def merge_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype that W' is built in before it is cast to W's: always a wider one, so that W' is rounded once.

    An error in W' is the same for every token, so unlike a product's own rounding it does not average out in the
    gradients: with the delta itself computed in fp32, an fp32 model's gradients were up to 1.7 times as far from fp64
    as before, with fp64 1.2 times.
    """
    return torch.float64 if weight in (torch.float32, torch.float64) else torch.float32


def merge(machine: Machine, s: Shape) -> Price:
    """W' = W + s·A·B: the products of each term's own factors in the merge's dtype, then one pass over W and W'."""
    dtype = merge_dtype(s.base_dtype)
    total = Price()
    for step in s.steps:
        if not step.first or step.batch > 1:
            total += product(machine, s.K, step.K, step.N, dtype, step.batch)
    for term in s.terms:
        shapes = list(term)
        for i in cheapest_order(list(shapes)):
            (m, k), (_, n) = shapes[i : i + 2]
            total += product(machine, m, k, n, dtype, s.batch)
            shapes[i : i + 2] = [(m, n)]
    return total + one_pass(machine, s.batch * s.K * s.N * (2 * s.base_dtype.itemsize + dtype.itemsize * len(s.terms)))


def activation(machine: Machine, s: Shape, skip_first: bool) -> Price:
    """(u·A)·B from the left, and the pass that adds it; without the first product where a gradient needs it in any
    case."""
    total = Price()
    for step in (step for step in s.steps if not step.base):
        width = step.batch * step.N
        if not (skip_first and step.first and 2 * width <= s.N):
            total += product(machine, s.T, step.K, step.N, s.adapter_dtype, step.batch)
        if 2 * width > s.N:
            total += one_pass(machine, s.T * width * (s.adapter_dtype.itemsize + s.base_dtype.itemsize))
    for term in s.terms:
        for i, (k, n) in enumerate(term):
            if not (skip_first and i == 0 and len(term) > 1):
                total += product(machine, s.T, k, n, s.adapter_dtype, s.batch)
        total += one_pass(machine, s.batch * s.T * s.N * (s.adapter_dtype.itemsize + s.base_dtype.itemsize))
    return total


def base(machine: Machine, s: Shape) -> Price:
    return product(machine, s.T, s.K, s.N, s.base_dtype, s.batch)


def first_products(machine: Machine, s: Shape) -> Price:
    """The products u·A of all terms."""
    steps = [(step.batch, step.K, step.N) for step in s.steps if step.first and not step.base]
    terms = [(s.batch, *t[0]) for t in s.terms if len(t) > 1]
    return sum((product(machine, s.T, k, n, s.adapter_dtype, batch) for batch, k, n in steps + terms), Price())


@dataclass(frozen=True)
class Decision:
    """The forms chosen for a site, with the price of every choice that there was: {(forward, input_grad): seconds}."""

    forward: str
    input_grad: str
    seconds: dict[tuple[str, str], float]
    reason: str


def decide(machine: Machine, forward: Shape | None, grad: Shape | None, training: bool, form: str = "auto") -> Decision:
    """The cheapest forms of a site's forward and input gradient; `form` other than "auto" takes the choice away."""

    def options(s: Shape | None) -> tuple[str, ...]:
        return ("none",) if s is None else FORMS

    def seconds(s: Shape | None, chosen: str) -> float:
        if s is None:
            return 0.0
        return (merge(machine, s) if chosen == "weight" else activation(machine, s, skip_first=training)).seconds

    prices = {
        (f, g): seconds(forward, f) + seconds(grad, g) for f, g in itertools.product(options(forward), options(grad))
    }
    allowed = {k: v for k, v in prices.items() if form == "auto" or all(c in (form, "none") for c in k)}
    pure = min((k for k in allowed if len(set(k) - {"none"}) == 1), key=lambda k: (allowed[k], k.count("weight")))
    best = min(allowed, key=lambda k: (allowed[k], k.count("weight")))
    best = best if allowed[best] < MIX * allowed[pure] else pure
    return Decision(*best, seconds=prices, reason=_reason(machine, prices, best, form))


def _reason(machine: Machine, prices: dict[tuple[str, str], float], best: tuple[str, str], form: str) -> str:
    def all_in(form: str) -> float:
        return next((v for k, v in prices.items() if set(k) <= {form, "none"}), 0.0)

    compared = " vs ".join(f"{f} {1e6 * all_in(f):.0f} µs" for f in FORMS)
    if len(set(best) - {"none"}) > 1:
        compared += f" vs mix {1e6 * prices[best]:.0f} µs"
    chosen = "asked for" if form != "auto" else "cheaper" if len(set(best) - {"none"}) == 1 else "cheapest mix"
    return f"{chosen}: {compared} on {machine.name}"


def flop_crossover(K: int, N: int, training: bool) -> float:
    """The number of tokens at which both forms cost the same FLOPs, whatever the rank."""
    return (2 if training else 1) * K * N / (K + N)


def shape_of(
    tokens: Size,
    weight: tuple[Size, Size],
    remainders: tuple[Term, ...],
    base_dtype: torch.dtype,
    hint: Callable[[Size], int],
    batch: Size = 1,
    right: bool = False,
) -> Shape:
    """A group's sizes with hints for symbols. From the right, everything is transposed: `W @ x` is `(xᵀ @ Wᵀ)ᵀ`."""
    terms = [t.T if right else t for t in remainders]
    k, n = reversed(weight) if right else weight
    dtypes = [d for t in terms for d in t.dtypes] or [base_dtype]
    adapter = functools.reduce(finer, dtypes)
    return Shape(
        hint(tokens),
        hint(k),
        hint(n),
        tuple(tuple((hint(f.shape[0]), hint(f.shape[1])) for f in t.factors) for t in terms),
        base_dtype,
        adapter,
        hint(batch),
    )
