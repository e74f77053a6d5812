"""Models with adapters, and the choices that there are for their joint graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

import peft_fx
from peft_fx import budgeting, compat
from peft_fx.passes.analyse.flow import returned
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.step.budget import Choice, Choices
from tests.support import joint
from tests.support.oracle import integers
from tests.support.spellings import frozen, trained
from zoo.models import make_base, make_batch, setup_of, with_adapters

K, N, R, T = 16, 48, 2, 64
STEP = {"peft_fx.memory_budget_of": "step"}


class Block(nn.Module):
    """A residual layer of two adapted products, perhaps with dropout between them."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.V, self.W, self.p = frozen(K, N), frozen(N, K), p
        self.A, self.B, self.C, self.D = trained(K, R), trained(R, N), trained(N, R), trained(R, K)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.V + (x @ self.A) @ self.B)
        h = nn.functional.dropout(h, self.p, self.training)
        return x + (h @ self.W + (h @ self.C) @ self.D)


class Stateful(Block):
    """The same, with a buffer that scales the layer and is then written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.ones(K))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x * (self.n * 2))
        with torch.no_grad():
            self.n.add_(1)
        return y


class Checkpointed(Block):
    """The same, which the user has computed again in any case."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(*(Block() for _ in range(4))),
    "dropout": lambda: nn.Sequential(*(Block(0.5) for _ in range(3))),
    "stateful": lambda: nn.Sequential(*(Stateful() for _ in range(3))),
    "checkpointed": lambda: nn.Sequential(Block(), Checkpointed(), Block(), Block()),
}


def x_of(seed: int = 1) -> Tensor:
    return integers((torch.empty(T, K),), seed, bound=1)[0].requires_grad_()


@functools.cache
def traced(name: str) -> tuple[joint.Joint, Graph]:
    """A model's joint graph, and the same after the passes and Inductor's own."""
    found = joint.capture(MODELS[name](), x_of())  # Dynamo's: only there is a checkpoint one
    found.outputs = len(returned(found.graph)[0])
    return found, found.as_lowered(found.rewritten(lowering="aot_eager")[0])


@functools.cache
def choices_of(name: str) -> Choices:
    return choices_in(*traced(name))


def choices_in(found: joint.Joint, graph: Graph) -> Choices:
    seen: list[Choices] = []

    def choose(graph: Graph, alone: Callable[[float], list[Node]], share: float) -> list[Node]:
        values = alone(share)
        seen.append(budgeting.choices_in(graph, values, compat.hint_for(found.fake_mode), MACHINES["cpu"]))
        return values

    with compat.choosing(choose):
        found.split(graph)
    return seen[0]


def split(found: joint.Joint, graph: Graph, choices: Choices, chosen: Choice) -> tuple[GraphModule, GraphModule]:
    """Forward and backward as the partitioner makes them for a choice."""
    names = {n.name for n in budgeting.saved(choices, chosen.kept)}
    with compat.choosing(lambda graph, *_: [n for n in graph.nodes if n.name in names]):
        return found.split(graph)


def held_at_least(name: str) -> int:
    """The least budget, in bytes of a step, that can be held."""
    return choices_of(name).within(0).peak


def choices_of_a_model(model: str, **sizes: int) -> Choices:
    """With adapters, as Dynamo and the passes make its graph."""
    setup = setup_of(model, dtype="fp32", **sizes)
    with patch.object(budgeting, "choices_in", wraps=budgeting.choices_in) as made:
        options = {"peft_fx.memory_budget": "1TB", "peft_fx.machine": "cpu", **STEP}
        peft_fx.explain(with_adapters(make_base(setup), setup), options=options, **make_batch(setup))
    (call,) = made.call_args_list
    return budgeting.choices_in(*call.args)
