"""Random compositions of row-wise linear ops around a frozen product: bit-equal on integers, whatever is rewritten."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support import joint
from tests.support.oracle import integers
from tests.support.row_ops import OPS, Shape, fitting
from tests.support.strategies import same_at_every_run

EXAMPLES = 50

Chain = tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """y = after(before(x)·W + b) + branch(x)·M: names of ops in a row, before and after the layer and in the branch."""

    x: Shape
    N: int
    before: Chain
    after: Chain
    branch: Chain | None
    bias: bool
    trained: tuple[bool, ...]

    def module(self) -> nn.Module:
        return Composed(self)


class Composed(nn.Module):
    """A program with its parameters; W and b are frozen."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        flags = iter(program.trained)
        self.adapter = nn.ParameterList()

        def parameters(names: Chain, n: int) -> int:
            for op in (OPS[name] for name in names):
                for shape in op.params(n):
                    self.adapter.append(nn.Parameter(torch.empty(shape), requires_grad=next(flags)))
                n = op.result(n)
            return n

        n = parameters(program.before, program.x[-1])
        self.W = nn.Parameter(torch.empty(n, program.N), requires_grad=False)
        self.b = nn.Parameter(torch.empty(program.N), requires_grad=False) if program.bias else None
        n = parameters(program.after, program.N)
        if program.branch is not None:
            m = parameters(program.branch, program.x[-1])
            self.adapter.append(nn.Parameter(torch.empty(m, n)))

    def forward(self, x: Tensor) -> Tensor:
        weights = iter(self.adapter)

        def chain(names: Chain, x: Tensor) -> Tensor:
            for op in (OPS[name] for name in names):
                x = op.f(x, *(next(weights) for _ in op.params(x.shape[-1])))
            return x

        h = chain(self.program.before, x) @ self.W
        y = chain(self.program.after, h if self.b is None else h + self.b)
        return y if self.program.branch is None else y + chain(self.program.branch, x) @ next(weights)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs with a trained parameter; sizes stay within a few features."""

    def chain(n: int, length: int) -> tuple[Chain, int]:
        names = []
        for _ in range(draw(st.integers(0, length))):
            names.append(draw(st.sampled_from(fitting(n))))
            n = OPS[names[-1]].result(n)
        return tuple(names), n

    lead = draw(st.sampled_from([(5,), (2, 3), (1, 5), (2, 1, 3)]))
    K, N = draw(st.sampled_from([4, 6, 8, 12])), draw(st.sampled_from([4, 6, 8, 12]))
    before, after = chain(K, 1)[0], chain(N, 3)[0]
    branch = chain(K, 2)[0] if draw(st.booleans()) else None
    trained = tuple(draw(st.lists(st.booleans(), min_size=16, max_size=16)))
    program = Program((*lead, K), N, before, after, branch, draw(st.booleans()), trained)
    if branch is None and not any(p.requires_grad for p in program.module().parameters()):
        program = Program(program.x, N, before, (*after, "scale"), branch, program.bias, (True,) * 16)
    return program


def test_random_compositions_are_bit_equal():
    """The same programs at every run, y and all gradients in fp64; most of them become one product."""
    rewritten = []

    @same_at_every_run(EXAMPLES)
    @given(programs())
    def check(program: Program):
        torch._dynamo.reset()
        module = integers(program.module().double(), 1)
        x = torch.ones(program.x, dtype=torch.float64, requires_grad=True)
        captured = joint.capture(module, x)
        graph, outcome = captured.rewritten(form="weight")
        want = captured.run(captured.graph)
        assert all(t is None or not prod(t.shape) or t.abs().max() < 2**50 for t in want)  # exact in fp64
        assert joint.equal(captured.run(graph), want)
        assert outcome.refusals == []
        rewritten.append(any(s.forward == "weight" for s in outcome.sites))

    check()
    assert len(rewritten) >= EXAMPLES
    assert sum(rewritten) >= 0.6 * len(rewritten), f"{sum(rewritten)} of {len(rewritten)} programs rewritten"
