"""`python -m bench study rounding`: what the rounding of W' is worth in training, against PEFT's own and fp32."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_fx
from bench import keeping, models, tables
from bench.corpus import batches_of, parts
from bench.models import setup_of
from bench.report import figure_of, publish, save
from bench.results import FOLDER, ROOT, Results
from bench.running import measure_here

STUDY = """\
Fine-tunes a small byte-level Llama, pretrained on the documentation that comes with Python, on the source code that
comes with Python: LoRA on all linear layers from B = 0, AdamW, a constant learning rate. The same steps

  fp32       base and adapters in fp32, in eager mode: the reference
  eager      bf16 base, fp32 adapters, in eager mode: PEFT's defaults
  nearest    the same through peft_fx, every adapter in weight form, W' rounded to nearest
  dithered   the same with W' dithered

By learning rate and form: what of the reference's fall in loss was reached, on text not trained on, in the form itself
("seen") and with its adapters put into the reference ("learned"); and the gain of the delta, the projection of what the
adapted layers' outputs really gain on what they should. Writes bench/results/rounding.json and rounding.png, and the
table of docs/rounding.md.
"""

FORMS = ("fp32", "eager", "nearest", "dithered")
COLOURS = dict(zip(FORMS, ("#202124", "#9aa0a6", "#e8710a", "#1a73e8"), strict=True))
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 5e-4)
SEEDS = 4
STEPS, BATCH, LENGTH = 200, 8, 64  # of fine-tuning; sequences in a step, and their bytes
PRETRAINING = 600
LOOKED_AT = (5, 20, 50, 100, 150)  # steps
PAGE = ROOT.parent / "docs" / "rounding.md"


def add_command(commands: Any) -> None:
    """Adds `study` to the sub-commands of an argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    study = commands.add_parser(
        "study",
        help="what rounding, and lossy keeps, do to training",
        description=f"rounding: {STUDY}\nkeep: {keeping.STUDY}",
        formatter_class=formatter,
    )
    study.add_argument("study", choices=STUDIES)
    seeds = f"of each (default: {SEEDS}; keep: {keeping.SEEDS})"
    study.add_argument("--seeds", type=int, metavar="N", help=seeds)
    study.add_argument("--steps", type=int, metavar="N", help=f"of each training (default: {STEPS})")
    study.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="LR", help="learning rates of rounding")
    study.add_argument("--resume", action="store_true", help="keep what was measured before on the same device")
    study.add_argument("--output", type=Path, metavar="FILE", help="(default: in bench/results)")
    study.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return STUDIES[args.study](args)


def _rounding(args: argparse.Namespace) -> int:
    args.seeds, args.steps = args.seeds or SEEDS, args.steps or STEPS
    torch.set_num_threads(1)  # products this small lose more to a pool of threads than they gain
    results = Results(args.output or FOLDER / "rounding.json", "cpu")
    requests = [
        {"kind": "rounding", "variants": [_variant(form)], "rate": rate, "seed": seed, "steps": args.steps}
        for form in FORMS
        for seed in range(args.seeds)
        for rate in args.rates
    ]
    results.keep_only(requests)
    measure_here(
        requests,
        results,
        lambda r: _trained(_form(r), r["rate"], r["seed"], r["steps"]),
        lambda r: f"{_form(r)}, learning rate {r['rate']:g}, seed {r['seed']}",
        again=not args.resume,
    )
    print(_table(results.rows, "simple"))
    if args.output is None:
        _draw(results.rows, FOLDER / "rounding.png")
        publish(PAGE, "rounding", _table(results.rows, "github"), results)
    return 0


def _variant(form: str) -> str:
    """As the results know that our code is in it."""
    return f"peft_fx {form}" if form in ("nearest", "dithered") else form


STUDIES: dict[str, Callable[[argparse.Namespace], int]] = {"rounding": _rounding, "keep": keeping.run}


# ------------------------------------------------------------------------------------------------------- training


def _parts(of: str) -> tuple[Tensor, Tensor]:
    return parts(of, LENGTH)


def _batches(of: str, seed: int, steps: int, size: int) -> Iterable[Tensor]:
    return batches_of(of, seed, steps, size, LENGTH)


def _loss(model: Callable[..., Any], ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


SETUP = setup_of("llama-256", layers=2, hidden=128, tokens=LENGTH, vocab=256, rank=8)


@cache
def _pretrained() -> nn.Module:
    """The base, which every form starts from: bf16 numbers, held in fp32."""
    torch.manual_seed(0)
    model = models.make_base(replace(SETUP, dtype="fp32")).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING)
    for ids in _batches("documentation", 0, PRETRAINING, 2 * BATCH):
        _loss(model, ids).backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model.bfloat16().float().requires_grad_(False)


