"""`python -m bench suite gpu --offline`: all of the suite that takes no GPU, so that only time is new on one.

The code of each case is generated, forward and backward, for a card that is not there. What it calls of our kernels is
run by Triton's interpreter (interpreting.py), at smaller sizes and on integers, where it must give its decomposition's
bits. Nothing is timed. What went well is stored, and the same command again goes on behind it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._inductor.graph import GraphLowering

from bench import offline, tables
from bench.experiment import Kind, Request, Row, Say, Session, attempt, quieten
from bench.experiments.kernels import kernels_of, prepared
from bench.results import ROOT, request, unique
from bench.variants import VARIANTS
from peft_fx.cli.terminal import Problem
from peft_fx.kernels.library import KERNELS
from peft_fx.passes.decide.machine import MACHINES
from zoo.models import Setup, make_batch

LAYERS = 2  # of a model: the code of a third is that of the second
MACHINE = "h100"
INTERPRETED = {"kind": "interpreted", "variants": ["peft_fx"]}
SMALL = 256  # sizes up to here stay: those of ranks and heads
TOLD = """\
For a GPU that is not there: the code of each case is generated for an {machine}, {layers} layers of a model, and what
it calls of our kernels is run by Triton's interpreter. Nothing was timed."""


def here(asked: Request, say: Say) -> Row:
    """A case in this process, which is of no other use from then on: to start one takes as long as most cases."""
    quieten()
    return attempt(lambda: rehearsal(asked, say))


def rehearse(requests: Iterable[Request], session: Session, by: Kind = here) -> None:
    """Prints what there is of each case; a Problem where code cannot be generated, or a kernel gives wrong numbers."""
    if importlib.util.find_spec("triton") is None:
        raise Problem("Inductor's code for a GPU needs Triton: pip install --no-deps triton==3.7.1")
    asked = cases(requests)
    rows = session.measure(asked, by, only=[*asked, INTERPRETED])
    calls = unique(call for row in rows for call in row.get("ours", []))
    if len(rows) < len(asked) or not (done := session.measure([INTERPRETED], lambda *_: interpreted(calls))):
        return
    told = done[0]["kernels"]
    print(f"{TOLD.format(machine=MACHINE, layers=LAYERS)}\n\n{table(rows)}\n\n{table_of_kernels(told)}")
    eager = sorted({name for r in requests for name in r["variants"] if not VARIANTS[name].compiled})
    print(f"\nWithout code of their own, op by op: {', '.join(eager)}.")
    wrong = [row for row in rows if "error" in row] + [one for one in told if not one["equal"]]
    if wrong:
        raise Problem(f"{len(wrong)} of {len(rows)} cases and {len(told)} kernels failed")


def cases(requests: Iterable[Request]) -> list[Request]:
    """Each compiled variant of each setup, once, of few layers."""
    found = []
    for asked in requests:
        setup = Setup(**asked["setup"])
        setup = replace(setup, layers=min(setup.layers, LAYERS), device="cpu")
        names = [name for name in asked["variants"] if VARIANTS[name].compiled]
        found += [request("rehearsal", setup, [name]) for name in names]
    return unique(found)


def rehearsal(asked: Request, say: Say) -> dict[str, Any]:
    """What the code of a step consists of, by direction, and its calls of our kernels, each once, at smaller sizes."""
    setup, (name,) = Setup(**asked["setup"]), asked["variants"]
    offline.pretend()
    model, backend, options = prepared(name, setup, MACHINE, "flash")
    found: dict[str, Any] = {"ours": []}

    def read(lowered: GraphLowering) -> None:
        side = "backward" if lowered.is_backward else "forward"
        compile(lowered.text, side, "exec")
        kinds = [k["kind"] for node in lowered.scheduler.nodes for k in kernels_of(node, MACHINES[MACHINE])]
        found[side] = dict(Counter(found.get(side, {})) + Counter(kinds))
        calls = [node for node in lowered.orig_gm.graph.nodes if node.target in KERNELS]
        found["ours"] += [{"op": node.target.name(), "given": torch.fx.map_arg(node.args, _told)} for node in calls]

    offline.step(model, make_batch(setup), backend, options, read)
    return found | {"ours": unique(map(smaller, found["ours"]))}


def _told(node: Any) -> dict[str, Any]:
    """A tensor as JSON has it."""
    t = node.meta["val"]
    sizes, strides = list(map(int, t.shape)), list(map(int, t.stride()))
    return {"shape": sizes, "stride": strides, "dtype": str(t.dtype).removeprefix("torch.")}


def smaller(call: Any) -> Any:
    """A call with the sizes of its tensors cut, equal ones to equal ones that no tile divides, and laid out in the same
    order.

    >>> smaller({"shape": [8192, 2048], "stride": [1, 8192], "dtype": "bfloat16"})
    {'shape': [522, 524], 'stride': [1, 522], 'dtype': 'bfloat16'}
    """
    if isinstance(call, dict) and "shape" in call:
        sizes = [n if n <= SMALL else 2 * SMALL + 8 + n % 7 for n in call["shape"]]
        strides, step = [0] * len(sizes), 1
        for i in sorted(range(len(sizes)), key=lambda i: (call["stride"][i], -i)):
            strides[i], step = step, step * sizes[i]
        return {"shape": sizes, "stride": strides, "dtype": call["dtype"]}
    if isinstance(call, dict):
        return {key: smaller(v) for key, v in call.items()}
    return [smaller(v) for v in call] if isinstance(call, (list, tuple)) else call


def interpreted(calls: Sequence[Any]) -> Row:
    """Whether each gives its decomposition's bits: in a process whose Triton interprets."""
    command, env = [sys.executable, "-m", "tests.support.interpreting"], os.environ | {"TRITON_INTERPRET": "1"}
    asked = {"input": json.dumps(calls), "capture_output": True, "text": True, "cwd": ROOT.parent, "env": env}
    done = subprocess.run(command, check=False, **asked)  # type: ignore[call-overload]
    if done.returncode:
        raise Problem(f"Triton's interpreter failed:\n{done.stderr[-4000:]}")
    told = [{**call, "equal": equal} for call, equal in zip(calls, json.loads(done.stdout), strict=True)]
    return {"kernels": told} | ({} if all(one["equal"] for one in told) else {"error": "other bits"})


def table(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        setup = Setup(**row["setup"])
        sides = [row.get(side, {}) for side in ("forward", "backward")]
        counts = [sum(side.get(kind, 0) for side in sides) for kind in ("triton", "product", "attention", "op")]
        dropout = f", dropout {setup.dropout:g}" if setup.dropout else ""
        lines.append([f"T = {setup.tokens}{dropout}", row["variants"][0], *map(str, counts), row.get("error", "")])
    head = ["", "", "Triton kernels", "products", "attention", "ops", "error"]
    return tables.table(head, lines, "simple", left=2)


def table_of_kernels(told: Iterable[Row]) -> str:
    counts = Counter((row["op"], row["equal"]) for row in told)
    lines = [[op, str(counts[op, True]), str(counts[op, False])] for op in sorted({op for op, _ in counts})]
    return tables.table(["interpreted", "as its decomposition", "not"], lines, "simple", left=1)
