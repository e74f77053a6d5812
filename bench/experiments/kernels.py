"""Kernels and bytes of a step on a GPU that is not there, by the code that Inductor generates for it.

Generates the code of a training step for an H100, on any machine: no GPU, no driver, nothing computed. Of each variant,
forward and backward apart:

  launches  kernels that are started; an op of our own may be two
  products  of those, matrix products by a library, and attention
  GB        bytes that the kernels read and write, each value once a kernel
  ms        by the roofline of --machine: products at their dtype's rate, all others at the memory's, and launches

With no model, size or method given: the cases that are committed, Llama-3.2-1B's layers without its vocabulary. Needs
Triton, of the version that PyTorch would come with: pip install --no-deps triton==3.7.1 for 2.13.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor import ir, scheduler
from torch._inductor.graph import GraphLowering

from bench import offline, tables
from bench.experiment import Experiment, Request, Row, Say, Session, option
from bench.experiments.steps import setup_options, setups_of
from bench.figures import COLOURS, bars, bars_of, save
from bench.results import request, unique
from bench.variants import CHECKPOINTED, VARIANTS
from peft_fx.cli.configs import without_mask
from peft_fx.cli.terminal import Problem
from peft_fx.kernels import narrow
from peft_fx.passes.decide.machine import MACHINES, Machine
from zoo.models import Setup, make_base, make_batch, setup_of

Kernel = dict[str, Any]
NAMES = ("frozen", "inductor", "peft_fx")
LENGTHS = (256, 2048, 8192, 32768)
DEAREST = 10
ATTENTION = {
    "flash": "causal by itself",
    "sdpa": "as transformers has it where it is compiled, with a mask [T, T]",
    "pointwise": "a stand-in without a library's kernel",
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def _measured(args: Namespace, session: Session) -> list[Row]:
    if importlib.util.find_spec("triton") is None:
        raise Problem("Inductor's code for a GPU needs Triton: pip install --no-deps triton==3.7.1")
    more = {"machine": args.machine, "attention": args.attention}
    cases = ((setup, args.variants) for setup in setups_of(args)) if args.model else committed(args.variants)
    return session.measure(unique(request("kernels", setup, [n], **more) for setup, names in cases for n in names))


def committed(names: Sequence[str] = NAMES) -> Iterator[tuple[Setup, Sequence[str]]]:
    """Two layers of Llama-3.2-1B: every length, and each other setting at one of them, behind checkpoints too."""
    setup = setup_of("llama-3.2-1b", layers=2, vocab=512, tokens=8192, device="cpu")
    others: list[dict[str, Any]] = [{"method": "dora"}, {"dropout": 0.1}, {"method": "ia3"}, {"method": "vera"}]
    others += [{"dtype": dtype} for dtype in ("bf16", "fp32")]
    yield from ((replace(setup, **other), names) for other in (*({"tokens": T} for T in LENGTHS), *others))
    yield setup, tuple(name for name in CHECKPOINTED if VARIANTS[name].compiled)


# ------------------------------------------------------------------------------------------------------ measuring


def kernels(asked: Request, say: Say) -> dict[str, Any]:
    """The kernels of one variant's step, by direction."""
    setup, (name,) = Setup(**asked["setup"]), asked["variants"]
    machine = MACHINES[asked["machine"]]
    offline.pretend()
    model, backend, options = prepared(name, setup, asked["machine"], asked["attention"])
    found: dict[str, Any] = {}

    def read(lowered: GraphLowering) -> None:
        side = "backward" if lowered.is_backward else "forward"
        found[side] = summary([k for node in lowered.scheduler.nodes for k in kernels_of(node, machine)])

    offline.step(model, make_batch(setup), backend, options, read)
    return found


def prepared(name: str, setup: Setup, machine: str, attention: str) -> tuple[Any, str, dict[str, Any]]:
    """A variant's model without weights, and its backend with options."""
    with torch.device("meta"):
        base = make_base(replace(setup, device="meta"))
        if attention == "flash":
            without_mask(base)
        else:
            base.set_attn_implementation(attention)
        model = VARIANTS[name].prepare(base, setup)
    if setup.dtype == "bf16":
        model.to(torch.bfloat16)  # on the meta device PEFT leaves its adapters in fp32
    ours = name.startswith("peft_fx")
    return model, "peft_fx" if ours else "inductor", {"peft_fx.machine": machine} if ours else {}


