"""What each form of a site costs on a machine: the seconds of each of its kernels, by machine.py.

Only what differs between the forms is priced. The base product `u·W`, and in training the low-rank products `x·A` and
`dy·Bᵀ` that the adapter's own gradients need, are the same in both:

    activation form, forward        T·r·N product, one more pass over [T,N]   (and T·K·r where no gradient needs xA)
    activation form, input gradient T·r·K product, one more pass over [T,K]
    weight form, each of the two    K·r·N product, one pass over W and W'

In FLOPs alone the forms meet at T* = K·N / (K + N) in an inference graph, and at 2·K·N / (K + N) in training, where
W' is built twice: once in forward and, never kept, again in backward. By itself each direction of training meets where
T is the other side of W: T = K in forward, T = N in the input gradient. What narrow products lose does not move
that; a slower dtype of the merge does, by the ratio of the two peaks (float64 for an fp32 W).

In bytes alone, by e and b bytes of an element of the adapter and of W, in each direction of training,

    activation form   T·r·e + r·N·e + T·N·(2e + b)        the product, its result read again, and y written
    weight form       (K·r + r·N)·m + K·N·(2m + 2b)       the same of the merge, m bytes each: 4, and 8 for an fp32 W

so for r much less than K = N they meet at T = K·(2m + 2b) / (2e + b): 1.2·K for a bf16 W under fp32 adapters, 2·K in
fp32. On a GPU, an input gradient's last product in b itself adds to the sum, (e + b)·T·N: 2.4·K in fp32. A merge in one
kernel moves 2b·K·N alone: T = 0.4·K, and 0.8·K in fp32.

>>> flop_crossover(4096, 4096, training=False), flop_crossover(4096, 4096, training=True)
(2048.0, 4096.0)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from peft_fx.kernels.merge import WIDER
from peft_fx.kernels.narrow import DTYPE, WIDEST_OF_BOTH
from peft_fx.passes.analyse.algebra import cheapest_order
from peft_fx.passes.decide.machine import Machine
from peft_fx.passes.decide.shapes import Shape

FORMS = ("weight", "activation")
IN_PLACE = 16  # an activation is read in place by products of a rank that is a sixteenth of its sides at most
COPIES = 1.0  # and where that takes no longer than copies, of which no more than a chunk is there at a time
MIX = 0.75  # a mix must be this much cheaper: it has temporaries of [T,N] that no roofline sees


@dataclass(frozen=True)
class Price:
    """Seconds, FLOPs and bytes moved of one way to compute the adapter's part of a group."""

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Price) -> Price:
        return Price(self.seconds + other.seconds, self.flops + other.flops, self.bytes + other.bytes)


def product(machine: Machine, m: int, k: int, n: int, dtype: torch.dtype, batch: int = 1) -> Price:
    """One product, `batch` times, in one kernel."""
    flops = 2 * batch * m * k * n
    bytes_ = batch * (m * k + k * n + m * n) * dtype.itemsize
    return Price(machine.product(m, k, n, dtype, batch), flops, bytes_)


def one_pass(machine: Machine, bytes_: int) -> Price:
    return Price(machine.one_pass(bytes_), 0, bytes_)


