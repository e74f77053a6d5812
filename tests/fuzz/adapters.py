"""Steps that plant an adapter, or what is nearly one, and how often each is drawn."""

from __future__ import annotations

import re
from math import prod

from tests.fuzz.drafts import BF16, DIMS, F32, SCALES, Draft, Production
from tests.fuzz.programs import BY_RANK, Step
from tests.support import row_ops, spellings


def adapted(d: Draft, v: str) -> Step:
    """LoRA in one of its spellings."""
    *lead, K = d.shape(v)
    N, (dtype, _) = d.rng.choice(DIMS), d.base()
    a, b = (d.rng.choice(spellings.ANY_RANK).__name__ for _ in range(2))
    given = ", ".join([d.cast(v, dtype), *d.lora(K, N, dtype)])
    plain = min(prod(lead), K, N) > d.rank > 1  # of a size of one a sum is made, of a wide factor a layer
    y = d.new((*lead, N), dtype)
    return d.step(f"{y} = {a}({given})", reads=(v,), makes=y, other=(f"{y} = {b}({given})",) if plain else ())


def adapted_by_rank(d: Draft, v: str) -> Step | None:
    """LoRA in a spelling that fixes the number of dimensions."""
    shape, (dtype, _) = d.shape(v), d.base()
    if len(shape) not in BY_RANK:
        return None
    f, N = d.rng.choice(BY_RANK[len(shape)]), d.rng.choice(DIMS)
    if f is spellings.weight_on_the_left:
        K, made = shape[0], (N, shape[1])
    elif f is spellings.transposed_inside:
        K, made = shape[1], (shape[0], shape[2], N)
    else:
        K, made = shape[-1], (*shape[:-1], N)
    given = ", ".join([d.cast(v, dtype), *d.lora(K, N, dtype)])
    y = d.new(made, dtype)
    return d.step(f"{y} = {f.__name__}({given})", reads=(v,), makes=y)


def experts(d: Draft, v: str) -> Step | None:
    """A batch of weights, each with its adapter; or one in a batch of one."""
    shape, (dtype, _) = d.shape(v), d.base()
    if len(shape) != 3 or not shape[0]:
        return None
    E, T, K = shape
    N, one = d.rng.choice(DIMS), E == 1 and d.chance(0.5)
    f = "bmm_of_one" if one else d.rng.choice(["experts", "experts_baddbmm"])
    given = ", ".join([d.cast(v, dtype), *d.lora(K, N, dtype, () if one else (E,))])
    y = d.new((E, T, N), dtype)
    return d.step(f"{y} = {f}({given})", reads=(v,), makes=y)


def biased(d: Draft, v: str) -> Step:
    """LoRA on a layer with a bias, and perhaps one of its own."""
    *lead, K = d.shape(v)
    N, (dtype, _) = d.rng.choice(DIMS), d.base()
    x, (W, A, B, s) = d.cast(v, dtype), d.lora(K, N, dtype)
    b, own = d.param("b", (N,), dtype, 0.2), d.chance(0.3)
    c = f", {d.param('c', (N,), dtype, 0.8)}" if own else ""
    y = d.new((*lead, N), dtype)
    line = f"{y} = F.linear({x}, {W}.t(), {b}) + F.linear(F.linear({x}, {A}.t()), {B}.t(){c}) * {s}"
    return d.step(line, reads=(v,), makes=y)


def twice_adapted(d: Draft, v: str) -> Step:
    """Two adapters on one weight, the second perhaps of three factors."""
    *lead, K = d.shape(v)
    N, (dtype, _) = d.rng.choice(DIMS), d.base()
    x, (W, A, B, s) = d.cast(v, dtype), d.lora(K, N, dtype)
    C, D = d.param("C", (K, 2), dtype, 0.8), d.param("D", (2, N), dtype, 0.8)
    M = f" @ {d.param('M', (2, 2), dtype, 0.8)}" if d.chance(0.4) else ""
    y = d.new((*lead, N), dtype)
    delta = f"({x} @ {C}{M}) @ {D}"
    return d.step(f"{y} = {x} @ {W} + ({x} @ {A}) @ {B} * {s} - {delta}", reads=(v,), makes=y)


