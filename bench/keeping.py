"""`python -m bench study keep`: LoRA-FA and lossy keeps in training, against exact LoRA and full fine-tuning."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_fx
from bench import models, tables
from bench.corpus import batches_of, parts
from bench.models import setup_of
from bench.report import figure_of, publish, save
from bench.results import FOLDER, ROOT, Results
from bench.running import Request, measure_here
from peft_fx import measuring

STUDY = """\
Fine-tunes two small models whose MLPs have a ReLU and whose attention is written out, so that the frozen model's
backward has no use for the inputs of the MLPs' second layers nor for those of the attentions' last: what their adapters
read is all that lossy keeps can act on.

  bytes    a byte-level OPT, pretrained on Python's documentation, on Python's source code
  digits   a ViT, pretrained on scikit-learn's digits, on the same digits with rows and columns exchanged

LoRA of rank 8 on all linear layers in fp32, AdamW, a constant learning rate: exact, with A frozen (LoRA-FA), and with
each lossy keep; and full fine-tuning. Of each the loss on data not trained on, bytes kept and at the peak of a step,
and its time. Writes bench/results/keep.json and keep.png, and the table of docs/keep-policies.md.
"""

Options = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One way to train; `options` are None in eager mode, `trained` is part of the parameters' names."""

    options: Options | None
    trained: str = "lora_"
    checkpointed: bool = False
    colour: str = "#9aa0a6"
    rate: float = 2e-3

    @property
    def backend(self) -> Any:
        return peft_fx.backend if any(k.startswith("peft_fx.") for k in self.options or {}) else "inductor"


def _ours(keep: str, **more: Any) -> Options:
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
    "lora, eager": Form(None),
    "lora, Inductor": Form({}),
    "lora, Inductor, checkpointed": Form({}, checkpointed=True),
    **TRAINED,
}
SEEDS, STEPS, LOOKS = 3, 200, 20
PAGE = ROOT.parent / "docs" / "keep-policies.md"
Batch = dict[str, Tensor]


# ----------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """A pretrained base, batches to fine-tune it on by seed and number, and others to look at."""

    base: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterable[Batch]]
    others: Callable[[], Sequence[Batch]]
    what: str


BYTES = setup_of("opt", layers=2, hidden=128, tokens=64, vocab=256, rank=8)
BATCH = 8


def _labelled(ids: Tensor) -> Batch:
    return {"input_ids": ids, "labels": ids}


@cache
def _opt() -> nn.Module:
    model = models.make_base(replace(BYTES, dtype="fp32"))
    return _pretrained(model, map(_labelled, batches_of("documentation", 0, 600, 2 * BATCH, BYTES.tokens)), 600)


def _bytes(seed: int, steps: int) -> Iterable[Batch]:
    return map(_labelled, batches_of("source", seed, steps, BATCH, BYTES.tokens))


def _other_bytes() -> Sequence[Batch]:
    return [_labelled(ids) for ids in parts("source", BYTES.tokens)[1].split(BATCH)]


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
    pixels, labels = (t[-360:] for t in _images())
    return [
        {"pixel_values": p.mT.contiguous(), "labels": n}
        for p, n in zip(pixels.split(60), labels.split(60), strict=True)
    ]


@cache
def _vit() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(
        **sizes,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _pretrained(transformers.ViTForImageClassification(config).train(), _digits(0, 400, turned=False), 400)


def _pretrained(model: nn.Module, batches: Iterable[Batch], steps: int) -> nn.Module:
    model.set_attn_implementation("eager")  # type: ignore[operator]
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model.requires_grad_(False)


TASKS = {
    "bytes": Task(_opt, _bytes, _other_bytes, "nats per byte"),
    "digits": Task(_vit, _digits, _other_digits, "nats per image"),
}


# -------------------------------------------------------------------------------------------------------- training


@cache
def _model(task: str, form: str) -> tuple[nn.Module, Callable[..., Any], dict[str, Tensor]]:
    """The adapted model, the model as it is trained, and what its parameters start from."""
    chosen, model = FORMS[form], copy.deepcopy(TASKS[task].base())
    if chosen.trained:
        model = models.with_adapters(model, replace(BYTES, dtype="fp32"))
    if chosen.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for name, p in model.named_parameters():
        p.requires_grad_(chosen.trained in name)
    compiled = (
        model
        if chosen.options is None
        else torch.compile(model, backend=chosen.backend, options=chosen.options or None)
    )
    return model, compiled, {name: p.detach().clone() for name, p in model.named_parameters()}


def _trained(task: str, form: str, seed: int, steps: int) -> dict[str, Any]:
    """The losses of one training, by step, and those on other data, each LOOKS steps."""
    model, compiled, start = _model(task, form)
    model.load_state_dict(start, strict=False)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:  # as PEFT starts them, of one seed the same in every form
                p.uniform_(-1, 1, generator=generator).mul_(p.shape[1] ** -0.5)
            elif "lora_B" in name:
                p.zero_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=FORMS[form].rate, weight_decay=0.0)
    losses, looks = [], [[0, _other(task, compiled)]]
    for step, batch in enumerate(TASKS[task].batches(seed, steps), 1):
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if step % LOOKS == 0 or step == steps:
            looks.append([step, _other(task, compiled)])
    return {"losses": [round(n, 5) for n in losses], "looks": looks}


