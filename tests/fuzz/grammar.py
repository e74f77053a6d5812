"""Random models as plain torch programs: a case is its source text.

Values v0, v1, … have a shape and a dtype; each step of a model reads some and makes one, or changes one in place. What
no step reads is returned. Three kinds: `exact`, fp64 and ops that keep integers; `mixed`, half-precision bases beside
fp32 adapters; `real`, fp32 and ops that round.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from random import Random

from peft_fx.passes.decide.machine import MACHINES
from tests import row_ops, spellings

Shape = tuple[int, ...]
DIMS = (1, 2, 3, 4, 5, 8)
SCALES = (1.0, 2.0, -1.0, 0.5)  # powers of two: dividing by one is exact too
LARGEST = 400  # elements of a value
F64, F32, BF16, F16 = "float64", "float32", "bfloat16", "float16"
BY_RANK: Mapping[int, tuple[Callable, ...]] = {
    2: (spellings.addmm, spellings.addmm_beta, spellings.weight_on_the_left),
    3: (spellings.einsum_tokens, spellings.transposed_inside),
}


@dataclass(frozen=True)
class Leaf:
    """An input, a parameter or a buffer."""

    shape: Shape
    dtype: str
    trained: bool
    buffer: bool = False

    def made(self) -> str:
        return f"torch.empty({self.shape}, dtype=torch.{self.dtype})"

    def registered(self, name: str) -> str:
        """The line that gives a module this one."""
        if not self.buffer:
            return f"self.{name} = nn.Parameter({self.made()}, requires_grad={self.trained})"
        layer, _, own = name.partition(".")
        return f"self.{layer}.register_buffer({own!r}, {self.made()})"


@dataclass(frozen=True)
class Step:
    """Lines of a forward, what they read and make, their parameters; `others` say the same in other words, in the
    source a second class."""

    lines: tuple[str, ...]
    reads: tuple[str, ...]
    makes: str | None
    params: Mapping[str, Leaf] = field(default_factory=dict)
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """Inputs, steps, the options of the passes, and what numbers to try it on."""

    kind: str
    inputs: Mapping[str, Leaf]
    steps: tuple[Step, ...]
    options: Mapping[str, str]

    def source(self, note: str = "A random program.") -> str:
        """The program as a file of its own."""
        lines = [line for step in self.steps for line in step.lines]
        params = {name: leaf for step in self.steps for name, leaf in step.params.items()}
        read = {name for step in self.steps for name in step.reads}
        unread = [s.makes for s in self.steps if s.makes and s.makes not in read]
        outputs = unread or [next(reversed(self.inputs))]
        ending = f"return {', '.join(outputs)},"
        body, other = (
            "\n".join(f"        {line}" for line in [*words, ending])
            for words in (lines, [line for step in self.steps for line in step.others or step.lines])
        )
        other = f"""class Other(Model):
    def forward(self, {", ".join(self.inputs)}):
{other}


