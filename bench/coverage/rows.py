"""One row of a table: what `explain` tells of a model, and how far the compiled model's results are from exact."""

from __future__ import annotations

import functools
import importlib.metadata
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import peft_fx
from peft_fx.measuring import median_times
from peft_fx.passes.analyse.merged import ALREADY
from tests.support.oracle import GATE, Run, errors, leaves, pooled, run, run_exactly, to_dtype
from zoo.architectures import ARCHITECTURES, Architecture
from zoo.methods import METHODS, Method
from zoo.noise import NOISE, disturb
from zoo.packages import MODULES, Module

Entry = Method | Architecture | Module
TABLES: dict[str, Mapping[str, Entry]] = {"peft": METHODS, "architectures": ARCHITECTURES, "packages": MODULES}
OPTIONS = {"peft_fx.form": "weight", "peft_fx.lowering": "aot_eager"}
LESS = 0.1  # of the noise, where the whole makes more than the gate lets pass
SAME_EVERYWHERE = ("adapters", "in_weights", "graphs", "sites", "forward", "input_grad", "refusals")


def measure(entry: Entry, draws: int, timed: bool = False) -> dict[str, Any]:
    """A whole row; `draws` of 0 leaves out the gate. What fails is told as "error", of the row or of the gate."""
    if missing := lacking(entry):
        return {"missing": missing}
    row = _attempt(lambda: explained(entry))
    if "error" in row:
        return row
    if isinstance(entry, Architecture):
        row["plain"] = told_without_adapters(entry)
    row["packages"] = {package: importlib.metadata.version(package) for package in entry.packages}
    if draws:
        row["gate"] = _attempt(lambda: gated(entry, draws))
        if (row["gate"].get("ratio") or 0) > GATE:
            row["gate of less"] = _attempt(lambda: gated(entry, draws, NOISE * LESS))
    if timed:
        row["seconds"] = _attempt(lambda: seconds(entry))
    return row


def lacking(entry: Entry) -> str:
    """The package that an entry needs and that is not installed, or nothing."""
    for package in entry.packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed"
    return ""


def explained(entry: Entry) -> dict[str, Any]:
    """What `explain` tells after `prepare`, counted. Nothing is computed: this part of a row is the same on every
    machine."""
    torch._dynamo.reset()
    model, inputs = entry.build()
    report = peft_fx.explain(peft_fx.prepare(model), options=OPTIONS, **inputs)
    sites = [s for s in report.sites if s.reason != ALREADY]
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    row: dict[str, Any] = {
        "adapters": len(layers) or (0 if isinstance(entry, Architecture) else 2),  # another package's: on both layers
        "in_weights": sum(isinstance(m, ParamWrapper) for m in layers),
        "graphs": report.graphs,
        "sites": len(sites),
        "forward": sum(s.forward == "weight" for s in sites),
        "input_grad": sum(s.input_grad == "weight" for s in sites),
        "refusals": dict(sorted(Counter(r.code for r in report.refusals).items())),
        "kept": report.kept_bytes,
    }
    if report.graph_breaks:
        row["breaks"] = [_first_line(b) for b in report.graph_breaks]
    if report.failures:
        row["failures"] = report.failures
    return row


def told_without_adapters(entry: Architecture) -> int:
    """How many sites and refusals are told of the same model without any adapter, fully trained: each is false."""
    torch._dynamo.reset()
    report = peft_fx.explain(entry.plain(), options=OPTIONS, **entry.batch())
    return len(report.sites) + sum(r.code != "logits_returned" for r in report.refusals)


def seconds(entry: Entry, rounds: int = 9) -> dict[str, float]:
    """Median seconds of forward and backward, by Inductor and by peft_fx with its own choice of form."""
    torch._dynamo.reset()
    model, inputs = entry.build()
    other, _ = entry.build()
    peft_fx.prepare(model)
    steps = {
        "inductor": functools.partial(step, torch.compile(other), other, inputs, 0),
        "peft_fx": functools.partial(step, torch.compile(model, backend=peft_fx.backend), model, inputs, 0),
    }
    for first in steps.values():
        first()
    return median_times(steps, next(model.parameters()).device, rounds)


# -------------------------------------------------------------------------------------------------- how exact it is


def gated(entry: Entry, draws: int, noise: float = NOISE) -> dict[str, Any]:
    """{"ratio": the worst over the output and every gradient of the compiled model, "tensor": its name}, errors pooled
    over several draws of the trained parameters and the inputs; {"ratio": None} where the model itself draws random
    numbers. `noise` is what is on trained parameters.

    Raises AssertionError where a gradient is lost, or where one is not finite that is in eager mode; a warning of ours
    where it falls back to the untouched graph.
    """
    torch._dynamo.reset()
    model, inputs = entry.build()
    compiled = torch.compile(peft_fx.prepare(model), backend=peft_fx.backend, options=OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="peft_fx")
        if draws_random_numbers(model, inputs):
            return {"ratio": None}
        disturb(model, 0, noise - NOISE)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.is_floating_point()}

        def once(seed: int) -> tuple[Run, ...]:
            draw(model, start, seed, noise)
            given = shuffled(inputs, seed)
            torch.manual_seed(seed)
            exact = run_exactly(model, given, seed)
            return exact, step(model, model, given, seed), step(compiled, model, given, seed)

        worst = max(errors(*pooled(once, draws)), key=lambda e: e.ratio)
    return {"ratio": round(worst.ratio, 3), "tensor": worst.name}


@torch.no_grad()
def draw(model: nn.Module, start: Mapping[str, Tensor], seed: int, noise: float = NOISE) -> None:
    """Other parameters of the same distribution: noise on the trained ones, the frozen ones' elements reordered."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.copy_(start[name] if parameter.requires_grad else _reordered(start[name], generator))
    disturb(model, seed, noise)


def _reordered(t: Tensor, generator: torch.Generator) -> Tensor:
    return t.flatten()[torch.randperm(t.numel(), generator=generator)].view_as(t)


def shuffled(inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The inputs with their elements in another order, as leaves that need a gradient where the given ones do."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(t: Tensor) -> Tensor:
        return _reordered(t.detach(), generator).requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, shuffle, dict(inputs))


def step(f: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any], seed: int) -> Run:
    """Outputs and gradients of one forward and backward, of the inputs too; the cotangents are ±1."""
    torch.manual_seed(seed)
    return run(f, model, inputs, seed)


def draws_random_numbers(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the seed matters to a forward."""
    found = []
    for seed in (0, 0, 1):  # the first call of some methods sets them up
        torch.manual_seed(seed)
        found.append(leaves(model(**to_dtype(inputs, None))))
    return any(not torch.equal(a, b) for a, b in zip(*found[1:], strict=True))


# --------------------------------------------------------------------------------------------------------- failures


def _attempt(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measured()
    except Exception as error:
        return {"error": said(error)}


def said(error: Exception) -> str:
    """The kind of an error and its first line; all of it goes to stderr."""
    traceback.print_exception(error)
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error  # what a backend raised
    return f"{type(inner).__name__}: {_first_line(inner)}"


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0][:200]
