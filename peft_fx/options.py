"""The options of the backend: which there are, what each may be, and what goes on to Inductor."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from peft_fx import budgeting, machines
from peft_fx.compat import list_mode_options, list_options
from peft_fx.passes.decide.machine import MACHINES
from peft_fx.passes.findings import Settings
from peft_fx.passes.keep.policies import POLICIES
from peft_fx.passes.keep.policies import ROUNDINGS as KEEP_ROUNDINGS
from peft_fx.passes.rewrite.rounding import ROUNDINGS

PREFIX = "peft_fx."
CHOICES: Mapping[str, tuple[str | bool, ...]] = {
    "form": ("auto", "weight", "activation"),
    "adapter_grad": ("auto", "low_rank", "dense"),
    "numerics": ("default", "strict"),
    "rounding": ROUNDINGS,
    "keep": ("recompute", "inductor", *POLICIES),
    "keep_rounding": KEEP_ROUNDINGS,
    "chunk_loss": ("auto", True, False),
    "machine": ("auto", *MACHINES),
    "kernels": ("auto", "off"),
    "lowering": ("inductor", "aot_eager"),
    "memory_budget_of": budgeting.OF,
    "optimizer": tuple(budgeting.OPTIMIZERS),
}


def _a_group(chosen: Any) -> int:
    if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < 2:
        raise ValueError(f"'{PREFIX}velora_group' cannot be {chosen!r}; valid values: whole numbers from 2 on")
    return chosen


def _patterns(chosen: Any) -> tuple[str, ...]:
    if isinstance(chosen, str) or not isinstance(chosen, Iterable) or not all(isinstance(c, str) for c in chosen):
        wanted = "lists of glob patterns of module names, such as ['*.down_proj']"
        raise ValueError(f"'{PREFIX}keep_layers' cannot be {chosen!r}; valid values: {wanted}")
    return tuple(chosen)


def _seconds(chosen: Any) -> float:
    if isinstance(chosen, bool) or not isinstance(chosen, (int, float)) or not chosen >= 0:
        raise ValueError(f"'{PREFIX}memory_weight' cannot be {chosen!r}; valid values: seconds for a GB, from 0 on")
    return float(chosen)


OTHERS: Mapping[str, Callable[[Any], Any]] = {
    "velora_group": _a_group,
    "keep_layers": _patterns,
    "memory_weight": _seconds,
    "memory_budget": budgeting.parse_budget,
}


@dataclass(frozen=True)
class Options:
    """Options, checked. `inductor` holds what is Inductor's own, `mode` expanded."""

    form: str = "auto"
    adapter_grad: str = "auto"
    numerics: str = "default"
    rounding: str = "nearest"
    keep: str = "recompute"
    keep_rounding: str = "nearest"
    velora_group: int = 32
    keep_layers: tuple[str, ...] = ()
    chunk_loss: bool | str = "auto"
    memory_weight: float = 0.0
    machine: str = "auto"
    kernels: str = "auto"
    lowering: str = "inductor"
    memory_budget: int | float | str | None = None
    memory_budget_of: str = "total"
    optimizer: str = "adamw"
    inductor: dict[str, Any] = field(default_factory=dict)

    def settings(self, device: torch.device) -> Settings:
        machine = machines.resolve(self.machine, device)
        ours = {field.name: getattr(self, field.name) for field in fields(Settings) if hasattr(self, field.name)}
        kernels = self.kernels == "auto" and machines.has_kernels(device)
        return Settings(**ours | {"machine": machine, "kernels": kernels})

    def budget(self, device: torch.device) -> budgeting.Asked | None:
        """The memory budget on a device, if there is one."""
        if self.memory_budget is None:
            return None
        bytes_ = budgeting.resolved(self.memory_budget, device)
        states = budgeting.OPTIMIZERS[self.optimizer]
        return budgeting.Asked(bytes_, self.memory_budget_of, states, self.memory_budget == "auto")


def _known(key: Any) -> str:
    """An option by its name: ours, or Inductor's, which torch.compile takes with dashes too."""
    ours, inductor = [PREFIX + k for k in (*CHOICES, *OTHERS)], _of_inductor()
    for name in (key, str(key).replace("-", "_")):
        if name in ours or name in inductor:
            return str(name)
    near = {name.removeprefix(PREFIX): name for name in (*inductor, *ours)} | {name: name for name in ours}
    found = dict.fromkeys(near[k] for k in difflib.get_close_matches(str(key), near, n=3, cutoff=0.75))
    meant = f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
    valid = f"{', '.join(ours)}, and Inductor's without a prefix, such as max_autotune"
    raise ValueError(f"peft_fx has no option {key!r}; valid ones: {valid}{meant}")


@functools.cache
def _of_inductor() -> frozenset[str]:
    return frozenset(list_options())


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Options as `torch.compile` takes them; ValueError for a key or a value that does not exist, naming those that
    do."""
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, chosen in (options or {}).items():
        known = _known(key)
        (ours if known.startswith(PREFIX) else inductor)[known.removeprefix(PREFIX)] = chosen
    for key, chosen in ours.items():
        if key in OTHERS:
            ours[key] = OTHERS[key](chosen)
        elif key == "machine":
            machines.check(chosen)
        elif not any(chosen is valid or (isinstance(valid, str) and chosen == valid) for valid in CHOICES[key]):
            valid = ", ".join(map(repr, CHOICES[key]))
            raise ValueError(f"{PREFIX + key!r} cannot be {chosen!r}; valid values: {valid}")
    if mode == "lite":
        raise ValueError("mode 'lite' runs no joint-graph passes, so peft_fx could do nothing; use backend='inductor'")
    if ours.get("adapter_grad") == "dense" and ours.get("numerics") == "strict":
        raise ValueError(
            f"'{PREFIX}adapter_grad' cannot be 'dense' where '{PREFIX}numerics' is 'strict': xᵀ·dy is no product that "
            "you wrote; valid values: 'auto', 'low_rank'"
        )
    if "machine" in ours:
        ours["machine"] = str(ours["machine"])
    return Options(**ours, inductor={**(list_mode_options(mode) if mode else {}), **inductor})