def summary(found: list[Kernel]) -> Row:
    """What is told of the kernels of one direction."""
    dearest = sorted(found, key=lambda k: -k["seconds"])[:DEAREST]
    return {
        "calls": len(found),
        **{what: sum(k[what] for k in found) for what in ("launches", "bytes", "seconds")},
        "kinds": dict(Counter(k["kind"] for k in found)),
        "products": dict(Counter(k["shape"] for k in found if k["kind"] == "product").most_common()),
        "dearest": [{k: one[k] for k in ("kind", "shape", "of", "bytes", "seconds")} for one in dearest],
    }


def kernels_of(node: Any, machine: Machine) -> Iterator[Kernel]:
    """The one kernel that a node of the schedule is, or none."""
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return
    extern = node.node if isinstance(node, scheduler.ExternKernelSchedulerNode) else None
    if isinstance(extern, ir.MultiOutput):
        return
    bytes_ = node.get_read_write_buffers_sizes()
    fx = _made_of(extern) if extern is not None else None
    name = str(getattr(fx, "target", "")).removeprefix("aten.").removesuffix(".default")
    kernel = {"kind": "triton", "shape": _size(node), "of": _origin(node, fx), "launches": 1, "bytes": bytes_}
    if extern is None:
        yield kernel | {"seconds": machine.one_pass(bytes_)}
    elif name.split(".")[0] in PRODUCTS:
        *_, a, b = (n.meta["val"] for n in fx.all_input_nodes if n.meta["val"].ndim > 1)
        (*batch, m, k), n = map(int, a.shape), int(b.shape[-1])
        shape = f"{'×'.join(map(str, [*batch, m, k, n]))} {str(a.dtype).removeprefix('torch.')}"
        seconds = max(machine.product(m, k, n, a.dtype, *batch), machine.one_pass(bytes_))
        yield kernel | {"kind": "product", "shape": shape, "seconds": seconds}
    elif "attention" in name:  # all of it, where half is masked
        speed = machine.speed(fx.all_input_nodes[0].meta["val"].dtype)
        seconds = max((node.estimate_flops() or 0) / speed.peak + machine.launch, machine.one_pass(bytes_))
        yield kernel | {"kind": "attention", "shape": name, "seconds": seconds}
    else:
        launches, parts = _parts(fx)
        seconds = machine.one_pass(bytes_ + parts) + (launches - 1) * machine.launch
        yield kernel | {"kind": "op", "shape": name, "launches": launches, "bytes": bytes_ + parts, "seconds": seconds}


def _parts(fx: Any) -> tuple[int, int]:
    """Launches of an op of our own, and the bytes that go from its first kernel to its second."""
    from peft_fx.kernels import triton_narrow

    if fx is None or fx.target not in (narrow.narrow_both, narrow.narrow_in):
        return 1, 0
    us, *args = torch.fx.map_arg(fx.args, lambda n: _on_meta(n.meta["val"]))
    us = [u.view(-1, u.shape[-1]) for u in us]
    if fx.target is narrow.narrow_both:
        factors, counts, _, zs, z_counts, *_ = args
        _, given, _ = triton_narrow.both_arguments(us, factors, counts, zs, z_counts)
        parts = (*given[0], *given[1])
    else:
        outs = list(map(_on_meta, fx.meta["val"]))
        _, given, constants = triton_narrow.in_arguments(outs, us, *args)
        if not constants["SPLIT"]:
            return 1, 0
        parts = given[1]
    return 2, sum(2 * p.nbytes for p in parts)


def _on_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _size(node: Any) -> str:
    group = getattr(node, "group", None)
    return "×".join(str(n) for n in group[1]) if group else ""


def _made_of(extern: Any) -> Any:
    """The node of the graph that a kernel outside the generated code computes."""
    op = getattr(extern, "op_overload", None)
    return extern.get_origin_node() or max((o for o in extern.origins if o.target is op), default=None)


def _origin(node: Any, fx: Any) -> str:
    """The layer of the model that a kernel is of, and what it computes: the ops that most of its nodes come from."""
    origins = [fx] if fx else [o for n in node.get_nodes() if n.node is not None for o in n.node.origins]
    stacks = (o.meta.get("nn_module_stack") or o.meta.get("fwd_nn_module_stack") for o in origins)
    paths = Counter(str(next(reversed(stack.values()))[0]) for stack in stacks if stack)
    layer = paths.most_common(1)[0][0].split("model.")[-1] if paths else ""
    return f"{layer} {', '.join(op for op, _ in Counter(map(_op, origins)).most_common(3))}".strip()


def _op(fx: Any) -> str:
    """The op that a node was traced from."""
    traced = fx.meta.get("original_aten")
    name = traced.name() if hasattr(traced, "name") else fx.name
    return str(name.split("::")[-1].split(".")[0])


