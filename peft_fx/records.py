"""What was compiled for a model: a record of each graph that Dynamo handed over, found by the parameters.

A record is enough to run the passes once more, which `explain` does where a cache answered in their place.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule

from peft_fx import budgeting, compat, sharing
from peft_fx.options import Options
from peft_fx.passes.analyse.flow import Role
from peft_fx.passes.findings import Outcome, Settings
from peft_fx.subgraphs import Subgraph, subgraphs_of

# The records of each parameter's compiles. Weak: a record lives as long as a model that it is about.
_records: compat.WeakIdKeyDictionary = compat.WeakIdKeyDictionary()
_noting = threading.Lock()
_resets = 0  # how often Dynamo has forgotten all graphs


@dataclass
class Record:
    """One graph that Dynamo handed us: enough to run the passes on it again, and what they found; not `lowered` where
    AOTAutograd or Inductor turned it away. `grad` and `autocast` are what it was traced under, `calls` the parameters,
    by position, of each module that it has run for: Dynamo runs one graph for all layers that are alike. `device` is
    where the graph is taken to be, if not where its inputs are; `kind` and `around` are what `sharing` knows of it.

    `compiled` is what Dynamo was given to call, and lets go of with the code that calls it; `ran` is whether it did."""

    graph_module: GraphModule
    inputs: list[Any]
    roles: dict[int, Role]
    options: Options
    grad: bool
    outcomes: list[Outcome] = field(default_factory=list)
    failure: str = ""
    lowered: bool = True
    compiled: Callable[[], Any] = lambda: None
    ran: bool = False
    autocast: list[tuple[str, torch.dtype, bool]] = field(default_factory=list)
    calls: list[dict[int, Callable[[], Any]]] = field(default_factory=list)
    resets: int = field(default_factory=lambda: _resets)
    device: torch.device | None = None
    kind: sharing.Kind | None = None
    around: sharing.Around = field(default_factory=sharing.Around)

    @classmethod
    def of(
        cls,
        gm: GraphModule,
        inputs: list[Any],
        roles: dict[int, Role],
        options: Options,
        device: torch.device | None = None,
    ) -> Record:
        """The record of a graph that is to be compiled here and now."""
        devices = sorted({t.device.type for t in inputs if isinstance(t, torch.Tensor)} | {"cpu"})
        autocast = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices if d != "meta"]
        return cls(gm, inputs, roles, options, torch.is_grad_enabled(), autocast=autocast, device=device)

    @property
    def is_told(self) -> bool:
        """Whether the graph can be called, or was there to be when Dynamo forgot all of them; or was turned away.

        Dynamo may start a compile again from within the backend or behind it: a graph of an aborted try is let go of
        without having run once.
        """
        forgotten = self.ran and self.resets < _resets
        return not self.lowered or forgotten or self.compiled() is not None

    @property
    def place(self) -> torch.device:
        """The device that the graph is on, or is told of as on."""
        found = next((t.device for t in self.inputs if isinstance(t, torch.Tensor)), torch.device("cpu"))
        return self.device or found

    @functools.cached_property
    def settings(self) -> Settings:
        """What the options come to on the device of the graph."""
        return self.options.settings(self.place)

    @functools.cached_property
    def budget(self) -> budgeting.Asked | None:
        """The memory budget on the device of the graph."""
        asked = self.options.budget(self.place)
        return asked and replace(asked, around=self.around)

    @functools.cached_property
    def subgraphs(self) -> list[Subgraph]:
        return subgraphs_of(self.graph_module, self.roles)


def remember(record: Record, tensors: Iterable[Any]) -> None:
    """Adds a record to those of the parameters among a graph's inputs, in the place of what failed or is gone."""
    with _noting:
        for p in {id(p): p for p in tensors if isinstance(p, torch.nn.Parameter)}.values():
            others = [r for r in _records.get(p, []) if r.is_told and not (r.failure and not r.lowered)]
            _records[p] = [*(r for r in others if r is not record), record]


def reset() -> None:
    """With torch._dynamo.reset() the compiled graphs are gone: what is compiled from now on replaces their records."""
    global _resets
    _resets += 1


def noting_calls(compiled: Callable[..., Any], record: Record) -> Callable[..., Any]:
    """The compiled graph, which notes that it runs, and the parameters of each module that it runs for."""
    static = [i for i, role in record.roles.items() if role.static]
    first = sorted(static, key=lambda i: not record.roles[i].trainable)[:1]  # a frozen weight may be shared
    known = compat.WeakIdKeyDictionary()

    def note(first: torch.Tensor, args: Sequence[Any]) -> None:
        parameters = {i: args[i] for i in static if isinstance(args[i], torch.nn.Parameter)}
        with _noting:
            if first in known:
                return
            known[first] = True
            record.calls.append({i: weakref.ref(p) for i, p in parameters.items()})
        remember(record, parameters.values())

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        record.ran = True
        for i in first:
            if args[i] not in known:
                note(args[i], args)
        results = compiled(*args)
        if record.options.memory_budget is not None:
            sharing.note(record.kind, record.around, args, results)
        return results

    record.compiled = weakref.ref(run)
    return run


def records_of(model: torch.nn.Module) -> list[Record]:
    """The graphs compiled for a model's parameters that can still be called, oldest first; those that could be before a
    torch._dynamo.reset(), until something is compiled after it."""
    found: dict[int, Record] = {}
    for parameter in parameters_of(model):
        found |= {id(r): r for r in _records.get(parameter, []) if r.is_told}
    latest = max((r.resets for r in found.values()), default=0)
    return [r for r in found.values() if r.resets == latest]


def parameters_of(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    """What a model's graphs are given as its parameters, by object, with its names for them."""
    return {parameter: name for name, parameter in (*compat.gathered(model), *model.named_parameters())}
