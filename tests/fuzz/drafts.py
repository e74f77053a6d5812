"""A program in the making: its values' shapes and dtypes, new values and parameters, the parts of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.fuzz.programs import Leaf, Shape, Step

DIMS = (1, 2, 3, 4, 5, 8)
SCALES = (1.0, 2.0, -1.0, 0.5)  # powers of two: dividing by one is exact too
LARGEST = 400  # elements of a value
F64, F32, BF16, F16 = "float64", "float32", "bfloat16", "float16"


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


def wider(a: str, b: str) -> str:
    """What two dtypes are promoted to."""
    if {a, b} == {BF16, F16}:
        return F32
    return min(a, b, key=[F64, F32, F16, BF16].index)


Production = Callable[[Draft, str], "Step | None"]