# ------------------------------------------------------------------------------------------------------- reporting


def whole(row: Row, what: str) -> float:
    return float(row["forward"][what] + row["backward"][what])


def _grouped(rows: Iterable[Row]) -> dict[Setup, dict[str, Row]]:
    """Rows by setup and variant, the frozen model's first."""
    known = tables.BySetup(rows, "kernels")
    names = ("frozen", *(name for name in VARIANTS if name != "frozen"))
    return {s: {name: row for name in names if (row := known.row(s, name))} for s in known.setups()}


def label(setup: Setup) -> str:
    told = [setup.method if setup.method != "lora" else "", setup.dtype if setup.dtype != "peft" else ""]
    told += [f"dropout {setup.dropout:g}" if setup.dropout else ""]
    return ", ".join([f"T = {setup.tokens * setup.batch}", *filter(None, told)])


def table(rows: Iterable[Row], style: str) -> str:
    lines = []
    for setup, group in _grouped(rows).items():
        for name, row in group.items():
            kinds = Counter(row["forward"]["kinds"]) + Counter(row["backward"]["kinds"])
            counts = [f"{whole(row, 'launches'):.0f}", str(kinds["product"] + kinds["attention"])]
            sides = [f"{row[side]['seconds'] * 1e3:.2f}" for side in ("forward", "backward")]
            beside = [_ratio(row, group.get("frozen"), what) for what in ("bytes", "seconds")]
            faster = _ratio(group.get(name.replace("peft_fx", "inductor")), row, "seconds") if "peft_fx" in name else ""
            size = f"{whole(row, 'bytes') / 1e9:.2f}"
            lines.append([label(setup), name, *counts, size, beside[0], *sides, beside[1], faster])
    head = ["", "", "launches", "products", "GB", "× frozen", "forward, ms", "backward, ms", "× frozen", "faster by"]
    return tables.table(head, lines, style, left=2)


def _ratio(mine: Row | None, other: Row | None, what: str) -> str:
    return f"{whole(mine, what) / whole(other, what):.2f}×" if mine and other else ""


def dearest(args: Namespace, rows: Iterable[Row]) -> Iterator[str]:
    """The kernels of each variant's step that take longest, where a model was named."""
    lines = []
    for setup, name, row in ((s, n, r) for s, group in _grouped(rows).items() for n, r in group.items()):
        both = [(one, side) for side in ("forward", "backward") for one in row[side]["dearest"]]
        for one, side in sorted(both, key=lambda pair: -pair[0]["seconds"])[:DEAREST]:
            what = [one["kind"], one["shape"][:40], one["of"][:60]]
            lines.append([label(setup), name, side, *what, f"{one['bytes'] / 1e6:.0f}", f"{one['seconds'] * 1e6:.0f}"])
    if args.model:
        yield tables.table(["", "", "", "", "shape", "of", "MB", "µs"], lines, "simple", left=6)


def draw(rows: Iterable[Row], path: Path) -> None:
    """Bars of the seconds of a step, × the frozen model's: forward, and backward on top."""
    groups = {s: g for s, g in _grouped(rows).items() if g.keys() >= set(NAMES)}
    figure, axes = bars_of([label(s).replace(", ", "\n") for s in groups], 1.2)
    for i, name in enumerate(NAMES):
        below = [0.0] * len(groups)
        for side, alpha in (("forward", 1.0), ("backward", 0.6)):
            heights = [g[name][side]["seconds"] / whole(g["frozen"], "seconds") for g in groups.values()]
            look = {"label": f"{VARIANTS[name].title}, {side}", "color": COLOURS[name], "alpha": alpha}
            bars(axes, i, len(NAMES), heights, bottom=below, **look)
            below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set_ylabel("a step by the roofline, × the frozen model's")
    figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=8)
    save(figure, path)


_ATTENTIONS = "; ".join(f"{name}: {text}" for name, text in ATTENTION.items())
KERNELS = Experiment(
    name="kernels",
    text=__doc__,
    arguments=(
        *setup_options(NAMES, many=True, device=False, model=None),
        option("--machine", default="h100", choices=MACHINES, metavar="NAME", help="(default: h100)"),
        option("--attention", default="flash", choices=ATTENTION, help=f"{_ATTENTIONS} (default: flash)"),
    ),
    measured=_measured,
    tables={"kernels": table},
    more=dearest,
    page="benchmarks.md",
    figure=draw,
    kinds={"kernels": kernels},
)
