"""The ways to train that are compared. Each takes the frozen base model, whose weights it may share with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

import peft_fx
from zoo import handwritten
from zoo.models import Setup, precision, with_adapters

FLOORS = ("frozen", "full")  # without adapters: the adapters' settings do not matter to them


@dataclass
class Trainee:
    """A model in training: `model` owns the parameters, `call` is what is called."""

    model: Any
    call: Callable[..., Any]
    setup: Setup
    batch: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[self.setup.optimizer]
        self.optimizer = kind(self.trained, lr=1e-5)

    def loss(self) -> torch.Tensor:
        with precision(self.setup):
            return self.call(**self.batch).loss

    def finish(self) -> None:
        """The rest of a step, after backward: the gradients are gone then."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.loss().backward()
        self.finish()


@dataclass(frozen=True)
class Variant:
    """`prepare` makes the model of the base; `compile` what is called; `plain_lora` says
    that it is written for LoRA without dropout."""

    title: str
    prepare: Callable[[Any, Setup], Any]
    compile: Callable[[Any], Callable[..., Any]]
    plain_lora: bool = False

    @property
    def compiled(self) -> bool:
        return self.compile is not eagerly

    def refuses(self, setup: Setup) -> str:
        """Why this variant cannot be had in a setup, or nothing."""
        return "for LoRA without dropout" if self.plain_lora and (setup.dropout or setup.method != "lora") else ""


def make(name: str, base: Any, setup: Setup, batch: dict[str, torch.Tensor]) -> Trainee:
    """A variant, ready to train on one batch. It compiles at its first step."""
    variant = VARIANTS[name]
    model = variant.prepare(base, setup)
    return Trainee(model, variant.compile(model), setup, batch)


# ----------------------------------------------------------------------------------------------------- preparing


def frozen(base: Any, setup: Setup) -> Any:
    """No adapter, and a gradient down to the embeddings: what the base costs an adapter in the first layer.

    The gradient is of a vector added to the embeddings [T, K]: one of their table [vocab, K] would be a cost that no
    adapter has.
    """
    first = base.get_input_embeddings()
    weight = next(first.parameters())
    tied = [m for m in base.modules() if isinstance(m, torch.nn.Embedding) and m.weight is weight]  # T5 has three
    for embeddings in tied or [first]:
        embeddings.shift = torch.nn.Parameter(torch.zeros(setup.hidden, dtype=weight.dtype, device=weight.device))
        embeddings.register_forward_hook(lambda module, args, output: output + module.shift)
    return base


def full(base: Any, setup: Setup) -> Any:
    """No adapter, every weight trained."""
    return base.requires_grad_(True)


def checkpointed(base: Any, setup: Setup) -> Any:
    """With adapters; each layer keeps its input alone, and is computed again in backward."""
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return with_adapters(base, setup)


def losing(base: Any, setup: Setup) -> Any:
    """With adapters; a step returns its loss alone."""
    return peft_fx.loss_only(with_adapters(base, setup))


class NotRun(Exception):
    """A variant that this machine cannot run; the name stands in its row."""


def liger(base: Any, setup: Setup) -> Any:
    """With adapters, and Liger's fused linear cross entropy patched into the model: a GPU's kernel."""
    if setup.device != "cuda":
        raise NotRun("Liger's kernel needs a GPU")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise NotRun(f"liger-kernel is not installed: {error}") from error
    off = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, model=base, **off)
    return losing(base, setup)


def paper(base: Any, setup: Setup) -> Any:
    """The weight form as published: W + s·A·B by eager autograd, which derives dA and dB from the gradient [K, N]."""
    return handwritten.forward_by(with_adapters(base, setup), handwritten.weight_form)


def autograd_function(base: Any, setup: Setup) -> Any:
    """An autograd function in the manner of fused kernels: see `LowRankLinear`."""
    return handwritten.forward_by(with_adapters(base, setup), handwritten.low_rank_form)


# ----------------------------------------------------------------------------------------------------- compiling


def eagerly(model: Any) -> Any:
    return model


def within(budget: float, backend: Callable[..., Any]) -> Callable[..., Any]:
    """With PyTorch's own budget, a share of what its partitioner would keep. A backend by itself: to a copy of a model
    Dynamo gives the code that an equal backend made."""
    return lambda gm, inputs: functorch_config.patch(activation_memory_budget=budget)(backend)(gm, inputs)


def by_inductor(model: Any, budget: float | None = None) -> Any:
    return torch.compile(model, dynamic=False, backend=within(budget, compile_fx) if budget else "inductor")


def by_peft_fx(model: Any, budget: float | None = None, **options: Any) -> Any:
    """A budget of at most 1 is PyTorch's; others are ours, in bytes of a step."""
    options |= {"memory_budget": int(budget), "memory_budget_of": "step"} if budget and budget > 1 else {}
    ours = {f"peft_fx.{name}": value for name, value in options.items()}
    backend = within(budget, peft_fx.backend) if budget and budget <= 1 else peft_fx.backend
    return torch.compile(model, dynamic=False, backend=backend, options=ours or None)


by_peft_fx_whole = partial(by_peft_fx, chunk_loss=False)  # all the logits at once


class Variants(dict[str, Variant]):
    """By name; after an "@" stands the memory budget of one that has one."""

    def __missing__(self, name: str) -> Variant:
        plain, _, budget = name.partition("@")
        if not budget:
            raise KeyError(name)
        base = self[plain]
        title = f"{base.title}, budget {float(budget):g}"
        return replace(base, title=title, compile=partial(base.compile, budget=float(budget)))


VARIANTS = Variants(
    {
        "eager": Variant("PEFT, eager", with_adapters, eagerly),
        "inductor": Variant("PEFT, Inductor", with_adapters, by_inductor),
        "peft_fx": Variant("PEFT, peft_fx", with_adapters, by_peft_fx),
        "frozen": Variant("no adapter, Inductor", frozen, by_inductor),
        "full": Variant("full fine-tuning, Inductor", full, by_inductor),
        "paper": Variant("weight form, eager", paper, eagerly, plain_lora=True),
        "handwritten": Variant("autograd function, eager", autograd_function, eagerly, plain_lora=True),
        "eager-ckpt": Variant("PEFT, eager, checkpointed", checkpointed, eagerly),
        "inductor-ckpt": Variant("PEFT, Inductor, checkpointed", checkpointed, by_inductor),
        "peft_fx-ckpt": Variant("PEFT, peft_fx, checkpointed", checkpointed, by_peft_fx),
        "inductor-loss": Variant("PEFT, Inductor, loss only", losing, by_inductor),
        "peft_fx-whole-loss": Variant("PEFT, peft_fx, loss only, logits whole", losing, by_peft_fx_whole),
        "peft_fx-loss": Variant("PEFT, peft_fx, loss only", losing, by_peft_fx),
        "liger-loss": Variant("PEFT, Inductor, Liger's loss", liger, by_inductor),
    }
)
LOSSES = tuple(name for name in VARIANTS if name.endswith("-loss"))
WHOLE = tuple(name for name in VARIANTS if name not in LOSSES)  # a step returns the logits too
CHECKPOINTED = tuple(name for name in VARIANTS if name.endswith("-ckpt"))