def merge_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype that W' is built in before it is cast to W's: always a wider one, so that W' is rounded once.

    An error in W' is the same for every token, so unlike a product's own rounding it does not average out in the
    gradients: with the delta itself computed in fp32, an fp32 model's gradients were up to 1.7 times as far from fp64
    as before, with fp64 1.2 times.
    """
    return WIDER.get(weight, torch.promote_types(weight, torch.float32))


def merge(machine: Machine, s: Shape) -> Price:
    """W' = W + s·A·B: the products of each term's own factors in the merge's dtype, then one pass over W and W'; or
    one kernel for all of that."""
    if s.fused:
        return _fused(machine, s)
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


def _fused(m: Machine, s: Shape) -> Price:
    """One pass over W and W', with each term's product L·R in its shade: in TF32, three times, where there is that, and
    for an fp32 W in fp64. The products that a term of more factors takes to be two are of low rank throughout."""
    flops = 2 * s.K * s.N * sum(min(n for _, n in term[:-1]) for term in s.terms)
    wide = merge_dtype(s.base_dtype)
    rate = max(m.speed(wide).peak, m.tf32 / 3 if wide == torch.float32 else 0.0)
    whole = one_pass(m, 2 * s.K * s.N * s.base_dtype.itemsize)
    return Price(max(whole.seconds, flops / rate + m.launch), flops, whole.bytes)


def activation(machine: Machine, s: Shape, skip_first: bool, grad: bool = False) -> Price:
    """(u·A)·B from the left, and the pass that adds it; without the first product where a gradient needs it in any
    case. An input gradient of one dtype has no scale behind its products, and on a GPU the last adds to the sum."""
    total, own = Price(), s.base_dtype.itemsize
    summed = grad and not machine.is_cpu and s.batch == 1 and s.base_dtype == s.adapter_dtype
    for step in (step for step in s.steps if not step.base):
        width = step.batch * step.N
        if not (skip_first and step.first and 2 * width <= s.N):
            total += product(machine, s.T, step.K, step.N, s.adapter_dtype, step.batch)
        if 2 * width > s.N:
            total += one_pass(machine, s.T * width * (s.adapter_dtype.itemsize + own))
    for term in s.terms:
        for i, (k, n) in enumerate(term):
            if not ((skip_first or s.gathered) and i == 0 and len(term) > 1):
                total += product(machine, s.T, k, n, s.adapter_dtype, s.batch)
        if summed:
            total += Price(s.T * s.N * own / machine.bandwidth, 0, s.T * s.N * own)
        else:
            total += one_pass(machine, s.batch * s.T * s.N * (s.adapter_dtype.itemsize + own))
    return total


def base(machine: Machine, s: Shape) -> Price:
    if s.gathered:
        return one_pass(machine, 2 * s.T * s.N * s.base_dtype.itemsize)
    return product(machine, s.T, s.K, s.N, s.base_dtype, s.batch)


def first_products(machine: Machine, s: Shape) -> Price:
    """The products u·A of all terms."""
    if s.gathered:
        return Price()
    steps = [(step.batch, step.K, step.N) for step in s.steps if step.first and not step.base]
    terms = [(s.batch, *t[0]) for t in s.terms if len(t) > 1]
    return sum((product(machine, s.T, k, n, s.adapter_dtype, batch) for batch, k, n in steps + terms), Price())


def reads(machine: Machine, s: Shape, in_place: bool, wider: bool = False) -> Price:
    """The two products that an adapter's gradients read u in: `u·A` [T,r] and `uᵀ·g` [K,r], g being what reaches it.

    Where u is coarser than the adapter, from a copy of it in the adapter's dtype, or in place: the narrow factor then
    is a pair of matrices of u's own dtype, twice as wide, and on a machine that gives no wider results the result is a
    pair too, by a second product. Kernels of our own read it in place once for each, and once for both where it is the
    `wider` one of x and dy.
    """
    total = Price()
    for (k, r), *rest in s.terms:
        if rest:
            here = in_place and reads_in_place(machine, s.T, k, r, s.base_dtype, s.adapter_dtype)
            if here and s.fused and s.base_dtype == DTYPE:
                total += _kernels(machine, s.T, k, r, s.adapter_dtype, 1 if wider and r <= WIDEST_OF_BOTH else 2)
            else:
                total += (_pairs if here else _copies)(machine, s.T, k, r, s.base_dtype, s.adapter_dtype, s.batch)
    return total


def _kernels(m: Machine, T: int, k: int, r: int, wide: torch.dtype, passes: int) -> Price:
    """Both products of an activation [T,k] in so many passes over it; a second kernel adds parts up in either case."""
    bytes_ = passes * T * k * DTYPE.itemsize + 2 * (T + k) * r * wide.itemsize
    flops = 2 * 2 * T * k * 2 * r
    seconds = max(bytes_ / m.bandwidth, flops / m.speed(DTYPE).peak) + 2 * m.launch
    return Price(seconds, flops, bytes_)


def _pairs(m: Machine, T: int, k: int, r: int, half: torch.dtype, wide: torch.dtype, batch: int = 1) -> Price:
    """Both products of an activation [T,k] with r columns, each with a pair of narrow factors in the place of one."""
    total, results = Price(), 1 if m.mixed else 2
    for rows, inner, narrow in ((T, k, k * r), (k, T, T * r)):
        for _ in range(results):
            total += product(m, rows, inner, 2 * r, half, batch)
        # the narrow factor is split in two, and the results' halves are added up
        total += one_pass(m, batch * narrow * (wide.itemsize + 2 * half.itemsize))
        total += one_pass(m, batch * rows * r * wide.itemsize * (1 + results))
    return total


def _copies(m: Machine, T: int, k: int, r: int, half: torch.dtype, wide: torch.dtype, batch: int = 1) -> Price:
    """The same from a copy in the adapter's dtype."""
    total = product(m, T, k, r, wide, batch) + product(m, k, T, r, wide, batch)
    read, written = (batch * T * k * dtype.itemsize for dtype in (half, wide))
    return total + Price(m.copy(read, written), 0, read + written)


