"""What is asked of the passes, and what they tell: settings, sites, refusals, losses in chunks, inputs kept. Data.

`explain` prints it, tests assert it, and `peft_fx` hands it to users: the names and fields here are public.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from peft_fx.passes.decide.machine import MACHINES, Machine

if TYPE_CHECKING:
    from peft_fx.step.budget import Held

WEIGHT, ACTIVATION, NONE = "weight", "activation", "none"
EXACT, REBUILT = "exact", "rebuilt"
LOSS = "loss of "  # what the name of a refusal begins with that is about no adapter

REFUSALS: Mapping[str, str] = {  # by code; docs/limits.md has the same table
    "dropout": "a factor is drawn anew in every call",
    "different_input": "the adapter and the base layer read different inputs, or are in different graphs",
    "nonlinear": "something non-linear is between them",
    "input_dependent": "a factor is computed from the input: a gate for each token, experts mixed by a router",
    "mutation": "something is changed in place between them",
    "dtype": "the adapter is finer than the base, in what it reads or in what nothing rounds; or strict",
    "quantized": "the base's weight is quantised, and no dequantised one is in the graph",
    "subclass": "of no adapter yet: tensor subclasses are not looked into",
    "shape": "shapes that have no product: adapters for each sample or of some rows, parts of groups",
    "shared": "the layer's result without the adapter is read as well: `x·W'` would be another product",
    "unknown_op": "an op without a rule is between them",
    "logits_returned": "of a loss: its logits are an output of the graph, so they are kept whole",
}


@dataclass(frozen=True)
class Settings:
    """What the passes are asked to do; the meaning of each value is that of the option of the same name. `kernels` is
    whether a graph on a GPU with Triton may use those of `peft_fx/kernels/`."""

    form: str = "auto"
    numerics: str = "default"
    rounding: str = "nearest"
    keep: str = "recompute"
    velora_group: int = 32
    keep_layers: tuple[str, ...] = ()
    keep_rounding: str = "nearest"
    chunk_loss: bool | str = "auto"
    memory_weight: float = 0.0
    adapter_grad: str = "auto"
    machine: Machine = MACHINES["cpu"]
    kernels: bool = True
    rebuild_random: bool = True


@dataclass(frozen=True)
class Refusal:
    """An adapter without a weight form.

    `code` is one of REFUSALS, and stable; `detail` says what was met.
    """

    name: str
    code: str
    detail: str

    @property
    def is_about_a_loss(self) -> bool:
        return self.name.startswith(LOSS)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_of(name: str) -> str:
    """The name of a site without the number of the call."""
    return name.partition("#")[0]


@dataclass(frozen=True)
class Site:
    """An adapter with a weight form, and the forms that were chosen for it.

    `tokens`, `in_features`, `out_features`, `rank` are sizes (for a dynamic number of tokens, its hint; no tokens for a
    weight that the model merges itself). `forward`
    and `input_grad` are "weight", "activation" or "none", `adapter_grad` is "low_rank", "dense" or "none". `flops`
    and `bytes` (moved) are {"before", "after"}, of all of the site's products in one step; `reason` is the price's.
    `algebra` has what is computed in plain notation, [as written, now], under "forward" and "input_grad", and under
    "where" what the scales are.
    """

    name: str
    method: str
    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: str
    forward: str
    input_grad: str
    adapter_grad: str
    reason: str
    flops: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    algebra: dict[str, list[str]] = field(default_factory=dict)

    @property
    def layer(self) -> str:
        """The name without the number of the call."""
        return layer_of(self.name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ChunkedLoss:
    """A loss that is computed chunk by chunk: the weight's name, the size of its logits, the number of chunks, and the
    bytes of logits and their gradients alive at a time, {"before": whole, "after": in the loop}."""

    name: str
    rows: int
    vocabulary: int
    dtype: str
    chunks: int
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def saved(self) -> int:
        return self.bytes["before"] - self.bytes["after"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"saved": self.saved}


@dataclass(frozen=True)
class KeptInput:
    """What is kept of one value that an adapter's gradients read.

    `keep` is "rebuilt" where that is nothing, "exact", or the lossy policy that acts on it; where none does, `code`
    says why: rebuilt, low_rank (x·A is kept, not x), shared (something else keeps it), not_named (by
    `peft_fx.keep_layers`), checkpointed, dearer (than the value itself), shape, device; empty where none was asked
    for. `sizes` are bytes, "now" and as each policy would have it. A value that several adapters read is in the list
    for each of them, and kept once.
    """

    name: str
    keep: str
    code: str = ""
    detail: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Outcome:
    """What was found in one graph and done to it: `merged` are adapters in weight form as they were written, `factored`
    is whether vectors were taken out of sums, `rebuilt` how many values backward makes again; `spare` are the seconds
    of a step, by the price, that the forms save and that are too few to notice; `seconds` is the time of the passes
    themselves; `budget` is what was done for a memory budget, after the passes, where there is one."""

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    merged: list[Site] = field(default_factory=list)
    losses: list[ChunkedLoss] = field(default_factory=list)
    inputs: list[KeptInput] = field(default_factory=list)
    factored: bool = False
    rebuilt: int = 0
    spare: float = 0.0
    seconds: float = 0.0
    budget: Held | None = None
