"""Small models, pretrained, adapted, and trained in each of several forms: the data, the models and the one loop.

What is trained on comes with Python, as bytes: its documentation, and its source code.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import peft_fx
from bench.experiment import Argument, Row, option
from zoo import models
from zoo.models import Setup

READ = ("argparse", "inspect", "typing", "dataclasses", "ast")
BATCH = 8  # sequences in a step
Batch = dict[str, Tensor]
Call = Callable[..., Any]


@dataclass(frozen=True, eq=False)  # each is itself: models are kept by them
class Task:
    """A pretrained base, batches to fine-tune it on by seed and number, and others to look at; `setup` is LoRA's."""

    setup: Setup
    base: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterable[Batch]]
    others: Callable[[], Sequence[Batch]]
    unit: str = "nats per byte"


@dataclass(frozen=True, eq=False)
class Form:
    """One way to train; `options` are None in eager mode, `trained` is part of the parameters' names, `dtype` that of
    the base and the adapters, a key of `models.DTYPES`."""

    options: Mapping[str, Any] | None = None
    dtype: str = "fp32"
    trained: str = "lora_"
    checkpointed: bool = False
    colour: str = "#9aa0a6"
    rate: float = 2e-3

    def compiled(self, f: Call, **more: Any) -> Call:
        if self.options is None:
            return f
        ours = any(k.startswith("peft_fx.") for k in self.options)
        backend = peft_fx.backend if ours else "inductor"
        return torch.compile(f, backend=backend, options={**self.options, **more} or None)


def study_options(seeds: int, steps: int) -> Iterator[Argument]:
    yield option("--seeds", type=int, default=seeds, metavar="N", help=f"of each (default: {seeds})")
    yield option("--steps", type=int, default=steps, metavar="N", help=f"of each training (default: {steps})")


def runs_of(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The trainings that have these fields, by seed."""
    found = [row for row in rows if all(row.get(k) == v for k, v in fields.items())]
    return sorted(found, key=lambda row: row["seed"])


# ------------------------------------------------------------------------------------------------------------ text


@cache
def _text(of: str) -> Tensor:
    """Python's documentation, or source code, as bytes."""
    if of == "documentation":
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = "\n".join(inspect.getsource(importlib.import_module(name)) for name in READ)
    return torch.tensor(list(text.encode()), dtype=torch.long)


def _sequences(text: Tensor, starts: Tensor, length: int) -> Batch:
    ids = text[starts[:, None] + torch.arange(length)]
    return {"input_ids": ids, "labels": ids}


def batches_of(of: str, seed: int, steps: int, size: int, length: int) -> Iterable[Batch]:
    """Sequences [size, length] from the first nine tenths of a text."""
    text = _text(of)
    text = text[: len(text) * 9 // 10]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield _sequences(text, torch.randint(len(text) - length, (size,), generator=generator), length)


@cache
def others_of(of: str, length: int) -> Sequence[Batch]:
    """64 sequences spread over the last tenth."""
    text = _text(of)
    starts = torch.linspace(len(text) * 9 // 10, len(text) - length, 64).long()
    return [_sequences(text, some, length) for some in starts.split(BATCH)]


def pretrained(model: nn.Module, batches: Iterable[Batch], steps: int) -> nn.Module:
    """All of it trained, then frozen."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model.requires_grad_(False)


def on_bytes(setup: Setup, change: Callable[[Any], Any] = lambda model: None, steps: int = 600) -> Task:
    """A base pretrained on the documentation, to be fine-tuned on the source code; `change` comes before."""

    @cache
    def base() -> nn.Module:
        model = models.make_base(replace(setup, dtype="fp32"))
        change(model)
        return pretrained(model, batches_of("documentation", 0, steps, 2 * BATCH, setup.tokens), steps)

    def batches(seed: int, steps: int) -> Iterable[Batch]:
        return batches_of("source", seed, steps, BATCH, setup.tokens)

    return Task(setup, base, batches, lambda: others_of("source", setup.tokens))


# -------------------------------------------------------------------------------------------------------- training


@cache
def model_of(task: Task, form: Form) -> tuple[Any, Call, dict[str, Tensor]]:
    """The adapted model, the model as it is trained, and what its parameters start from."""
    base = copy.deepcopy(task.base()).to(torch.float32 if form.dtype == "fp32" else torch.bfloat16)
    model = models.with_adapters(base, replace(task.setup, dtype=form.dtype)) if form.trained else base
    if form.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, p in model.named_parameters():
        p.requires_grad_(form.trained in name)
    return model, form.compiled(model), {name: p.detach().clone() for name, p in model.named_parameters()}


def train(task: Task, form: Form, seed: int, steps: int, rate: float, looked_at: Iterable[int], look: Call) -> Any:
    """The losses of one training with AdamW at a constant rate, and what `look` says after each of some steps."""
    model, compiled, start = model_of(task, form)
    model.load_state_dict(start, strict=False)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:  # as PEFT starts them, of one seed the same in every form
                p.uniform_(-1, 1, generator=generator).mul_(p.shape[1] ** -0.5)
            elif "lora_B" in name:
                p.zero_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses, looks = [], [look(0)]
    for step, batch in enumerate(task.batches(seed, steps), 1):
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if step in looked_at or step == steps:
            looks.append(look(step))
    return losses, looks


def loss_on_others(task: Task, call: Call) -> float:
    """With gradients, so that the graph that is trained is the one looked at."""
    return statistics.mean(call(**batch).loss.item() for batch in task.others())
