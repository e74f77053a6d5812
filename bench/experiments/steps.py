"""`python -m bench memory`, `time` and `fit`: bytes and seconds of a training step."""

from __future__ import annotations

import copy
import gc
import itertools
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import linear_regression
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor.utils import fresh_cache

from bench import tables
from bench.experiment import DEVICE, Argument, Experiment, Row, Say, Session, attempt, device_of, option
from bench.results import request, unique
from bench.variants import CHECKPOINTED, VARIANTS, WHOLE, Trainee, make
from peft_fx.measuring import kept_tensors, memory_of, times_in_turn
from peft_fx.records import records_of
from zoo.models import DTYPES, FAMILIES, METHODS, TARGETS, Setup, make_base, make_batch, setup_of

SIZES = {
    "layers": "layers of the model",
    "hidden": "width of the model",
    "tokens": "tokens of a sequence",
    "batch": "sequences in a step",
    "vocab": "size of the vocabulary, or classes of ViT; large ones make the loss dominate the memory",
    "rank": "rank of the adapters",
}


def setup_options(
    variants: Sequence[str], many: bool = False, device: bool = True, model: str | None = "llama-256"
) -> Iterator[Argument]:
    """Arguments that make a `Setup`; of models, dtypes and dropouts one, or several, each with each."""
    count: dict[str, Any] = {"nargs": "+" if many else 1, "metavar": "NAME"}
    dtypes = "; ".join(f"{name}: {text}" for name, text in DTYPES.items())
    names = f"{', '.join(FAMILIES)} (default: {model or 'what is committed'})"
    yield option("--model", choices=FAMILIES, default=[model] if model else [], help=names, **count)
    yield option("--dtype", choices=DTYPES, default=["peft"], help=f"{dtypes} (default: peft)", **count)
    dropouts = {"type": float, "default": [0.0], "help": "dropout of the adapters (default: 0)"}
    yield option("--dropout", **count | {"metavar": "P"} | dropouts)
    for name, text in SIZES.items():
        yield option(f"--{name}", type=int, metavar="N", help=text)
    methods = f"of PEFT: {', '.join(METHODS)} (default: lora)"
    yield option("--method", choices=METHODS, metavar="NAME", help=methods)
    yield option("--targets", choices=TARGETS, help="layers that get adapters (default: all-linear)")
    yield option("--optimizer", choices=("adamw", "sgd"), help="(default: adamw)")
    told = f"of {', '.join(VARIANTS)} (default: {' '.join(variants)})"
    yield option("--variants", nargs="+", choices=VARIANTS, default=variants, metavar="NAME", help=told)
    if device:
        yield DEVICE


def setups_of(args: Namespace) -> list[Setup]:
    """Every combination of the models, dtypes and dropouts asked for."""
    given = {name: getattr(args, name) for name in (*SIZES, "method", "targets", "optimizer")}
    return [
        setup_of(model, **given, device=device_of(args), dtype=dtype, dropout=dropout)
        for model in args.model
        for dtype in args.dtype
        for dropout in args.dropout
    ]


# ------------------------------------------------------------------------------------------------------ commands


def memory_requests(setups: Iterable[Setup], variants: Iterable[str], depths: Sequence[int]) -> list[dict[str, Any]]:
    """One request for each setup and variant, a variant without adapters once for all setups that share it."""
    pairs = ((s, name) for s in setups for name in variants if not VARIANTS[name].refuses(s))
    deepest, depths = max(depths), sorted(depths)
    return unique(request("memory", replace(s, layers=deepest), [name], depths=depths) for s, name in pairs)


def step_request(setup: Setup, variants: Iterable[str], rounds: int, cold: bool = True) -> dict[str, Any]:
    """All variants that can be had in a setup."""
    names = [name for name in variants if not VARIANTS[name].refuses(setup)]
    return request("step", setup, names, rounds=rounds, cold=cold)


def _memory(args: Namespace, session: Session) -> list[Row]:
    return session.measure(memory_requests(setups_of(args), args.variants, args.depths))


def _time(args: Namespace, session: Session) -> list[Row]:
    (setup,) = setups_of(args)
    return session.measure([step_request(setup, args.variants, args.rounds, cold=not args.warm)])


def _tensors(args: Namespace, rows: Sequence[Row]) -> Iterable[str]:
    memories = tables.Memories(rows)
    return tables.breakdown(memories, memories.setups(), args.variants, "simple") if args.tensors else ()


