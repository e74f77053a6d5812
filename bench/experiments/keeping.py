"""LoRA-FA and lossy keeps in training, against exact LoRA and full fine-tuning.

Fine-tunes two small models whose MLPs have a ReLU and whose attention is written out, so that the frozen model's
backward has no use for the inputs of the MLPs' second layers nor for those of the attentions' last: what their adapters
read is all that lossy keeps can act on.

  bytes    a byte-level OPT, pretrained on Python's documentation, on Python's source code
  digits   a ViT, pretrained on scikit-learn's digits, on the same digits with rows and columns exchanged

LoRA of rank 8 on all linear layers in fp32, AdamW, a constant learning rate: exact, with A frozen (LoRA-FA), and with
each lossy keep; and full fine-tuning. Of each the loss on data not trained on, bytes kept and at the peak of a step,
and its time.
"""

from __future__ import annotations

import importlib.util
import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import tables
from bench.experiment import Experiment, Request, Row, Say, Session
from bench.experiments import training
from bench.experiments.training import Batch, Call, Form, Task, model_of
from bench.figures import figure_of, save
from peft_fx import measuring
from zoo.architectures import made
from zoo.models import setup_of


def _ours(keep: str, **more: Any) -> dict[str, Any]:
    return {"peft_fx.form": "weight", "peft_fx.keep": keep, **{f"peft_fx.{k}": v for k, v in more.items()}}


TRAINED = {
    "full": Form({}, trained="", colour="#a142f4", rate=5e-4),
    "peft_fx lora": Form(_ours("recompute"), colour="#202124"),
    "peft_fx lora-fa": Form(_ours("recompute"), trained="lora_B", colour="#12a4af"),
    "peft_fx velora": Form(_ours("velora"), colour="#e8710a"),
    "peft_fx int8": Form(_ours("int8"), colour="#1a73e8"),
    "peft_fx int4": Form(_ours("int4"), colour="#d93025"),
    "peft_fx int4, stochastic": Form(_ours("int4", keep_rounding="stochastic"), colour="#f9ab00"),
    "peft_fx fp8": Form(_ours("fp8"), colour="#188038"),
}
FORMS = {  # the first three learn what exact LoRA does
    "lora, eager": Form(),
    "lora, Inductor": Form({}),
    "lora, Inductor, checkpointed": Form({}, checkpointed=True),
    **TRAINED,
}
SEEDS, STEPS, LOOKS = 3, 200, 20

# ----------------------------------------------------------------------------------------------------------- tasks

BYTES = setup_of("opt", layers=2, hidden=128, tokens=64, vocab=256, rank=8)


@cache
def _images() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    return pixels, torch.tensor(digits.target)[order]


def _digits(seed: int, steps: int, turned: bool = True) -> Iterator[Batch]:
    pixels, labels = (t[:-360] for t in _images())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(labels), (60,), generator=generator)
        yield {"pixel_values": pixels[at].mT.contiguous() if turned else pixels[at], "labels": labels[at]}


def _other_digits() -> Sequence[Batch]:
    batches = zip(*(t[-360:].split(60) for t in _images()), strict=True)
    return [{"pixel_values": pixels.mT.contiguous(), "labels": labels} for pixels, labels in batches]


@cache
def _vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden": 64, "ffn": 256, "layers": 2, "heads": 4}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    model = made("ViTForImageClassification", sizes, **images, hidden_act="relu").train()
    model.set_attn_implementation("eager")
    return training.pretrained(model, _digits(0, 400, turned=False), 400)


TASKS = {
    "bytes": training.on_bytes(BYTES, lambda model: model.set_attn_implementation("eager")),
    "digits": Task(BYTES, _vit, _digits, _other_digits, "nats per image"),
}

# -------------------------------------------------------------------------------------------------------- measuring


def _measured(args: Namespace, session: Session) -> list[Row]:
    torch._dynamo.config.recompile_limit = 64
    requests: list[dict[str, Any]] = []
    for task in TASKS:
        requests.append({"kind": "keep-cost", "variants": list(FORMS), "task": task})
        for form in TRAINED:
            trainings = {"kind": "keep", "variants": [form], "task": task, "steps": args.steps}
            requests += [trainings | {"seed": seed} for seed in range(args.seeds)]
    missing = [] if importlib.util.find_spec("sklearn") else ["digits"]
    if missing:
        print("scikit-learn is not installed: without the digits")
    return session.measure((r for r in requests if r["task"] not in missing), _answer, only=requests)


