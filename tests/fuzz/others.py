"""Steps around adapters, and how often each is drawn."""

from __future__ import annotations

from math import prod

from tests.fuzz.drafts import BF16, DIMS, F16, F32, LARGEST, SCALES, Draft, Production, wider
from tests.fuzz.programs import Shape, Step


def product(d: Draft, v: str) -> Step:
    *lead, K = d.shape(v)
    N, (dtype, _) = d.rng.choice(DIMS), d.base()
    x, y = d.cast(v, dtype), d.new((*lead, N), dtype)
    if d.chance(0.5):
        bias = f", {d.param('b', (N,), dtype, 0.4)}" if d.chance(0.6) else ""
        return d.step(f"{y} = F.linear({x}, {d.param('W', (N, K), dtype, 0.3)}{bias})", reads=(v,), makes=y)
    return d.step(f"{y} = {x} @ {d.param('W', (K, N), dtype, 0.3)}", reads=(v,), makes=y)


def sum_(d: Draft, v: str) -> Step:
    alike = [u for u in d.values if d.shape(u) == d.shape(v)]
    u, f = d.rng.choice(alike), d.rng.choice(["add", "sub"])
    y = d.new(d.shape(v), wider(d.dtype(u), d.dtype(v)))
    return d.step(f"{y} = torch.{f}({v}, {u}, alpha={d.rng.choice(SCALES)})", reads=(v, u), makes=y)


def elementwise(d: Draft, v: str) -> Step:
    ops = ["{v} * {s}", "-{v}", "torch.relu({v})", "{v}.abs()", "{v}.clamp(-3, 3)", "{v} + 1", "1 - {v}"]
    ops += ["torch.where({v} > 0, {v}, {v} * {s})", "{v}.clone()", "{v}.detach()", "F.dropout({v}, 0.5)"]
    ops += ["torch.maximum({v}, {v}.flip(-1))", "{v}.contiguous()", "{v} * ({v} > 0)"]
    if d.kind == "real":
        ops += ["torch.sigmoid({v})", "F.gelu({v})", "torch.tanh({v})", "F.softmax({v}, -1)", "F.silu({v})"]
        ops += ["F.layer_norm({v}, {v}.shape[-1:])", "{v} * torch.rsqrt({v}.pow(2).mean(-1, keepdim=True) + 0.1)"]
    y = d.new(d.shape(v), d.dtype(v))
    return d.step(f"{y} = " + d.rng.choice(ops).format(v=v, s=d.rng.choice(SCALES)), reads=(v,), makes=y)


def parametric(d: Draft, v: str) -> Step:
    """A vector of features, of tokens, or one number."""
    shape, dtype = d.shape(v), d.dtype(v)
    sizes = d.rng.choice([shape[-1:], shape[-1:], (*shape[-2:-1], 1) if len(shape) > 1 else (1,), ()])
    p, op = d.param("p", sizes, dtype, 0.5), d.rng.choice(["*", "*", "+", "-"])
    y = d.new(shape, dtype)
    return d.step(f"{y} = {v} {op} {p}" if d.chance(0.7) else f"{y} = {p} {op} {v}", reads=(v,), makes=y)