def siblings(d: Draft, v: str) -> Step:
    """Two adapted layers that read one value, and perhaps share A."""
    *lead, K = d.shape(v)
    N, (dtype, adapter) = d.rng.choice(DIMS), d.base()
    x, (W, A, B, s) = d.cast(v, dtype), d.lora(K, N, dtype, adapter=adapter)
    V, D = d.param("V", (K, N), dtype, 0.0), d.param("D", (d.rank, N), adapter, 0.85)
    C = A if d.chance(0.4) else d.param("C", (K, d.rank), adapter, 0.85)
    y = d.new((*lead, N), dtype)
    z = f"{x}.to(torch.{adapter})"
    lines = (
        f"q = {x} @ {W} + (({z} @ {A}) @ {B} * {s}).to(torch.{dtype})",
        f"k = {x} @ {V} + (({z} @ {C}) @ {D} * {s}).to(torch.{dtype})",
        f"{y} = {d.rng.choice(['q * k', 'q + k', 'torch.relu(q) - k'])}",
    )
    return d.step(*lines, reads=(v,), makes=y)


def rowwise(d: Draft, v: str) -> Step:
    """Row-wise affine ops before and after a frozen product, and perhaps a branch beside it."""
    *lead, K = d.shape(v)
    dtype, _ = d.base()
    names = iter("defghijklmnopqrstu")

    def chain(text: str, n: int, length: int) -> tuple[str, int]:
        for _ in range(d.rng.randint(0, length)):
            op = row_ops.OPS[d.rng.choice(row_ops.fitting(n))]
            given = [d.param(next(names), shape, dtype, 0.7) for shape in op.params(n)]
            text, n = f"{op.f.__name__}({', '.join([text, *given])})", op.result(n)
        return text, n

    x, N = d.cast(v, dtype), d.rng.choice([2, 4, 8])
    before, n = chain(x, K, 1)
    bias = f" + {d.param('b', (N,), dtype, 0.1)}" if d.chance(0.4) else ""
    text, M = chain(f"({before} @ {d.param('W', (n, N), dtype, 0.0)}{bias})", N, 3)
    if d.chance(0.4):
        branch, n = chain(x, K, 2)
        text = f"{text} + {branch} @ {d.param('B', (n, M), dtype, 1.0)}"
    y = d.new((*lead, M), dtype)
    return d.step(f"{y} = {text}", reads=(v,), makes=y)


def fused(d: Draft, v: str) -> Step:
    """Several layers in one product, some with an adapter on their part of its result."""
    *lead, K = d.shape(v)
    n, m, (dtype, adapter) = d.rng.choice([2, 3]), d.rng.choice(DIMS), d.base()
    x, y = d.cast(v, dtype), d.new((*lead, m), dtype)
    W, bias = d.param("W", (K, n * m), dtype, 0.1), d.chance(0.3)
    b = f" + {d.param('b', (n * m,), dtype, 0.2)}" if bias else ""
    z, deltas = f"{x}.to(torch.{adapter})", {}
    for i in range(n):
        if not i or d.chance(0.5):
            A, B = d.param(f"A{i}", (K, 2), adapter, 0.85), d.param(f"B{i}", (2, m), adapter, 0.85)
            deltas[i] = f"(({z} @ {A}) @ {B} * {d.rng.choice(SCALES)}).to(torch.{dtype})"
    names = [f"p{i}" for i in range(n)]
    columns = [f"h[..., {i * m}:{(i + 1) * m}]" for i in range(n)]
    added = [f"{names[i]} = {names[i]} + {delta}" for i, delta in deltas.items()]
    sliced = [f"{name} = {column}" for name, column in zip(names, columns, strict=True)]
    ways = {
        "split": [f"{', '.join(names)} = h.chunk({n}, -1)", *added],
        "sliced": [*sliced, *added],
        "in place": [*(f"{columns[i]} += {delta}" for i, delta in deltas.items()), *sliced],
        "heads": [f"{', '.join(names)} = h.unflatten(-1, ({n}, {m})).unbind(-2)", *added],
        "read besides": [*sliced, *added, f"p0 = p0 + h.sum(-1, keepdim=True).expand({(*lead, m)})"],
    }
    text = d.rng.choice([" * ", " + ", " - "]).join(names)
    if d.chance(0.3):
        text = f"(torch.cat([{', '.join(names)}], -1) * 2)[..., :{m}]"
    a, c = (d.rng.choice(list(ways)[:3]) for _ in range(2))
    a = a if d.chance(0.8) else d.rng.choice(list(ways))
    lines, others = ((f"h = {x} @ {W}{b}", *ways[way], f"{y} = {text}") for way in (a, c))
    # where the layer is trained and a frozen factor is half as wide, nothing says which of both is the layer
    told_apart = W.removeprefix("self.") in d.weights or min(m, K) > 4
    plain = a in list(ways)[:3] and prod(lead) > 2 and m > 2 < K and told_apart
    return d.step(*lines, reads=(v,), makes=y, other=others if plain else ())


