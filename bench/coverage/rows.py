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

import peft_fx
from bench.coverage import numerics
from peft_fx.measuring import median_times
from peft_fx.passes.analyse.merged import ALREADY
from zoo.architectures import ARCHITECTURES, Architecture
from zoo.methods import METHODS, Method
from zoo.noise import NOISE
from zoo.packages import MODULES, Module

Entry = Method | Architecture | Module
TABLES: dict[str, Mapping[str, Entry]] = {"peft": METHODS, "architectures": ARCHITECTURES, "packages": MODULES}
OPTIONS = {"peft_fx.form": "weight", "peft_fx.lowering": "aot_eager"}
LESS = 0.1  # of the noise, where the whole makes more than the gate lets pass
SAME_EVERYWHERE = ("adapters", "in_weights", "graphs", "sites", "forward", "input_grad", "refusals")


def measure(entry: Entry, draws: int, timed: bool = False) -> dict[str, Any]:
    """A whole row; `draws` of 0 leaves out the gate. What fails is told as "error", of the row or of the gate."""
    missing = lacking(entry)
    if missing:
        return {"missing": missing}
    try:
        row = explained(entry)
    except Exception as error:
        return {"error": said(error)}
    if isinstance(entry, Architecture):
        row["plain"] = told_without_adapters(entry)
    row["packages"] = {package: importlib.metadata.version(package) for package in entry.packages}
    if draws:
        row["gate"] = _attempt(lambda: gated(entry, draws))
        if (row["gate"].get("ratio") or 0) > numerics.GATE:
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


def gated(entry: Entry, draws: int, noise: float = NOISE) -> dict[str, Any]:
    """The gate of the compiled model, which must compile without falling back to the untouched graph."""
    torch._dynamo.reset()
    model, inputs = entry.build()
    compiled = torch.compile(peft_fx.prepare(model), backend=peft_fx.backend, options=OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="peft_fx")
        return numerics.gate(model, compiled, inputs, draws, noise)


def seconds(entry: Entry, rounds: int = 9) -> dict[str, float]:
    """Median seconds of forward and backward, by Inductor and by peft_fx with its own choice of form."""
    torch._dynamo.reset()
    model, inputs = entry.build()
    other, _ = entry.build()
    peft_fx.prepare(model)
    compiled = {
        "inductor": (torch.compile(other), other),
        "peft_fx": (torch.compile(model, backend=peft_fx.backend), model),
    }
    steps = {n: functools.partial(numerics.step, f, of, inputs, 0) for n, (f, of) in compiled.items()}
    for step in steps.values():
        step()
    device = next(model.parameters()).device
    return median_times(steps, device, rounds)


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