def view(d: Draft, v: str) -> Step | None:
    """The tokens under other leading dimensions, or other dimensions altogether."""
    shape, n = d.shape(v), prod(d.shape(v))
    if not n:
        return None
    T = prod(shape[:-1])
    made = d.rng.choice([(T,), (1, T), (T, 1)] + [(2, T // 2)] * (T % 2 == 0 and T > 0))
    made = (*made, shape[-1])
    if d.chance(0.2):
        parts = [k for k in DIMS if n % k == 0]
        k = d.rng.choice(parts)
        made = (n // k, k)
    y = d.new(made, d.dtype(v))
    return d.step(f"{y} = {v}.reshape({made})", reads=(v,), makes=y)


def layout(d: Draft, v: str) -> Step | None:
    """Transposed, joined, cut, expanded, summed."""
    shape = d.shape(v)
    *lead, n = shape
    options: list[tuple[str, Shape]] = [
        ("torch.cat([{v}, {v} * 2], -1)", (*lead, 2 * n)),
        ("torch.cat([{v}, -{v}], 0)", (2 * shape[0], *shape[1:])),
        ("{v}[None]", (1, *shape)),
        ("{v}.flip(-1)", shape),
        ("{v}.sum(-1, keepdim=True)", (*lead, 1)),
        (f"{{v}}[..., : {max(1, n // 2)}]", (*lead, max(1, n // 2))),
        ("F.pad({v}, (1, 0))", (*lead, n + 1)),
    ]
    if lead:
        options += [
            ("{v}.transpose(-1, -2)", (*lead[:-1], n, lead[-1])),
            ("{v}.flip(0)", shape),
            ("{v}.sum(0)", shape[1:]),
            ("{v}.cumsum(0)", shape),
            (f"{{v}}.unsqueeze(-2).expand({(*lead, 2, n)})", (*lead, 2, n)),
        ]
    if len(shape) > 2:
        order = (1, 0, *range(2, len(shape)))
        options.append((f"{{v}}.permute({order})", tuple(shape[d] for d in order)))
        options.append(("{v}.flatten(0, 1)", (shape[0] * shape[1], *shape[2:])))
    text, made = d.rng.choice(options)
    if prod(made) > LARGEST or not made or len(made) > 4:
        return None
    y = d.new(made, d.dtype(v))
    return d.step(f"{y} = " + text.format(v=v), reads=(v,), makes=y)


def meeting(d: Draft, v: str) -> Step:
    """Two values multiplied, elementwise or as matrices."""
    shape = d.shape(v)
    others = [u for u in d.values if len(d.shape(u)) == len(shape) == 2 and d.shape(u)[0] == shape[-1]]
    if others and d.chance(0.4):
        u = d.rng.choice(others)
        dtype = wider(d.dtype(u), d.dtype(v))
        y = d.new((*shape[:-1], d.shape(u)[-1]), dtype)
        return d.step(f"{y} = {d.cast(v, dtype)} @ {d.cast(u, dtype)}", reads=(v, u), makes=y)
    u = d.rng.choice([u for u in d.values if d.shape(u) == shape])
    y = d.new(shape, wider(d.dtype(u), d.dtype(v)))
    return d.step(f"{y} = {v} * {u}", reads=(v, u), makes=y)


def changed(d: Draft, v: str) -> Step:
    """A value changed in place: as a whole, in a part, through another view; perhaps in a copy."""
    n, s = d.shape(v)[-1], d.rng.choice(SCALES)
    alike = [u for u in d.values if d.values[u] == d.values[v]]
    u = d.rng.choice(alike)
    ops = [f"mul_({s})", "relu_()", "add_(1)", "neg_()", f"add_({u}, alpha={s})", f"sub_({u})", f"copy_({u} * 2)"]
    op = d.rng.choice(ops)
    part = "" if "(v" in op or d.chance(0.5) else f"[..., :{max(1, n // 2)}]"
    if d.chance(0.6):
        y = d.new(*d.values[v])
        return d.step(f"{y} = {v}.clone()", f"{y}{part}.{op}", reads=(v, u), makes=y)
    return d.step(f"{v}{part}.{op}", reads=(u,) if u != v else (), makes=None)


def recast(d: Draft, v: str) -> Step | None:
    if d.kind != "mixed":
        return None
    dtype = d.rng.choice([F32, BF16, F16])
    y = d.new(d.shape(v), dtype)
    return d.step(f"{y} = {v}.to(torch.{dtype})", reads=(v,), makes=y)


OTHER: tuple[tuple[int, Production], ...] = (
    (3, product),
    (3, sum_),
    (4, elementwise),
    (1, parametric),
    (2, view),
    (3, layout),
    (1, meeting),
    (3, changed),
    (2, recast),
)