MISSES = (
    "{x} @ {W} + torch.relu({x} @ {A}) @ {B} * {s}",
    "{x} @ {W} + torch.relu(({x} @ {A}) @ {B}) * {s}",
    "{x} @ {W} + (torch.relu({x}) @ {A}) @ {B} * {s}",
    "{x} @ {W} + ({x} @ {A}).clamp(-1, 1) @ {B} * {s}",
    "{x} @ {W} + ({x} @ {A}).cumsum(-1) @ {B} * {s}",
    "{x} @ {W} + ({x} @ {A}).sort(-1).values @ {B} * {s}",
    "{x} @ {W} + (F.dropout({x}, 0.5) @ {A}) @ {B} * {s}",
    "{x} @ {W} + F.dropout({x} @ {A}, 0.5) @ {B} * {s}",
    "{x} @ {W} + F.dropout(({x} @ {A}) @ {B}, 0.5) * {s}",
    "{x} @ {W} + ({x} @ ({A} * {x}.sum())) @ {B} * {s}",
    "{x} @ {W} + ({x} @ {A}) @ {B} * {x}.sum(-1, keepdim=True)",
    "{x} @ {W} + ({x}.flip(0) @ {A}) @ {B} * {s}",
    "{x} @ {W} + ({x}.roll(1, 0) @ {A}) @ {B} * {s}",
    "{x} @ {W} + ({x}.sum(0, keepdim=True) @ {A}) @ {B} * {s}",
    "{x} @ {W} + ({z} @ {A}) @ {B} * {s}",
    "{x} @ {W} + ({x} @ {A}) @ {B} * ({x}[..., :1] > 0)",
)


def near_miss(d: Draft, v: str) -> Step:
    """What looks like LoRA and has no weight form."""
    *lead, K = d.shape(v)
    N, (dtype, _) = d.rng.choice(DIMS), d.base()
    x, (W, A, B, s) = d.cast(v, dtype), d.lora(K, N, dtype)
    z = d.cast(d.rng.choice([u for u in d.values if d.shape(u) == d.shape(v)]), dtype)
    y = d.new((*lead, N), dtype)
    if d.chance(0.1):
        change = d.rng.choice(["relu_()", "add_(1)", f"mul_({x})"])
        lines = (f"h = {x} * 2", f"{y} = h @ {W}", f"h.{change}", f"{y} = {y} + (h @ {A}) @ {B} * {s}")
    else:
        lines = (f"{y} = " + d.rng.choice(MISSES).format(x=x, z=z, W=W, A=A, B=B, s=s),)
    return d.step(*lines, reads=(v, *re.findall(r"^v\d+", z)), makes=y)