def reads_in_place(m: Machine, T: int, k: int, r: int, half: torch.dtype, wide: torch.dtype) -> bool:
    """Whether products of rank r read an activation [T,k] in place: as pairs they are twice as wide, or four times.
    Those of rank one Inductor fuses with the copy.

    What a kernel takes to start says nothing of it: where that is much, the activation is small, and so is all that
    there is to be lost. What does is how fast a machine multiplies either dtype.
    """
    if r < 2 or IN_PLACE * r > min(T, k):
        return False
    at_once = m.at_once()
    return _pairs(at_once, T, k, r, half, wide).seconds <= COPIES * _copies(at_once, T, k, r, half, wide).seconds


def rounds_twice(m: Machine, half: torch.dtype) -> bool:
    """Whether an unrounded product of two half-precision matrices is had as one rounded to their dtype and a second one
    of what that lacks, on a machine that gives no wider results: else it is that of copies."""
    return m.mixed or 2 / m.speed(half).peak <= COPIES / m.speed(torch.float32).peak


@dataclass(frozen=True)
class Decision:
    """The forms chosen for a site, with the price of every choice that there was: {(forward, input_grad): seconds}."""

    forward: str
    input_grad: str
    seconds: dict[tuple[str, str], float]
    reason: str


def decide(
    machine: Machine,
    forward: Shape | None,
    grad: Shape | None,
    training: bool,
    form: str = "auto",
    in_place: bool = False,
) -> Decision:
    """The cheapest forms of a site's forward and input gradient; `form` other than "auto" takes the choice away.

    `in_place` says that with any weight form the adapter's gradients will read activations in place: what that costs
    more or less than copies counts too.
    """

    def options(s: Shape | None) -> tuple[str, ...]:
        return ("none",) if s is None else FORMS

    def seconds(s: Shape | None, chosen: str, grad: bool) -> float:
        if s is None:
            return 0.0
        return (merge(machine, s) if chosen == "weight" else activation(machine, s, training, grad)).seconds

    def read(*chosen: str) -> float:
        half = [s for s in (forward, grad) if s is not None and s.base_dtype.itemsize < s.adapter_dtype.itemsize]
        wider = max(half, key=lambda s: s.K, default=None)
        both = [reads(machine, s, "weight" in chosen, s is wider and len(half) > 1).seconds for s in half]
        return sum(both) if training and in_place else 0.0

    prices = {
        (f, g): seconds(forward, f, False) + seconds(grad, g, True) + read(f, g)
        for f, g in itertools.product(options(forward), options(grad))
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