@cache
def _model(form: str) -> tuple[nn.Module, Callable[..., Any], Callable[..., Any]]:
    """The adapted model, the model as it is trained, and its adapted layers, each called on its own input."""
    dtype = "fp32" if form == "fp32" else "peft"
    base = copy.deepcopy(_pretrained()).to(torch.float32 if form == "fp32" else torch.bfloat16)
    model = models.with_adapters(base, replace(SETUP, dtype=dtype))
    layers = nn.ModuleList(m for m in model.modules() if hasattr(m, "lora_A"))

    def outputs(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    if form in ("fp32", "eager"):
        return model, model, outputs
    options = {"peft_fx.form": "weight", "peft_fx.rounding": form}
    compiled = partial(torch.compile, backend=peft_fx.backend)
    return (
        model,
        compiled(model, options=options),
        compiled(outputs, options=options | {"peft_fx.lowering": "aot_eager"}),
    )


def _trained(form: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One training: the loss at each tenth step, and of some steps the loss on other text, the delta and its gain."""
    model, compiled, outputs = _model(form)
    _start(model, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses, looks = [], [{"step": 0, "loss": _held_out(compiled)}]
    for step, ids in enumerate(_batches("source", seed, steps, BATCH), 1):
        loss = _loss(compiled, ids)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if step in LOOKED_AT or step == steps:
            looks.append({"step": step, "loss": _held_out(compiled), **_delta(model, outputs)})
    curve = [round(statistics.mean(losses[i : i + 10]), 5) for i in range(0, steps, 10)]
    return {"losses": curve, "looks": looks, "learned": _learned(model)}


@torch.no_grad()
def _start(model: nn.Module, seed: int) -> None:
    """Adapters as PEFT starts them: A uniform, B = 0; of one seed the same in every form."""
    generator = torch.Generator().manual_seed(100 + seed)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(p.shape[1]))
        elif "lora_B" in name:
            p.zero_()


def _held_out(compiled: Callable[..., Any]) -> float:
    """With gradients, so that the graph that is trained is the one looked at."""
    _, ids = _parts("source")
    return statistics.mean(_loss(compiled, part).item() for part in ids.split(BATCH))


def _learned(model: nn.Module) -> float:
    """The loss of the adapters in the reference."""
    reference, _, _ = _model("fp32")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reference.load_state_dict({name: p.detach().clone() for name, p in trained.items()}, strict=False)
    return _held_out(reference)


@torch.no_grad()
def _delta(model: nn.Module, outputs: Callable[..., Any]) -> dict[str, float]:
    """‖sAB‖ / ‖W‖ over all layers; and of the outputs' own deltas the projection on the true ones, a multiple of
    these."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    inputs = _inputs(model, layers)
    weights = [m.base_layer.weight for m in layers]
    deltas = [m.get_delta_weight("default").double() for m in layers]
    seen = [y.double() - F.linear(x, w).double() for y, x, w in zip(outputs(inputs), inputs, weights, strict=True)]
    true = [F.linear(x.double(), d) for x, d in zip(inputs, deltas, strict=True)]
    size = sum(d.square().sum() for d in deltas) / sum(w.double().square().sum() for w in weights)
    gain = sum((a * b).sum() for a, b in zip(seen, true, strict=True)) / sum(t.square().sum() for t in true)
    return {"ratio": float(size.sqrt()), "gain": float(gain)}


def _inputs(model: nn.Module, layers: Sequence[nn.Module]) -> list[Tensor]:
    """What the layers read in the model without adapters."""
    found: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: found.update({m: args[0].flatten(0, 1)})) for m in layers]
    _, ids = _parts("source")
    with model.disable_adapter():
        model(input_ids=ids[: 2 * BATCH])
    for hook in hooks:
        hook.remove()
    return [found[m] for m in layers]


# ------------------------------------------------------------------------------------------------ table and figure


Row = dict[str, Any]


def _form(row: Row) -> str:
    return str(row["variants"][0].rpartition(" ")[2])


def _runs(rows: Iterable[Row], form: str, rate: float) -> list[Row]:
    return sorted((r for r in rows if _form(r) == form and r["rate"] == rate), key=lambda r: r["seed"])


def _rates(rows: Iterable[Row]) -> list[float]:
    return sorted({row["rate"] for row in rows})


def _seen(row: Row, reference: Row) -> float:
    """The fall in loss, as a part of the reference's."""
    return _fall(row) / _fall(reference)


def _learned_of(row: Row, reference: Row) -> float:
    return float(reference["looks"][0]["loss"] - row["learned"]) / _fall(reference)


def _gain(row: Row, reference: Row) -> float:
    return float(row["looks"][-1]["gain"])


def _fall(row: Row) -> float:
    return float(row["looks"][0]["loss"] - row["looks"][-1]["loss"])


COLUMNS = {"seen": _seen, "learned": _learned_of, "gain": _gain}


def _table(rows: Sequence[Row], style: str) -> str:
    head = ["learning rate", "delta / W", "fall in loss, fp32", *(f"{c}, {f}" for c in COLUMNS for f in FORMS[1:])]
    lines = []
    for rate in _rates(rows):
        reference = _runs(rows, "fp32", rate)
        line = [f"{rate:g}", f"{statistics.mean(r['looks'][-1]['ratio'] for r in reference):.1e}"]
        line.append(f"{statistics.mean(map(_fall, reference)):.4f}")
        for column in COLUMNS.values():
            line += [_spread(list(map(column, _runs(rows, form, rate), reference))) for form in FORMS[1:]]
        lines.append(line)
    return tables.table(head, lines, style)


def _spread(numbers: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{spread}"


def _draw(rows: Sequence[Row], path: Path) -> None:
    """By learning rate: the loss on other text above, the delta's gain below, against the step."""
    rates = _rates(rows)
    figure, panels = figure_of(2, len(rates), (2.6 * len(rates), 5.2))
    for rate, above, below in zip(rates, *panels, strict=True):
        for form in FORMS:
            for row in _runs(rows, form, rate):
                look: dict[str, Any] = {"color": COLOURS[form], "linewidth": 1, "marker": "."}
                look["label"] = form if row["seed"] == 0 else None
                steps = [at["step"] for at in row["looks"]]
                above.plot(steps, [at["loss"] for at in row["looks"]], **look)
                below.plot(steps[1:], [at["gain"] for at in row["looks"][1:]], **look)
        above.set_title(f"learning rate {rate:g}", fontsize=9)
        below.set_ylim(-0.1, 1.3)
        below.set_xlabel("step")
    panels[0][0].set_ylabel("loss on other text, nats per byte")
    panels[1][0].set_ylabel("gain of the delta")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=len(FORMS))
    save(figure, path)