def cast_adapter(d: Draft, v: str) -> Step:
    """PEFT's own casts, dropout perhaps between; or autocast around all of it."""
    *lead, K = d.shape(v)
    N, (dtype, adapter) = d.rng.choice(DIMS), d.base()
    if d.kind == "mixed" and d.chance(0.3):
        W, A, B, s = d.lora(K, N, d.rng.choice([F32, BF16]), adapter=F32)
        y, x = d.new((*lead, N), BF16), d.cast(v, F32)
        lines = ('with torch.autocast("cpu", torch.bfloat16):', f"    {y} = {x} @ {W} + ({x} @ {A}) @ {B} * {s}")
        return d.step(*lines, reads=(v,), makes=y)
    given = ", ".join([d.cast(v, dtype), *d.lora(K, N, dtype, adapter=adapter)])
    y = d.new((*lead, N), dtype)
    return d.step(f"{y} = peft_casts({given})", reads=(v,), makes=y)


def finer(d: Draft, v: str) -> Step | None:
    """An adapter finer than its base; what comes of the two is rounded, or not."""
    if d.kind != "mixed":
        return None
    *lead, K = d.shape(v)
    N, x = d.rng.choice(DIMS), d.cast(v, BF16)
    if d.chance(0.7):
        W, A, B, s = d.lora(K, N, BF16, adapter=F32)
        text = f"{x} @ {W} + {x}.float() @ {A} @ {B} * {s}"
    else:
        W, p = d.param("W", (K, N), BF16, 0.1), d.param("p", (N,), F32, 0.9)
        text = f"({x} @ {W}) * {p}"
    made = d.rng.choice([F32, F32, BF16])
    y = d.new((*lead, N), made)
    return d.step(f"{y} = ({text}).to(torch.{made})", reads=(v,), makes=y)


def dora(d: Draft, v: str) -> Step | None:
    """DoRA, its norm without a gradient."""
    if d.kind != "real":
        return None
    *lead, K = d.shape(v)
    N = d.rng.choice(DIMS)
    W, A, B, s = d.lora(K, N, F32)
    m = d.param("m", (N,), F32, 1.0)
    y = d.new((*lead, N), F32)
    lines = (
        f"g = {m} / (1 + ({W} + ({A} @ {B}) * {s}).norm(dim=0).detach())",
        f"{y} = {v} @ {W}",
        f"{y} = {y} + (g - 1) * {y} + g * (({v} @ {A}) @ {B}) * {s}",
    )
    return d.step(*lines, reads=(v,), makes=y)


def embedded(d: Draft, v: str) -> Step:
    """LoRA on an embedding; the ids are made of a value's signs."""
    lead = d.shape(v)[:-1]
    N, (dtype, _) = d.rng.choice(DIMS), d.base()
    W, A, B, s = d.lora(3, N, dtype)
    y = d.new((*lead, N), dtype)
    lines = (
        f"i = ({v}.sum(-1) > 0).long() + ({v}[..., 0] > 0).long()",
        f"{y} = F.embedding(i, {W}) + F.embedding(i, {A}) @ {B} * {s}",
    )
    return d.step(*lines, reads=(v,), makes=y)


def convolved(d: Draft, v: str) -> Step | None:
    """LoRA on a convolution of one dimension."""
    shape = d.shape(v)
    if len(shape) != 3 or 0 in shape:
        return None
    b, K, L = shape
    N, k, (dtype, _) = d.rng.choice(DIMS), d.rng.choice([1, 1, 3]), d.base()
    r, x = d.rng.randint(1, 3), d.cast(v, dtype)
    W = d.param("W", (N, K, k), dtype, 0.1)
    A, B = d.param("A", (r, K, k), dtype, 0.85), d.param("B", (N, r, 1), dtype, 0.85)
    y = d.new((b, N, L), dtype)
    line = f"{y} = F.conv1d({x}, {W}, padding={k // 2}) + F.conv1d(F.conv1d({x}, {A}, padding={k // 2}), {B})"
    return d.step(line, reads=(v,), makes=y)