def _answer(asked: Request, say: Say) -> Row:
    task = TASKS[asked["task"]]
    if asked["kind"] == "keep-cost":
        return {"costs": _costs(task)}
    form = FORMS[asked["variants"][0]]
    _, compiled, _ = model_of(task, form)

    def look(step: int) -> list[float]:
        return [step, training.loss_on_others(task, compiled)]

    steps, rate = asked["steps"], form.rate
    losses, looks = training.train(task, form, asked["seed"], steps, rate, range(0, steps, LOOKS), look)
    return {"losses": [round(n, 5) for n in losses], "looks": looks}


def _costs(task: Task) -> dict[str, dict[str, float]]:
    """Bytes kept and at the peak, and seconds of a step, of every form; the forms take turns."""
    (batch,) = task.batches(0, 1)
    device, steps, found = torch.device("cpu"), {}, {}
    for name, form in FORMS.items():
        model, compiled, _ = model_of(task, form)
        forward = partial(_loss, compiled, batch)
        clear = partial(model.zero_grad, set_to_none=True)
        memory = measuring.memory_of(forward, clear, device)
        steps[name], found[name] = partial(_step, forward, clear), {"kept": memory.kept, "peak": memory.peak}
    for name, seconds in measuring.median_times(steps, device, rounds=15).items():
        found[name]["seconds"] = seconds
    return found


def _loss(call: Call, batch: Batch) -> Tensor:
    return call(**batch).loss


def _step(forward: Call, clear: Call) -> None:
    forward().backward()
    clear()


# ------------------------------------------------------------------------------------------------ table and figure


def _table(rows: Sequence[Row], style: str) -> str:
    lines = []
    for row in (r for r in rows if r["kind"] == "keep-cost"):
        ends = {
            form: [r["looks"][-1][1] for r in training.runs_of(rows, kind="keep", task=row["task"], variants=[form])]
            for form in FORMS
        }
        exact = ends["peft_fx lora"]
        for form, cost in row["costs"].items():
            line, mine = [row["task"], form, "", ""], ends[form]
            if mine and len(mine) == len(exact):
                spread = statistics.stdev(mine) if len(mine) > 1 else 0.0
                ratio = statistics.mean(a / b for a, b in zip(mine, exact, strict=True))
                line[2:] = [f"{statistics.mean(mine):.4f} ± {spread:.4f}", f"{ratio:.3f}"]
            megabytes = [f"{cost[k] / 1e6:.3f}" for k in ("kept", "peak")]
            lines.append([*line, *megabytes, f"{1e3 * cost['seconds']:.1f}"])
    head = ["task", "", "loss on other data", "× LoRA's", "kept, MB", "peak, MB", "step, ms"]
    return tables.table(head, lines, style, left=2)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Of each task the loss on other data against the step, mean and range of the seeds; and bytes kept beside it."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["kind"] == "keep"))
    figure, panels = figure_of(len(tasks), 2, (9, 3.2 * len(tasks)))
    for task, (curves, bars) in zip(tasks, panels, strict=True):
        for form in TRAINED:
            looks = [r["looks"] for r in training.runs_of(rows, kind="keep", task=task, variants=[form])]
            steps = [s for s, _ in looks[0]] if looks else []
            losses = [[look[i][1] for look in looks] for i in range(len(steps))]
            look = {"color": FORMS[form].colour, "linewidth": 1.2, "label": form.removeprefix("peft_fx ")}
            curves.plot(steps, list(map(statistics.mean, losses)), **look)
            low, high = list(map(min, losses)), list(map(max, losses))
            curves.fill_between(steps, low, high, color=FORMS[form].colour, alpha=0.12)
        (costs,) = (r["costs"] for r in rows if r["kind"] == "keep-cost" and r["task"] == task)
        names = [n for n in costs if n != "full"]
        bars.barh(
            [n.removeprefix("peft_fx ") for n in names],
            [costs[n]["kept"] / 1e6 for n in names],
            color=[FORMS[n].colour for n in names],
        )
        bars.invert_yaxis()
        bars.tick_params(labelsize=7)
        bars.set_xlabel("kept for backward, MB")
        curves.set_ylabel(f"{task}: loss on other data, {TASKS[task].unit}", fontsize=8)
        curves.set_xlabel("step")
    panels[0][0].legend(frameon=False, fontsize=7)
    save(figure, path)


KEEP = Experiment(
    name="keep",
    text=__doc__,
    arguments=[*training.study_options(SEEDS, STEPS)],
    measured=_measured,
    tables={"keep": _table},
    page="keep-policies.md",
    figure=_draw,
    threads=1,
)