""" * (other != body)
        made = [f"self.{layer} = nn.Module()" for layer in dict.fromkeys(n.partition(".")[0] for n in params)]
        made += [leaf.registered(name) for name, leaf in params.items()]
        built = "\n".join(f"        {line}" for line in made)
        given = ", ".join(f"{leaf.made()}.requires_grad_({leaf.trained})" for leaf in self.inputs.values())
        return f'''"""{note}"""

import torch
import torch.nn.functional as F
from torch import nn

{"".join(_helpers(body + other))}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
{built}

    def forward(self, {", ".join(self.inputs)}):
{body}


{other}def inputs():
    return ({given},)


KIND = {self.kind!r}
OPTIONS = {dict(self.options)!r}
'''

    def without(self, i: int) -> Program:
        """The program without a step, and without those that read what it made."""
        gone, kept = {self.steps[i].makes}, []
        for j, step in enumerate(self.steps):
            if j == i or not gone.isdisjoint(step.reads):
                gone.add(step.makes)
            else:
                kept.append(step)
        params = {name: leaf for step in self.steps for name, leaf in step.params.items()}
        owned: set[str] = set()
        steps = []
        for step in kept:  # a weight shared with a step that went away is the next one's own
            needed = {n: params[n] for line in step.lines for n in re.findall(r"self\.(\w+\.\w+)", line)}
            steps.append(replace(step, params={n: p for n, p in needed.items() if n not in owned}))
            owned |= set(needed)
        return replace(self, steps=tuple(steps))


HELPERS = {
    f.__name__: f
    for f in [
        *spellings.ANY_RANK,
        *(f for spells in BY_RANK.values() for f in spells),
        *(spellings.bmm_of_one, spellings.experts, spellings.experts_baddbmm, spellings.peft_casts),
    ]
}
OTHERS = {"rows": row_ops.rows} | {name: op.f for name, op in row_ops.OPS.items()}


@cache
def _text(f: Callable) -> str:
    return inspect.getsource(f) + "\n\n"


def _helpers(body: str) -> list[str]:
    """The source of the functions that a text calls, and of those that these call."""
    found: dict[str, str] = {}
    todo = [body]
    while todo:
        for name in re.findall(r"(?<![\w.])(\w+)\(", todo.pop()):
            f = HELPERS.get(name) or OTHERS.get(name)
            if f is not None and name not in found:
                found[name] = _text(f)
                todo.append(found[name])
    return [found[name] for name in sorted(found)]


# -------------------------------------------------------------------------------------------------------------- drawing


class Draft:
    """A program in the making."""

    def __init__(self, rng: Random, kind: str):
        self.rng, self.kind = rng, kind
        self.values: dict[str, tuple[Shape, str]] = {}
        self.weights: dict[str, Leaf] = {}  # frozen ones, to share
        self.params: dict[str, Leaf] = {}  # of the step in the making
        self.layers, self.rank = 0, 0

    def new(self, shape: Shape, dtype: str) -> str:
        name = f"v{len(self.values)}"
        self.values[name] = tuple(shape), dtype
        return name

    def shape(self, v: str) -> Shape:
        return self.values[v][0]

    def dtype(self, v: str) -> str:
        return self.values[v][1]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def param(self, name: str, shape: Shape, dtype: str, trained: float, buffer: bool = False) -> str:
        """A new parameter or buffer of the current layer, or a frozen one from before; the text that reads it."""
        leaf = Leaf(tuple(shape), dtype, self.chance(trained), buffer)
        same = [n for n, known in self.weights.items() if known == leaf]
        if same and self.chance(0.3):
            return f"self.{self.rng.choice(same)}"
        self.params[f"l{self.layers}.{name}"] = leaf
        if not leaf.trained:
            self.weights[f"l{self.layers}.{name}"] = leaf
        return f"self.l{self.layers}.{name}"

    def step(self, *lines: str, reads: tuple[str, ...], makes: str | None, other: tuple[str, ...] = ()) -> Step:
        params, self.params = self.params, {}
        self.layers += bool(params)
        return Step(lines, reads, makes, params, other)

    def lora(self, K: int, N: int, dtype: str, lead: Shape = (), adapter: str | None = None) -> list[str]:
        """W, A, B and s."""
        self.rank = r = self.rng.randint(1, 3)
        W = self.param("W", (*lead, K, N), dtype, 0.1)
        A = self.param("A", (*lead, K, r), adapter or dtype, 0.85)
        B = self.param("B", (*lead, r, N), adapter or dtype, 0.85)
        return [W, A, B, str(self.rng.choice(SCALES))]

    def base(self) -> tuple[str, str]:
        """The dtypes of a base and its adapter."""
        if self.kind == "exact":
            return F64, F64
        if self.kind == "real":
            return F32, F32
        base = self.rng.choice([BF16, BF16, F16, F32])
        return base, self.rng.choice([base, F32, F32, BF16])

    def cast(self, v: str, dtype: str) -> str:
        return v if self.dtype(v) == dtype else f"{v}.to(torch.{dtype})"


Production = Callable[[Draft, str], "Step | None"]


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


# Everything else.


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


def wider(a: str, b: str) -> str:
    """What two dtypes are promoted to."""
    if {a, b} == {BF16, F16}:
        return F32
    return min(a, b, key=[F64, F32, F16, BF16].index)


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


def program(rng: Random) -> Program:
    """One or two inputs, and one to five steps of which one at least plants an adapter."""
    kind = rng.choices(["exact", "mixed", "real"], [6, 2, 2])[0]
    d = Draft(rng, kind)
    dtypes = {"exact": [F64], "real": [F32], "mixed": [F32, BF16, BF16]}[kind]
    T = rng.choice([*DIMS, *DIMS, 0]) if rng.random() < 0.5 else rng.choice([3, 4, 5, 8])
    inputs = {}
    for _ in range(rng.choice([1, 1, 2])):
        lead = rng.choice([(T,), (T,), (2, T), (1, T), (T, 1)])
        leaf = Leaf((*lead, rng.choice(DIMS)), rng.choice(dtypes), rng.random() < 0.5)
        inputs[d.new(leaf.shape, leaf.dtype)] = leaf
    count = rng.choice([1, 2, 3, 3, 4, 5])
    planted, steps = rng.randrange(count), []
    while len(steps) < count:
        v = rng.choice([next(reversed(d.values)), *d.values])
        table = ADAPTERS if len(steps) == planted or rng.random() < 0.6 else OTHER
        make = rng.choices([f for _, f in table], [w for w, _ in table])[0]
        before = dict(d.values), dict(d.weights)
        step = make(d, v)
        if step is None or any(prod(shape) > LARGEST for shape, _ in d.values.values()):
            (d.values, d.weights), d.params = before, {}
            continue
        steps.append(step)
    options = {
        "form": rng.choice(["weight"] * 8 + ["auto", "activation"]),
        "numerics": rng.choice(["default"] * 6 + ["strict"]),
        "rounding": rng.choice(["nearest"] * 4 + ["dithered"]),
        "keep": rng.choice(["recompute"] * 5 + ["inductor"]),
        "machine": rng.choice(sorted(MACHINES)),
        "adapter_grad": rng.choice(["auto"] * 4 + ["low_rank", "dense"]),
    }
    if options["numerics"] == "strict" and options["adapter_grad"] == "dense":  # no such combination
        options["adapter_grad"] = "auto"
    return Program(kind, inputs, tuple(steps), options)
