"""One measurement in a fresh process: `python -m bench.worker` reads a request as JSON and writes lines of JSON.

A request is {"kind": "memory" | "step" | "sweep" | "compile" | "kernels", "setup", "variants", ...}. Each answer is
{"progress": text} or, at the end, {"row": {...}}. All sizes are bytes, all times seconds.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from bench import kept
from bench.compiling import compile
from bench.kernels import kernels
from bench.models import Setup, make_base, make_batch
from bench.sweep import sweep
from bench.variants import CHECKPOINTED, VARIANTS, Trainee, make
from peft_fx.compiling import records_of
from peft_fx.measuring import median_times, memory_of

Say = Callable[[str], None]


def memory(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """One variant's memory at each depth asked for, the process having run nothing else."""
    setup, (name,) = Setup(**request["setup"]), request["variants"]
    samples = []
    for layers in request["depths"]:
        say(f"{layers} layers")
        torch._dynamo.reset()
        sized = replace(setup, layers=layers)
        samples.append({"layers": layers} | _memory_of(name, sized))
        _release()
    return {"samples": samples}


def _memory_of(name: str, setup: Setup) -> dict[str, Any]:
    trainee = make(name, make_base(setup), setup, make_batch(setup))
    measured = first_step(trainee) | sizes(trainee) | passes_of(trainee)
    if name not in CHECKPOINTED:  # reading what a checkpoint keeps would compute it
        measured["tensors"] = kept.tensors_of(trainee.loss(), trainee.model)
    return measured


def step(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """All variants in one process, taking turns: seconds of each step, and memory and compile time of each variant."""
    setup, names = Setup(**request["setup"]), request["variants"]
    base, batch = make_base(setup), make_batch(setup)
    trainees: dict[str, Trainee] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        say(name)
        rows[name] = _attempt(lambda n=name: _prepare(n, base, setup, batch, request["cold"], trainees))
        _release()
    device = torch.device(setup.device)
    for i in range(request["rounds"]):
        say(f"round {i + 1} of {request['rounds']}")
        steps = {name: trainee.step for name, trainee in trainees.items()}
        for name, seconds in median_times(steps, device, rounds=1).items():
            rows[name].setdefault("times", []).append(seconds)
    return {"results": rows}


def _prepare(name: str, base: Any, setup: Setup, batch: Any, cold: bool, trainees: dict[str, Trainee]) -> Any:
    """Compiles a variant and measures its memory; `trainees` gets it only if all that went well."""
    trainee = make(name, _sharing(base, name), setup, batch)
    cache: AbstractContextManager[Any] = fresh_cache() if cold and VARIANTS[name].compiled else nullcontext()
    with cache:
        measured = first_step(trainee) | sizes(trainee) | passes_of(trainee)
    trainees[name] = trainee
    return measured


def _sharing(base: Any, name: str) -> Any:
    """A copy of the model with the same weights, not copies of them; full fine-tuning gets its own."""
    shared = {} if name == "full" else {id(t): t for t in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, memo=shared)


def _attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or the kind of error: one variant that fails leaves the others be."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__}


# ---------------------------------------------------------------------------------------------------- one variant


def first_step(trainee: Trainee) -> dict[str, Any]:
    """Seconds of the first step, which compiles, and how many graphs it compiled."""
    graphs = counters["stats"]["unique_graphs"]
    start = time.perf_counter()
    trainee.step()
    if trainee.setup.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"first_step_s": seconds, "graphs": counters["stats"]["unique_graphs"] - graphs}


def sizes(trainee: Trainee) -> dict[str, int]:
    """Bytes of a step on top of the weights and the optimiser's state, and theirs."""
    measured = memory_of(trainee.loss, trainee.finish, torch.device(trainee.setup.device))
    states = [t for state in trainee.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return {
        "kept": measured.kept,
        "peak": measured.peak,
        "weights": _bytes(trainee.model.parameters()) + _bytes(trainee.model.buffers()),
        "gradients": _bytes(trainee.trained),
        "optimizer": _bytes(states),
    }


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def passes_of(trainee: Trainee) -> dict[str, Any]:
    """Seconds of our own passes in the compile, and the peak that a budget was chosen by; nothing where none of ours
    ran."""
    outcomes = [o for r in records_of(torch.nn.ParameterList(trainee.trained)) for o in r.outcomes]
    held = [o.budget.to_dict() for o in outcomes if o.budget]
    return {"passes_s": sum(o.seconds for o in outcomes), **({"held": held[0]} if held else {})} if outcomes else {}


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------- process


def main() -> int:
    """Answers the one request on stdin; what others print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    quieten()
    request = json.load(sys.stdin)
    kind = {"memory": memory, "step": step, "sweep": sweep, "compile": compile, "kernels": kernels}[request["kind"]]
    row = _attempt(lambda: kind(request, lambda text: answer(progress=text)))
    answer(row=row)
    return 0


def quieten() -> None:
    """Third parties' warnings off, and no silent fall-back of Dynamo's or ours: a variant is what it says, or an
    error."""
    os.environ.pop("PEFT_FX_DISABLE", None)
    torch._dynamo.config.disable = False
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="peft_fx")
    warnings.filterwarnings("ignore", message="peft_fx cannot hold")  # the least is measured too
    for name in ("torch._dynamo", "torch._inductor", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


if __name__ == "__main__":
    raise SystemExit(main())
