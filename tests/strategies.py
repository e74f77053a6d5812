"""Random affine programs with planted LoRA motifs, in fp64 on integers so small that no operation rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracle import integers
from tests.spellings import ANY_RANK

Shape = tuple[int, ...]

DIMS = st.sampled_from([1, 2, 3, 5, 8])
RANKS = st.integers(1, 3)
SCALES = st.sampled_from([1.0, 2.0, -1.0, 0.5])  # powers of two: dividing by one is exact too
DEPTH = 5


def same_at_every_run(examples: int) -> settings:
    """A failure is not minimised: that takes minutes (add Phase.shrink for it), and programs are small as they are."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Step:
    """`op(*values[args], *parameters of these shapes, *consts)`."""

    op: Callable[..., Tensor]
    args: tuple[int, ...]
    params: tuple[Shape, ...] = ()
    consts: tuple = ()

    def __repr__(self) -> str:
        words = [*(f"v{i}" for i in self.args), *map(str, self.params), *map(str, self.consts)]
        return f"{self.op.__name__}({', '.join(words)})"


@dataclass(frozen=True)
class Program:
    """Inputs are values 0, 1, ..; each step appends one value; the outputs are the values that no step read."""

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    trained: tuple[bool, ...]  # of the inputs, then of the parameters

    def module(self) -> nn.Module:
        return Affine(self)

    def arguments(self) -> tuple[Tensor, ...]:
        flags = self.trained[: len(self.inputs)]
        leaf = partial(torch.empty, dtype=torch.float64)
        made = (leaf(s, requires_grad=t) for s, t in zip(self.inputs, flags, strict=True))
        return integers(tuple(made), seed=2)


class Affine(nn.Module):
    """A program with its parameters, all small integers."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        shapes = [shape for step in program.steps for shape in step.params]
        trained = program.trained[len(program.inputs) :]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(shape, dtype=torch.float64), requires_grad=t)
            for shape, t in zip(shapes, trained, strict=True)
        )
        integers(self, seed=1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values, weights, read = list(inputs), iter(self.weights), set()
        for step in self.program.steps:
            operands = [values[i] for i in step.args] + [next(weights) for _ in step.params]
            values.append(step.op(*operands, *step.consts))
            read.update(step.args)
        return tuple(v for i, v in enumerate(values) if i not in read and i >= len(inputs))


def mm(x, w):
    return x @ w


def linear(x, w):
    return F.linear(x, w)


def linear_bias(x, w, b):
    return F.linear(x, w, b)


def add(x, y, alpha):
    return torch.add(x, y, alpha=alpha)


def sub(x, y, alpha):
    return torch.sub(x, y, alpha=alpha)


def scale(x, c):
    return x * c


def neg(x):
    return -x


def relu(x):
    return torch.relu(x)


def view(x, *shape):
    return x.reshape(shape)


@st.composite
def motifs(draw, i: int, shape: Shape) -> tuple[Step, Shape]:
    """An adapted layer on value `i`, in any spelling."""
    K, N, r = shape[-1], draw(DIMS), draw(RANKS)
    spell, s = draw(st.sampled_from(ANY_RANK)), draw(SCALES)
    return Step(spell, (i,), ((K, N), (K, r), (r, N)), (s,)), (*shape[:-1], N)


@st.composite
def products(draw, i: int, shape: Shape) -> tuple[Step, Shape]:
    K, N = shape[-1], draw(DIMS)
    params = draw(st.sampled_from([((K, N),), ((N, K),), ((N, K), (N,))]))
    op = linear_bias if len(params) == 2 else linear if params == ((N, K),) else mm
    return Step(op, (i,), params), (*shape[:-1], N)


@st.composite
def sums(draw, i: int, shape: Shape, shapes: list[Shape]) -> tuple[Step, Shape]:
    other = draw(st.sampled_from([j for j, s in enumerate(shapes) if s == shape]))
    return Step(draw(st.sampled_from([add, sub])), (i, other), (), (draw(SCALES),)), shape


@st.composite
def pointwise(draw, i: int, shape: Shape) -> tuple[Step, Shape]:
    op = draw(st.sampled_from([scale, neg, relu]))
    return Step(op, (i,), (), (draw(SCALES),) if op is scale else ()), shape


@st.composite
def views(draw, i: int, shape: Shape) -> tuple[Step, Shape]:
    """The tokens of value `i` under other leading dimensions."""
    T = prod(shape[:-1])
    lead = draw(st.sampled_from([(T,), (1, T), (T, 1)] + [(2, T // 2)] * (T % 2 == 0)))
    return Step(view, (i,), (), (*lead, shape[-1])), (*lead, shape[-1])


@st.composite
def programs(draw) -> Program:
    """One or two inputs and two to five steps, at least one of them a motif, on any values made so far."""
    T = draw(DIMS)
    inputs = tuple((T, draw(DIMS)) for _ in range(draw(st.integers(1, 2))))
    shapes, steps = list(inputs), []
    depth = draw(st.integers(2, DEPTH))
    planted = draw(st.integers(0, depth - 1))
    for position in range(depth):
        i = draw(st.sampled_from([len(shapes) - 1, *range(len(shapes))]))
        kinds = [motifs(i, shapes[i])]
        if position != planted:
            kinds += [products(i, shapes[i]), sums(i, shapes[i], shapes)]
            kinds += [pointwise(i, shapes[i]), views(i, shapes[i])]
        step, shape = draw(st.one_of(kinds))
        steps.append(step)
        shapes.append(shape)
    leaves = len(inputs) + sum(len(s.params) for s in steps)
    frozen = draw(st.lists(st.booleans(), min_size=leaves, max_size=leaves))
    return Program(inputs, tuple(steps), tuple(not f for f in frozen))
