"""What is on the device besides a graph while it runs: several graphs of one model share its memory budget.

A model is in several graphs where Dynamo breaks it, or where its regions are compiled by themselves. A graph is
compiled when it is called first; those that were called before it in the same step have kept for backward by then what
they keep, and that is measured. Those to come are not known: what is trained and was not read yet is taken to keep as
much as what this graph reads, so that one of 32 layers that are alike leaves room for 31. Where such layers have graphs
of their own, these are all chosen alike, and the first one's code is found for the others in Inductor's cache.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_fx import compat

CALLS = {"__call__", "_wrapped_call_impl", "_call_impl", "forward"}  # of a module; they end before a step does


@dataclass(frozen=True)
class Around:
    """Besides a graph: bytes that other graphs keep which ran before it; how many times what it takes, it and those to
    come will; bytes of its model's other weights, and of those of them that are trained."""

    kept: int = 0
    times: float = 1.0
    weights: int = 0
    trained: int = 0


@dataclass(frozen=True)
class Kind:
    """What a graph is of: the class of the module whose code it is, and that module's parameters that it reads."""

    of: type[nn.Module]
    parameters: tuple[tuple[str, torch.Size], ...]


@dataclass(frozen=True)
class Call:
    """A call of a graph of some kind, if that is known: what was around it, the parameters that it read, what it kept,
    as long as that is there, and what it returned."""

    kind: Kind | None
    around: Around
    read: frozenset[int]
    call: Callable[[], Any]
    results: Sequence[Callable[[], Any]]

    def tensors(self) -> list[Tensor]:
        call = self.call()
        kept = [] if call is None else compat.saved_by(call)
        return [*kept, *(r for ref in self.results if (r := ref()) is not None)] if kept else []


_calls: list[Call] = []  # of graphs that have a budget


def note(kind: Kind | None, around: Around, given: Iterable[Any], returned: Any) -> None:
    """Notes a graph's call, if there is a backward to come. Of tensors without memory it is DDP's, before a step."""
    results = [t for t in returned if isinstance(t, Tensor)] if isinstance(returned, (tuple, list)) else []
    call = next((t.grad_fn for t in results if isinstance(t.grad_fn, compat.CompiledCall)), None)
    if call is not None and not any(isinstance(t, compat.FakeTensor) for t in results):
        _calls[:] = [c for c in _calls if c.call() is not None]
        read = frozenset(id(p) for p in given if isinstance(p, nn.Parameter))
        _calls.append(Call(kind, around, read, weakref.ref(call), [weakref.ref(t) for t in results]))


def around(parameters: Mapping[str, nn.Parameter], device: torch.device) -> tuple[Kind | None, Around]:
    """Of a graph that is about to be compiled and reads those parameters, by their names in the module whose code it
    is: its kind, and what there is besides."""
    model = _running()
    kind = _kind(model, parameters) if model is not None else None
    alive = [(c, tensors) for c in list(_calls) if (tensors := c.tensors())]
    alike = [c.around for c, _ in alive if kind is not None and c.kind == kind]
    if alike and len(alike) < alike[0].times:
        return kind, alike[0]
    given = list(parameters.values())
    static = [*given, *(model.buffers() if model is not None else ())]
    kept = _bytes((t for _, tensors in alive for t in tensors if not isinstance(t, nn.Parameter)), device, static)
    if model is None:
        return None, Around(kept)
    read = frozenset[int]().union(*(c.read for c, _ in alive))
    trained = [p for p in model.parameters() if p.requires_grad]
    own, left = [p for p in given if p.requires_grad], sum(id(p) not in read for p in trained)
    weights = _bytes([*model.parameters(), *model.buffers()], device) - _bytes(given, device)
    states = _bytes(trained, device) - _bytes(own, device)
    return kind, Around(kept, max(1.0, left / len(own)) if own else 1.0, max(0, weights), max(0, states))


def _running() -> nn.Module | None:
    """The outermost module that is being called.

    Of no other frame are the locals looked at: they would be kept for as long as it runs.
    """
    found, frame = None, sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name in CALLS and frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            found = owner if isinstance(owner, nn.Module) else found
    return found


def _kind(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Kind | None:
    """Of the one among a model's modules that has those parameters by those names."""
    for module in model.modules() if parameters else ():
        own = dict(module.named_parameters(remove_duplicate=False))
        if all(own.get(name) is p for name, p in parameters.items()):
            return Kind(type(module), tuple((name, p.shape) for name, p in parameters.items()))
    return None


def _bytes(tensors: Iterable[Tensor], device: torch.device, static: Iterable[Tensor] = ()) -> int:
    """Of all the memory that those tensors are in, on a device, but for that of the static ones."""
    beside = {compat.place_of(t) for t in static}
    found = {compat.place_of(t): compat.storage_of(t).nbytes() for t in tensors if t.device == device}
    return sum(size for place, size in found.items() if place not in beside)
