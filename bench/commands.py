"""The commands that measure one thing: memory, time, fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import fitting, tables
from bench.models import DTYPES, FAMILIES, METHODS, TARGETS, Setup, setup_of
from bench.results import FOLDER, Results, request
from bench.running import measure_all
from bench.variants import LOSSES, VARIANTS

SIZES = {
    "layers": "layers of the model",
    "hidden": "width of the model",
    "tokens": "tokens of a sequence",
    "batch": "sequences in a step",
    "vocab": "size of the vocabulary, or classes of ViT; large ones make the loss dominate the memory",
    "rank": "rank of the adapters",
}

MEMORY = """\
Bytes that one layer of the model keeps for backward, and the peak of a step, each variant in a fresh process.

  kept   bytes that forward leaves for backward. Per layer: measured at two depths (--depths), the difference divided
         by the layers between them, so that embeddings and loss cancel out
  peak   most bytes allocated at one time in a step of forward, backward and optimiser, on top of weights and the
         optimiser's state
  floor  what the same model keeps without adapters, its weights frozen. After a ReLU that model keeps a mask of the
         signs alone, while an adapter's gradient needs the layer's input: there the floor has the input, once, in the
         base's dtype, in place of the mask
"""

TIME = """\
Seconds of a training step, all variants in one process and taking turns; the median of each, and the median over the
rounds of its ratio to the frozen model and to Inductor in the same round. Also memory, the seconds of the first step,
which compiles (caches empty, unless --warm), and the seconds of peft_fx's own passes in it.
"""

FIT = """\
The largest T whose training step fits in a given memory: weights, optimiser's state and peak of a step. The peak is
measured at the lengths of --samples and extended from the last two in a straight line; --measured instead tries each
length for real (on a GPU, where memory is what it is).
"""


def add_commands(commands: Any) -> None:
    """Adds `memory`, `time` and `fit` to the sub-commands of an argument parser."""
    memory = _command(commands, "memory", "bytes kept per layer, and peak, against a frozen model", MEMORY, run_memory)
    setup_arguments(memory, many=True, variants=("frozen", "eager", "inductor", "peft_fx"))
    memory.add_argument("--depths", type=int, nargs=2, default=(1, 3), metavar="N", help="(default: 1 3)")
    memory.add_argument("--tensors", action="store_true", help="also list what a layer keeps, by dtype and shape")

    step = _command(commands, "time", "seconds of a step against the frozen model and Inductor", TIME, run_time)
    setup_arguments(step, many=False, variants=tuple(name for name in VARIANTS if name not in LOSSES))
    step.add_argument("--rounds", type=int, default=9, metavar="N", help="steps of each variant (default: 9)")
    step.add_argument("--warm", action="store_true", help="let compiles use Inductor's caches")

    fit = _command(commands, "fit", "the longest sequence that fits in a given memory", FIT, run_fit)
    setup_arguments(fit, many=False, variants=("eager", "inductor", "peft_fx", "frozen"))
    fit.add_argument("--memory", type=float, required=True, metavar="GB", help="memory to fit in, 1e9 bytes each")
    fit.add_argument("--samples", type=int, nargs="+", metavar="T", help="lengths to measure (default: T/2 and T)")
    fit.add_argument("--measured", action="store_true", help="bisect over measured steps, not over the line")


def _command(commands: Any, name: str, help: str, description: str, run: Any) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, formatter_class=formatter
    )
    command.set_defaults(run=run, command=name)
    return command


def setup_arguments(command: argparse.ArgumentParser, many: bool, variants: tuple[str, ...]) -> None:
    """Arguments that make a `Setup`; of models, dtypes and dropouts one, or several, each with each."""
    count: dict[str, Any] = {"nargs": "+", "metavar": "NAME"} if many else {"nargs": 1, "metavar": "NAME"}
    dtypes = "; ".join(f"{name}: {text}" for name, text in DTYPES.items())
    names = ", ".join(FAMILIES)
    command.add_argument("--model", choices=FAMILIES, default=["llama-256"], help=f"{names} (llama-256)", **count)
    command.add_argument("--dtype", choices=DTYPES, default=["peft"], help=f"{dtypes} (default: peft)", **count)
    dropout_help = "dropout of the adapters (default: 0)"
    command.add_argument("--dropout", type=float, default=[0.0], help=dropout_help, **count | {"metavar": "P"})
    for name, text in SIZES.items():
        command.add_argument(f"--{name}", type=int, metavar="N", help=text)
    command.add_argument(
        "--method", choices=METHODS, help=f"of PEFT: {', '.join(METHODS)} (default: lora)", metavar="NAME"
    )
    command.add_argument("--targets", choices=TARGETS, help="layers that get adapters (default: all-linear)")
    command.add_argument("--optimizer", choices=("adamw", "sgd"), help="(default: adamw)")
    command.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    variant_help = f"of {', '.join(VARIANTS)} (default: {' '.join(variants)})"
    command.add_argument("--variants", nargs="+", choices=VARIANTS, default=variants, metavar="NAME", help=variant_help)
    command.add_argument("--resume", action="store_true", help="keep what was measured before on the same device")
    command.add_argument("--output", type=Path, metavar="FILE", help="(default: bench/results/<command>.json)")


def setups_of(args: argparse.Namespace) -> list[Setup]:
    """Every combination of the models, dtypes and dropouts asked for."""
    names = (*SIZES, "method", "targets", "optimizer")
    given = {name: getattr(args, name) for name in names} | {"device": device_of(args)}
    return [
        setup_of(model, **given, dtype=dtype, dropout=dropout)
        for model in args.model
        for dtype in args.dtype
        for dropout in args.dropout
    ]


def device_of(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def results_of(args: argparse.Namespace, name: str = "") -> Results:
    return Results(args.output or FOLDER / f"{name or args.command}.json", device_of(args))


# ------------------------------------------------------------------------------------------------------- running


def memory_requests(setups: Iterable[Setup], variants: Iterable[str], depths: tuple[int, int]) -> list[dict[str, Any]]:
    """One request for each setup and variant, a variant without adapters once for all setups that share it."""
    found = []
    for setup in setups:
        for name in variants:
            deep = replace(setup, layers=max(depths))
            asked = request("memory", deep, [name], depths=sorted(depths))
            if not VARIANTS[name].refuses(setup) and asked not in found:
                found.append(asked)
    return found


def step_request(setup: Setup, variants: Iterable[str], rounds: int, cold: bool = True) -> dict[str, Any]:
    """All variants that can be had in a setup."""
    names = [name for name in variants if not VARIANTS[name].refuses(setup)]
    return request("step", setup, names, rounds=rounds, cold=cold)


def run_memory(args: argparse.Namespace) -> int:
    requests = memory_requests(setups_of(args), args.variants, tuple(args.depths))
    rows = measure_all(requests, results_of(args), again=not args.resume)
    memories = tables.Memories(rows)
    print("\nKept for backward per layer, × the floor\n")
    print(tables.kept_table(memories))
    print(f"\nPeak of a step at {max(args.depths)} layers, × the frozen model\n")
    print(tables.peak_table(memories))
    for setup in memories.setups() if args.tensors else ():
        for name in (n for n in args.variants if "tensors" in (memories.samples(setup, n) or [{}])[0]):
            print(f"\n{name} keeps for a layer: {setup.model}, {setup.dtype}, dropout {setup.dropout:g}\n")
            print(tables.kept_tensors_table(memories, setup, name))
    return 0


def run_time(args: argparse.Namespace) -> int:
    (setup,) = setups_of(args)
    asked = step_request(setup, args.variants, args.rounds, cold=not args.warm)
    for row in measure_all([asked], results_of(args), again=not args.resume):
        print(f"\n{tables.step_title(row)}\n")
        print(row["error"] if "error" in row else tables.step_table(row))
    return 0


def run_fit(args: argparse.Namespace) -> int:
    (setup,) = setups_of(args)
    results = results_of(args)
    samples = sorted(args.samples or (setup.tokens // 2, setup.tokens))
    lines = fitting.largest(setup, args.variants, 1e9 * args.memory, samples, results, args.measured, not args.resume)
    print(f"\nThe largest T of {setup.model}, {setup.layers} layers × {setup.hidden}, in {args.memory:g} GB\n")
    print(tables.table(["", "T", "× inductor", "bytes a token", "GB at T = 0"], lines, "simple"))
    return 0