def _other(task: str, compiled: Callable[..., Any]) -> float:
    """With gradients, so that the graph that is trained is the one looked at."""
    return statistics.mean(compiled(**batch).loss.item() for batch in TASKS[task].others())


def _costs(task: str) -> dict[str, dict[str, float]]:
    """Bytes kept and at the peak, and seconds of a step, of every form; the forms take turns."""
    batch = next(iter(TASKS[task].batches(0, 1)))
    device, steps, found = torch.device("cpu"), {}, {}
    for form in FORMS:
        model, compiled, _ = _model(task, form)

        def forward(compiled: Callable[..., Any] = compiled) -> Tensor:
            return compiled(**batch).loss  # type: ignore[no-any-return]

        def clear(model: nn.Module = model) -> None:
            model.zero_grad(set_to_none=True)

        def step(forward: Callable[[], Tensor] = forward, clear: Callable[[], None] = clear) -> None:
            forward().backward()  # type: ignore[no-untyped-call]
            clear()

        memory = measuring.memory_of(forward, clear, device)
        steps[form], found[form] = step, {"kept": memory.kept, "peak": memory.peak}
    for form, seconds in measuring.median_times(steps, device, rounds=15).items():
        found[form]["seconds"] = seconds
    return found


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    results = Results(args.output or FOLDER / "keep.json", "cpu")
    known = [task for task in TASKS if task != "digits" or importlib.util.find_spec("sklearn")]
    if len(known) < len(TASKS):
        print("scikit-learn is not installed: without the digits")
    seeds, steps = args.seeds or SEEDS, args.steps or STEPS
    requests: list[dict[str, Any]] = []
    for task in known:
        requests.append({"kind": "keep-cost", "variants": list(FORMS), "task": task})
        for form in TRAINED:
            trainings = {"kind": "keep", "variants": [form], "task": task, "steps": steps}
            requests += [trainings | {"seed": seed} for seed in range(seeds)]
    if len(known) == len(TASKS):
        results.keep_only(requests)
    measure_here(requests, results, _measured, _described, again=not args.resume)
    print(_table(results.rows, "simple"))
    if args.output is None:
        _draw(results.rows, FOLDER / "keep.png")
        publish(PAGE, "keep", _table(results.rows, "github"), results)
    return 0


def _measured(asked: Request) -> dict[str, Any]:
    if asked["kind"] == "keep-cost":
        return {"costs": _costs(asked["task"])}
    return _trained(asked["task"], asked["variants"][0], asked["seed"], asked["steps"])


def _described(asked: Request) -> str:
    costs = asked["kind"] == "keep-cost"
    return f"{asked['task']}, {'costs' if costs else '{}, seed {}'.format(asked['variants'][0], asked['seed'])}"


# ------------------------------------------------------------------------------------------------ table and figure

Row = dict[str, Any]


def _ends(rows: Iterable[Row], task: str, form: str) -> list[float]:
    found = [r for r in rows if r["kind"] == "keep" and r["task"] == task and r["variants"] == [form]]
    return [r["looks"][-1][1] for r in sorted(found, key=lambda r: r["seed"])]


def _table(rows: Sequence[Row], style: str) -> str:
    head = ["task", "", "loss on other data", "× LoRA's", "kept, MB", "peak, MB", "step, ms"]
    lines = []
    for row in (r for r in rows if r["kind"] == "keep-cost"):
        task, exact = row["task"], _ends(rows, row["task"], "peft_fx lora")
        for form, cost in row["costs"].items():
            ends = _ends(rows, task, form)
            line = [task, form, "", ""]
            if ends and len(ends) == len(exact):
                spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
                ratio = statistics.mean(a / b for a, b in zip(ends, exact, strict=True))
                line[2:] = [f"{statistics.mean(ends):.4f} ± {spread:.4f}", f"{ratio:.3f}"]
            megabytes = [f"{cost[k] / 1e6:.3f}" for k in ("kept", "peak")]
            lines.append([*line, *megabytes, f"{1e3 * cost['seconds']:.1f}"])
    return tables.table(head, lines, style, left=2)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Of each task the loss on other data against the step, mean and range of the seeds; and bytes kept beside it."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["kind"] == "keep"))
    figure, panels = figure_of(len(tasks), 2, (9, 3.2 * len(tasks)))
    for task, (curves, bars) in zip(tasks, panels, strict=True):
        for form in TRAINED:
            looks = [r["looks"] for r in rows if r["kind"] == "keep" and (r["task"], r["variants"]) == (task, [form])]
            steps = [s for s, _ in looks[0]] if looks else []
            losses = [[look[i][1] for look in looks] for i in range(len(steps))]
            colour = FORMS[form].colour
            label = form.removeprefix("peft_fx ")
            curves.plot(steps, list(map(statistics.mean, losses)), color=colour, linewidth=1.2, label=label)
            curves.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.12)
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
        curves.set_ylabel(f"{task}: loss on other data, {TASKS[task].what}", fontsize=8)
        curves.set_xlabel("step")
    panels[0][0].legend(frameon=False, fontsize=7)
    save(figure, path)