def _fit(args: Namespace, session: Session) -> list[Row]:
    """Of each variant the largest T, and the line of its bytes over T."""
    (setup,) = setups_of(args)
    memory, fitting = 1e9 * args.memory, []

    def need(name: str, T: int, session: Session) -> float:
        """Bytes of a step of T tokens; infinite where it failed, for want of memory as a rule."""
        asked = request("memory", replace(setup, tokens=T), [name], depths=[setup.layers])
        (row,) = session.measure([asked])
        (sample,) = row.get("samples", [{"peak": float("inf"), "weights": 0, "optimizer": 0}])
        return float(sample["weights"] + sample["optimizer"] + sample["peak"])

    for name in args.variants:
        samples = sorted(args.samples or (setup.tokens // 2, setup.tokens))[-2:]
        points = [(T, need(name, T, session)) for T in samples]
        slope, start = linear_regression(*zip(*(points if len(points) > 1 else [(0, 0.0), *points]), strict=True))
        most = largest(lambda T, slope=slope, start=start: start + slope * T <= memory, STEP)
        if args.measured:  # to within a sixteenth
            known = replace(session, again=False)
            coarse = max(STEP, most // 16 // STEP * STEP)
            most = largest(lambda T, name=name, known=known: need(name, T, known) <= memory, coarse, 2 * most)
        fitting.append({"setup": setup, "memory": args.memory, "name": name, "T": most, "slope": slope, "start": start})
    return fitting


STEP = 64  # T is a multiple of it


def largest(fits: Callable[[int], bool], step: int, most: int = 2**24) -> int:
    """The largest multiple of `step`, up to `most`, that fits; 0 where not even `step` does.

    >>> largest(lambda T: T <= 1000, 64)
    960
    """
    return step * bisect_left(range(step, most + 1, step), True, key=lambda T: not fits(T))


def _fits(rows: Sequence[Row], style: str) -> str:
    setup = rows[0]["setup"]
    theirs = next((row["T"] for row in rows if row["name"] == "inductor"), 0)
    columns = {
        "": lambda row: row["name"],
        "T": lambda row: str(row["T"]),
        "× inductor": lambda row: f"{row['T'] / theirs:.2f}×" if theirs else "",
        "bytes a token": lambda row: f"{row['slope']:.0f}",
        "GB at T = 0": lambda row: f"{row['start'] / 1e9:.3f}",
    }
    title = f"The largest T of {setup.model}, {setup.layers} layers × {setup.hidden}, in {rows[0]['memory']:g} GB"
    return f"{title}\n\n{tables.of_columns(columns, rows, style)}"


# ----------------------------------------------------------------------------------------------------- measuring


def memory(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """One variant's memory at each depth asked for, the process having run nothing else."""
    setup, (name,) = Setup(**request["setup"]), request["variants"]
    samples = []
    for layers in request["depths"]:
        say(f"{layers} layers")
        torch._dynamo.reset()
        samples.append({"layers": layers} | _memory_of(name, replace(setup, layers=layers)))
        _release()
    return {"samples": samples}


def _memory_of(name: str, setup: Setup) -> dict[str, Any]:
    trainee = make(name, make_base(setup), setup, make_batch(setup))
    measured = measured_of(trainee)
    if name not in CHECKPOINTED:  # reading what a checkpoint keeps would compute it
        measured["tensors"] = kept_tensors(trainee.loss(), trainee.model)
    return measured


def step(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """All variants in one process, taking turns: seconds of each step, and memory and compile time of each variant."""
    setup, names = Setup(**request["setup"]), request["variants"]
    base, batch = make_base(setup), make_batch(setup)
    trainees: dict[str, Trainee] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        say(name)
        rows[name] = attempt(lambda n=name: _prepare(n, base, setup, batch, request["cold"], trainees))
        _release()
    steps = {name: trainee.step for name, trainee in trainees.items()}
    rounds, done = request["rounds"], itertools.count(1)
    times = times_in_turn(steps, torch.device(setup.device), rounds, lambda: say(f"{next(done)} of {rounds} rounds"))
    for name, taken in times.items():
        rows[name]["times"] = taken
    return {"results": rows}


def _prepare(name: str, base: Any, setup: Setup, batch: Any, cold: bool, trainees: dict[str, Trainee]) -> Any:
    """Compiles a variant and measures its memory; `trainees` gets it only if all that went well."""
    trainee = make(name, _sharing(base, name), setup, batch)
    # warm, Inductor's cache alone: of what AOTAutograd's answers our passes can tell nothing
    with fresh_cache() if cold and VARIANTS[name].compiled else functorch_config.patch(enable_autograd_cache=False):
        measured = measured_of(trainee)
    trainees[name] = trainee
    return measured


def _sharing(base: Any, name: str) -> Any:
    """A copy of the model with the same weights, not copies of them; full fine-tuning gets its own."""
    shared = {} if name == "full" else {id(t): t for t in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, memo=shared)


def measured_of(trainee: Trainee) -> dict[str, Any]:
    """Seconds of the first step, which compiles, and how many graphs it compiled; bytes of a step on top of the weights
    and the optimiser's state, and theirs; and what our own passes tell."""
    device, graphs = torch.device(trainee.setup.device), counters["stats"]["unique_graphs"]
    (seconds,) = times_in_turn({"": trainee.step}, device, rounds=1)[""]
    graphs = counters["stats"]["unique_graphs"] - graphs
    memory = memory_of(trainee.loss, trainee.finish, device)
    states = [t for state in trainee.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return {
        "first_step_s": seconds,
        "graphs": graphs,
        "kept": memory.kept,
        "peak": memory.peak,
        "weights": _bytes([*trainee.model.parameters(), *trainee.model.buffers()]),
        "gradients": _bytes(trainee.trained),
        "optimizer": _bytes(states),
        **passes_of(trainee),
    }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def passes_of(trainee: Trainee) -> dict[str, Any]:
    """Seconds of our own passes in the compile, and the peak that a budget was chosen by; nothing where none of ours
    ran."""
    outcomes = [o for r in records_of(torch.nn.ParameterList(trainee.trained)) for o in r.outcomes]
    held = [o.budget.to_dict() for o in outcomes if o.budget]
    return {"passes_s": sum(o.seconds for o in outcomes), **({"held": held[0]} if held else {})} if outcomes else {}


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is none


MEMORY = Experiment(
    name="memory",
    text="""\
Bytes kept per layer, and peak, against a frozen model.

Bytes that one layer of the model keeps for backward, and the peak of a step, each variant in a fresh process.

  kept   bytes that forward leaves for backward. Per layer: measured at two depths (--depths), the difference divided
         by the layers between them, so that embeddings and loss cancel out
  peak   most bytes allocated at one time in a step of forward, backward and optimiser, on top of weights and the
         optimiser's state
  floor  what the same model keeps without adapters, its weights frozen. After a ReLU that model keeps a mask of the
         signs alone, while an adapter's gradient needs the layer's input: there the floor has the input, once, in the
         base's dtype, in place of the mask
""",
    arguments=(
        *setup_options(("frozen", "eager", "inductor", "peft_fx"), many=True),
        option("--depths", type=int, nargs=2, default=(1, 3), metavar="N", help="(default: 1 3)"),
        option("--tensors", action="store_true", help="also list what a layer keeps, by dtype and shape"),
    ),
    measured=_memory,
    tables={"": tables.of_steps},
    more=_tensors,
    kinds={"memory": memory},
)
TIME = Experiment(
    name="time",
    text="""\
Seconds of a step against the frozen model and Inductor.

Seconds of a training step, all variants in one process and taking turns; the median of each, and the median over the
rounds of its ratio to the frozen model and to Inductor in the same round. Also memory, the seconds of the first step,
which compiles (caches empty, unless --warm), and the seconds of peft_fx's own passes in it.
""",
    arguments=(
        *setup_options(WHOLE),
        option("--rounds", type=int, default=9, metavar="N", help="steps of each variant (default: 9)"),
        option("--warm", action="store_true", help="let compiles use Inductor's caches"),
    ),
    measured=_time,
    tables={"": tables.of_steps},
    kinds={"step": step},
)
FIT = Experiment(
    name="fit",
    text="""\
The longest sequence that fits in a given memory.

The largest T whose training step fits in a given memory: weights, optimiser's state and peak of a step. The peak is
measured at the lengths of --samples and extended from the last two in a straight line; --measured instead tries each
length for real (on a GPU, where memory is what it is).
""",
    arguments=(
        *setup_options(("eager", "inductor", "peft_fx", "frozen")),
        option("--memory", type=float, required=True, metavar="GB", help="memory to fit in, 1e9 bytes each"),
        option("--samples", type=int, nargs="+", metavar="T", help="lengths to measure (default: T/2 and T)"),
        option("--measured", action="store_true", help="bisect over measured steps, not over the line"),
    ),
    measured=_fit,
    tables={"": _fits},
)