# A state's numbers as a copy, so that eager mode may write over it before backward.
COPIES = ("{n} * 1.0", "{n}.clone()", "{n} + 0", "1.0 * {n}", "{n} * 2", "-{n}", "{n} / 1", "{n}.neg().neg()")
COPIES += (
    "{n}.clone().view_as({n})",
    "{n}.double().to(torch.{dtype})",
    "torch.ones_like({n}) * {n}",
    "{n}.detach() * 1",
)
COPIES += ("{n}.double().to(torch.{dtype}) * 1.0", "torch.zeros_like({n}) + {n}", "{n}[...] * 1.0", "{n}.mT.clone().mT")
# Or as it is, where nothing writes over it any more.
READS = (*COPIES, "{n}", "{n}[...]", "{n}.view_as({n})", "{n}.to(torch.{dtype})", "{n}.detach()")
WRITES = ("add_(1)", "mul_(2)", "zero_()", "copy_({n} * -2)", "fill_(3)", "neg_()", "sub_({n} * 2)", "mul_(2).add_(1)")
PARTS = ("{n}[..., :1] = 2", "{n}[..., -1:] += 1", "{n}[0] = 1", "{n}[..., :1].mul_(2)", "{n}.view(-1)[:1].fill_(2)")
PARTS += (
    "{n}[torch.tensor([0])] = {n}[:1] * -1",
    "{n}.index_add_(0, torch.tensor([0]), {n}[:1] * 1)",
    "{n}[:1].copy_({n}[-1:] * 2)",
)


def stateful(d: Draft, v: str) -> Step:
    """An adapter of which one part is made of what forward writes: before it is read, between two reads, after them."""
    *lead, K = d.shape(v)
    N, (dtype, _) = d.rng.choice(DIMS), d.base()
    x, (W, A, B, s) = d.cast(v, dtype), d.lora(K, N, dtype)
    sizes = {"W": (K, N), "A": (K, d.rank), "B": (d.rank, N), "mask": (K, d.rank), "inner": (d.rank,), "outer": (N,)}
    kind = d.rng.choice([*sizes, "scale", "scale", "counter", "trained", "statistic"])
    if kind == "trained":
        n = d.rng.choice([A, B])
    else:
        held = "int64" if kind == "counter" else dtype
        if kind == "scale" and held == "float64":
            held = "float32"  # Dynamo 2.13 takes a float64 of no dimensions for a number, and leaves writes to it out
        n = d.param("n", (K,) if kind == "statistic" else sizes.get(kind, ()), held, 0.0, buffer=d.chance(0.8))
    now = [d.chance(0.3), d.chance(0.7), d.chance(0.4)]
    now[1] |= not any(now)

    def write() -> str:
        text = d.rng.choice(WRITES) if kind in ("scale", "counter") or d.chance(0.6) else d.rng.choice(PARTS)
        text = text if text.startswith("{n}") else f"{{n}}.{text}"
        if kind == "statistic" and d.chance(0.5):
            text = f"{{n}}.mul_(2).add_({x}.detach().reshape(-1, {K}).sum(0))"
        return f"with torch.no_grad(): {text}".format(n=n)

    def layer(last: bool) -> str:
        read = d.rng.choice(READS if last else COPIES).format(n=n, dtype=dtype)
        read = f"({n} * 1).to(torch.{dtype})" if kind == "counter" else f"({read})"
        w, a, b = (read if n == p or kind == name else p for p, name in ((W, "W"), (A, "A"), (B, "B")))
        a = f"({a} * {read})" if kind in ("mask", "inner") else a
        b = f"({b} * {read})" if kind == "outer" else b
        z = f"({x} * {read})" if kind == "statistic" else x
        return f"{z} @ {w} + ({z} @ {a}) @ {b} * {read if kind in ('scale', 'counter') else s}"

    y, again = d.new((*lead, N), dtype), d.chance(0.6)
    lines = [write()] * now[0] + [f"{y} = {layer(last=not now[1] and not now[2])}"] + [write()] * now[1]
    lines += [f"{y} = {y} + {layer(last=not now[2])}"] * again + [write()] * now[2]
    return d.step(*lines, reads=(v,), makes=y)


ADAPTERS: tuple[tuple[int, Production], ...] = (
    (8, adapted),
    (2, adapted_by_rank),
    (1, experts),
    (2, biased),
    (2, twice_adapted),
    (2, siblings),
    (3, fused),
    (4, rowwise),
    (2, cast_adapter),
    (2, finer),
    (2, dora),
    (1, embedded),
    (1, convolved),
    (5, stateful),
    (8, near_miss),
)
