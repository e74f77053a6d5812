"""Rules that are broken on purpose: mutants by name, and the integer oracles that these must turn red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from tests.support import affine_spellings, joint, spellings
from tests.support.spellings import Case

K = 24  # square weights, so that a lost transpose still has the right shape

Mutation = Callable[[], Any]


class Mutants(dict[str, Mutation]):
    """The mutants of one file by name, each a function that makes a patch."""

    def add(self, make: Mutation) -> Mutation:
        self[make.__name__] = make
        return make

    @contextmanager
    def applied(self, name: str) -> Iterator[None]:
        with self[name]():
            yield

    def assert_red(self, name: str, holds: Callable[[], bool]) -> None:
        """An oracle that holds by the rules as they are does not by a mutant."""
        assert holds()
        with self.applied(name):
            assert not holds(), f"the mutant {name} lives"


# ----------------------------------------------------------------------------------------------------------------
# sums of products


class Adapted(nn.Module):
    """Frozen W with a bias and two adapters, in the spellings that the mutants break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K).requires_grad_(False)
        self.W2 = nn.Parameter(torch.randn(K, K), requires_grad=False)
        for name, sizes in {"A": (K, 3), "B": (3, K), "C": (K, 2), "D": (2, K), "E": (K, 3), "F": (3, K)}.items():
            setattr(self, name, nn.Parameter(torch.randn(*sizes)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x) + ((x @ self.A) @ self.B) * 2 - (x @ self.C) @ self.D
        h = torch.relu(h)
        low = (h @ self.E) @ -self.F
        y = torch.add(torch.addmm(low, h, self.W2, beta=4, alpha=2), (h @ self.C) @ self.D, alpha=2)
        z = (self.W2 @ h.t() + self.F.t() @ (self.E.t() @ h.t())).t()
        return y + torch.relu(z) + torch.relu(z - h)


@cache
def captured() -> joint.Joint:
    torch.manual_seed(0)
    return joint.capture(Adapted().double(), torch.randn(40, K, dtype=torch.float64, requires_grad=True))


def holds() -> bool:
    """The integer oracle, on y and every gradient; a pass that fails or finds nothing does not hold either."""
    case = captured()
    try:
        graph, outcome = case.rewritten(form="weight")
        weight = sum((s.forward == "weight") + (s.input_grad == "weight") for s in outcome.sites)
        return weight == 6 and not outcome.refusals and joint.equal(case.run(case.graph), case.run(graph))
    except Exception:
        return False


# ----------------------------------------------------------------------------------------------------------------
# row-wise affine maps


def affine_cases() -> list[tuple[str, Case]]:
    """Spellings with K = N, so that what is done at the wrong side still has the right shape, and near misses."""
    vectors = {"l": (K,), "c": (K,)}
    low_rank = {"A": (K, 4), "B": (4, K)}
    x = spellings.x(2, 5, K)
    spells: dict[str, tuple[Any, Any]] = {
        "scale_and_shift": (affine_spellings.scale_and_shift, vectors),
        "shift_then_scale": (affine_spellings.shift_then_scale, vectors),
        "scale_both_sides": (affine_spellings.scale_both_sides, {"g": (K,), "l": (K,)}),
        "constant_between": (affine_spellings.constant_between, low_rank | {"g": (K,)}),
        "loreft": (affine_spellings.loreft, {"R": (K, 4), "R2": (K, 4), "c": (4,)}),
        "rotation_of_pairs": (affine_spellings.rotation_of_pairs, vectors),
        "oft_after": (affine_spellings.oft_after, {"M": (8, K // 8, K // 8)}),
        "gralora": (affine_spellings.gralora, {"M": (2, K // 2, 4), "P": (2, 4, K // 2)}),
        "roll": (affine_spellings.roll, {"l": (K,)}),
        "vector_along_tokens": (affine_spellings.vector_along_tokens, {"t": (5, 1)}),
        "tokens_flipped": (affine_spellings.tokens_flipped, {"l": (K,)}),
        "frozen_vectors": (affine_spellings.frozen_vectors, {"l": (K,)}),
    }

    def build(spell: Any, trained: Any) -> Callable[[], nn.Module]:
        return lambda: affine_spellings.Layer(spell, trained, {"f": (K,)}, K=K, N=K)

    whole = ("index_select", "qkv", "chained", "x_transposed", "adapters_of_a_split")
    return [
        *((name, Case(name, build(*spec), x)) for name, spec in spells.items()),
        *((case.id, case) for case in affine_spellings.SPELLINGS if case.id in whole),
    ]


def _sites(outcome: Any) -> list[tuple[str, str, str]]:
    return [(s.name, s.forward, s.input_grad) for s in outcome.sites]


@cache
def affine_captured() -> list[tuple[joint.Joint, list[tuple[str, str, str]]]]:
    """Joint graphs, and the sites that the rules as they are find in them."""
    found = []
    for _, case in affine_cases():
        torch._dynamo.reset()
        module, inputs = case.make(torch.float64)
        captured = joint.capture(module, *inputs)
        found.append((captured, _sites(captured.rewritten(form="weight")[1])))
    return found


def affine_holds() -> bool:
    """The integer oracle on y and every gradient, and the same sites."""
    captured = affine_captured()
    try:
        for case, sites in captured:
            graph, outcome = case.rewritten(form="weight")
            if _sites(outcome) != sites or not joint.equal(case.run(case.graph), case.run(graph)):
                return False
    except Exception:
        return False
    return True
