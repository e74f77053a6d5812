"""Nearest or dithered: what the rounding of W' is worth in training, against PEFT's own and fp32.

Fine-tunes a small byte-level Llama, pretrained on the documentation that comes with Python, on the source code that
comes with Python: LoRA on all linear layers from B = 0, AdamW, a constant learning rate. The same steps

  fp32       base and adapters in fp32, in eager mode: the reference
  eager      bf16 base, fp32 adapters, in eager mode: PEFT's defaults
  nearest    the same through peft_fx, every adapter in weight form, W' rounded to nearest
  dithered   the same with W' dithered

By learning rate and form: what of the reference's fall in loss was reached, on text not trained on, in the form itself
("seen") and with its adapters put into the reference ("learned"); and the gain of the delta, the projection of what the
adapted layers' outputs really gain on what they should.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import tables
from bench.experiment import Experiment, Request, Row, Say, Session, option
from bench.experiments.training import BATCH, Form, loss_on_others, model_of, on_bytes, runs_of, study_options, train
from bench.figures import figure_of, save
from zoo.models import setup_of

WEIGHT = {"peft_fx.form": "weight"}
FORMS = {  # by name as the results have it, which know so where our code is in it
    "fp32": Form(colour="#202124"),
    "eager": Form(dtype="peft"),
    "peft_fx nearest": Form(WEIGHT | {"peft_fx.rounding": "nearest"}, dtype="peft", colour="#e8710a"),
    "peft_fx dithered": Form(WEIGHT | {"peft_fx.rounding": "dithered"}, dtype="peft", colour="#1a73e8"),
}
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 5e-4)
SEEDS, STEPS = 4, 200
LOOKED_AT = (5, 20, 50, 100, 150)  # steps
LLAMA = on_bytes(setup_of("llama-256", layers=2, hidden=128, tokens=64, vocab=256, rank=8))
TASK = replace(LLAMA, base=lambda: LLAMA.base().bfloat16().float())  # bf16 numbers, held in fp32


def _measured(args: Namespace, session: Session) -> list[Row]:
    requests = [
        {"kind": "rounding", "variants": [form], "rate": rate, "seed": seed, "steps": args.steps}
        for form in FORMS
        for seed in range(args.seeds)
        for rate in args.rates
    ]
    return session.measure(requests, _trained, only=requests)


def _trained(asked: Request, say: Say) -> Row:
    """One training: the loss by tens of steps, and of some steps the loss on other text, the delta and its gain."""
    form, steps = FORMS[asked["variants"][0]], asked["steps"]
    model, compiled, _ = model_of(TASK, form)
    outputs = _outputs_of(form)

    def look(step: int) -> dict[str, float]:
        found = {"step": step, "loss": loss_on_others(TASK, compiled)}
        return found | (_delta(model, outputs) if step else {})

    losses, looks = train(TASK, form, asked["seed"], steps, asked["rate"], LOOKED_AT, look)
    curve = [round(statistics.mean(losses[i : i + 10]), 5) for i in range(0, steps, 10)]
    return {"losses": curve, "looks": looks, "learned": _learned(model)}


def _layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


@cache
def _outputs_of(form: Form) -> Any:
    """The adapted layers in a form, each called on its own input."""
    layers = nn.ModuleList(_layers(model_of(TASK, form)[0]))

    def outputs(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    return form.compiled(outputs, **{"peft_fx.lowering": "aot_eager"})


def _learned(model: Any) -> float:
    """The loss of the adapters in the reference."""
    reference, _, _ = model_of(TASK, FORMS["fp32"])
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    reference.load_state_dict(trained, strict=False)
    return loss_on_others(TASK, reference)


@torch.no_grad()
def _delta(model: Any, outputs: Any) -> dict[str, float]:
    """‖sAB‖ / ‖W‖ over all layers; and of the outputs' own deltas the projection on the true ones, a multiple of
    these."""
    layers = _layers(model)
    inputs = _inputs(model, layers)
    weights = [m.base_layer.weight for m in layers]
    deltas = [m.get_delta_weight("default").double() for m in layers]
    seen = [y.double() - F.linear(x, w).double() for y, x, w in zip(outputs(inputs), inputs, weights, strict=True)]
    true = [F.linear(x.double(), d) for x, d in zip(inputs, deltas, strict=True)]
    size = sum(d.square().sum() for d in deltas) / sum(w.double().square().sum() for w in weights)
    gain = sum((a * b).sum() for a, b in zip(seen, true, strict=True)) / sum(t.square().sum() for t in true)
    return {"ratio": float(size.sqrt()), "gain": float(gain)}


def _inputs(model: Any, layers: Sequence[nn.Module]) -> list[Tensor]:
    """What the layers read in the model without adapters."""
    found: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: found.update({m: args[0].flatten(0, 1)})) for m in layers]
    ids = torch.cat([batch["input_ids"] for batch in TASK.others()])
    with model.disable_adapter():
        model(input_ids=ids[: 2 * BATCH])
    for hook in hooks:
        hook.remove()
    return [found[m] for m in layers]


# ------------------------------------------------------------------------------------------------ table and figure


def _fall(row: Row) -> float:
    return float(row["looks"][0]["loss"] - row["looks"][-1]["loss"])


COLUMNS = {  # of a row and its reference; falls in loss are parts of the reference's
    "seen": lambda row, reference: _fall(row) / _fall(reference),
    "learned": lambda row, reference: (reference["looks"][0]["loss"] - row["learned"]) / _fall(reference),
    "gain": lambda row, reference: row["looks"][-1]["gain"],
}


def _table(rows: Sequence[Row], style: str) -> str:
    reference, *others = FORMS
    columns = [f"{column}, {form.removeprefix('peft_fx ')}" for column in COLUMNS for form in others]
    lines = []
    for rate in sorted({row["rate"] for row in rows}):
        exact = runs_of(rows, variants=[reference], rate=rate)
        line = [f"{rate:g}", f"{statistics.mean(r['looks'][-1]['ratio'] for r in exact):.1e}"]
        line.append(f"{statistics.mean(map(_fall, exact)):.4f}")
        for column in COLUMNS.values():
            line += [_spread(list(map(column, runs_of(rows, variants=[form], rate=rate), exact))) for form in others]
        lines.append(line)
    return tables.table(["learning rate", "delta / W", "fall in loss, fp32", *columns], lines, style)


def _spread(numbers: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{spread}"


def _draw(rows: Sequence[Row], path: Path) -> None:
    """By learning rate: the loss on other text above, the delta's gain below, against the step."""
    rates = sorted({row["rate"] for row in rows})
    figure, panels = figure_of(2, len(rates), (2.6 * len(rates), 5.2))
    for rate, above, below in zip(rates, *panels, strict=True):
        for name, form in FORMS.items():
            for row in runs_of(rows, variants=[name], rate=rate):
                look: dict[str, Any] = {"color": form.colour, "linewidth": 1, "marker": "."}
                look["label"] = name.removeprefix("peft_fx ") if row["seed"] == 0 else None
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


ROUNDING = Experiment(
    name="rounding",
    text=__doc__,
    arguments=(
        *study_options(SEEDS, STEPS),
        option("--rates", type=float, nargs="+", default=RATES, metavar="LR", help="learning rates"),
    ),
    measured=_measured,
    tables={"rounding": _table},
    page="rounding.md",
    figure=_draw,
    threads=1,  # products this small lose more to a pool of threads than they gain
)
