"""`python -m peft_fx demo`: a small Llama with PEFT LoRA, trained three ways from the same start."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import peft_fx
from peft_fx.configs import positive
from peft_fx.measuring import Memory, median_times, memory_of
from peft_fx.options import CHOICES
from peft_fx.terminal import Problem, require, silence_others

EAGER, INDUCTOR, OURS, FROZEN = "PEFT, eager", "PEFT, Inductor", "PEFT, peft_fx", "no adapters, Inductor"
ROUNDS = 9  # of timed steps
ROWS = 8  # of the table of losses

DESCRIPTION = """\
Builds a small Llama from its config (random bfloat16 weights, nothing is downloaded), puts PEFT's LoRA on every
linear layer, and trains the adapters on the text of Python's own help pages, byte by byte: in eager mode, through
Inductor, and through peft_fx, from the same start on the same batches.

It prints the three loss curves; the form chosen for each adapter, and why; and what a training step costs in each
case, beside the same model without any adapter.

  kept   bytes that forward leaves for backward
  peak   most bytes allocated at one time during a step, on top of the weights
  step   median time of forward and backward, the variants taking turns

Compiling needs a C++ compiler, and is most of the demo's time: one to three minutes at the default size.
"""
EPILOG = """\
examples:
  python -m peft_fx demo                                the default: 2 layers, 512 tokens
  python -m peft_fx demo --tokens 2048 --layers 4       more tokens: more of a difference
  python -m peft_fx demo --tokens 64                    few tokens: adapters stay as they are written
  python -m peft_fx demo --tokens 64 --form weight      all the same in weight form, and what that costs

exit status: 0; 2 where a package or a compiler is missing
"""


@dataclass(frozen=True)
class Variant:
    """One way to run the model: `model` owns the parameters, `call` is what is called."""

    model: Any
    call: Callable[..., Any]

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each of `ids` [1, T] from those before it."""
        loss: torch.Tensor = self.call(input_ids=ids, labels=ids).loss
        return loss

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, ids: torch.Tensor) -> None:
        self.loss(ids).backward()  # type: ignore[no-untyped-call]
        self.clear()


# ----------------------------------------------------------------------------------------------- command line


def add_command(commands: Any) -> None:
    """Adds `demo` to the sub-commands of an argument parser."""
    demo = commands.add_parser(
        "demo",
        help="train a small Llama with PEFT LoRA in eager and rewritten form, and compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, text in (
        ("steps", 30, "training steps"),
        ("layers", 2, "layers of the model"),
        ("hidden", 256, "width of the model, a multiple of 64"),
        ("tokens", 512, "tokens in a step; where they are few, adapters stay as written"),
        ("rank", 16, "rank of the adapters"),
    ):
        check = _width if name == "hidden" else positive
        demo.add_argument(f"--{name}", type=check, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    form_help = "form of the adapters; auto lets the price decide (default: %(default)s)"
    demo.add_argument("--form", choices=CHOICES["form"], default="auto", help=form_help)
    demo.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    demo.set_defaults(run=run)


def _width(text: str) -> int:
    if positive(text) % 64:
        raise argparse.ArgumentTypeError(f"must be a multiple of 64, not {text}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """The whole demo; returns the exit status. Raises a Problem where something that it needs is missing."""
    require("The demo", "transformers", "peft", "rich")
    if problem := _missing_compiler():
        raise Problem(problem)
    silence_others()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    variants = make_variants(args, device)
    batches = make_batches(args, device)
    print(_title(args, variants[EAGER].model, device))
    with _progress() as bar:
        compiling = compile_all(variants, batches[0], bar)
        losses = {name: train(name, variants[name], batches, bar) for name in (EAGER, INDUCTOR, OURS)}
        costs = measure(variants, batches[0], device, bar)
    _print_losses(losses)
    _print_adapters(variants[OURS])
    _print_costs(costs, compiling)
    return 0


def _missing_compiler() -> str:
    """What Inductor needs to build its kernels, where it is not there."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in names):
        return (
            "Inductor builds its kernels with a C++ compiler, and none was found. Install one (Debian, Ubuntu: "
            "apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name yours in CXX."
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return (
            f"Inductor builds its kernels against Python.h, and {headers} has none. "
            "Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel."
        )
    return ""


@contextmanager
def _progress() -> Iterator[Any]:
    """Progress bars on stderr, so that what goes to a file are the tables alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<38}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar


# -------------------------------------------------------------------------------------------- models and text


def make_variants(args: argparse.Namespace, device: torch.device) -> dict[str, Variant]:
    """The same weights four times: with adapters in eager, by Inductor, by peft_fx; and without adapters."""
    from peft import LoraConfig, get_peft_model

    base = make_llama(args).to(device, torch.bfloat16)
    frozen = copy.deepcopy(base).requires_grad_(False)
    # without adapters nothing would need a gradient, and backward would have nothing to do
    frozen.get_input_embeddings().weight.requires_grad_(True)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    adapted = get_peft_model(base, config)
    models = {EAGER: adapted, INDUCTOR: copy.deepcopy(adapted), OURS: copy.deepcopy(adapted), FROZEN: frozen}
    ours = torch.compile(models[OURS], backend=peft_fx.backend, options={"peft_fx.form": args.form})
    calls = {EAGER: adapted, INDUCTOR: torch.compile(models[INDUCTOR]), OURS: ours, FROZEN: torch.compile(frozen)}
    return {name: Variant(model, calls[name]) for name, model in models.items()}


def make_llama(args: argparse.Namespace) -> Any:
    """A Llama over bytes, random weights, heads of 32, as many layers and as wide as asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = args.hidden // 32
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=args.tokens,
        initializer_range=0.05,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batches(args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """One [1, T] batch of bytes for each step, from anywhere in the help pages that come with Python."""
    from pydoc_data.topics import topics

    text = torch.tensor(list("\n".join(topics.values()).encode()))
    starts = torch.randint(len(text), (args.steps,), generator=torch.Generator().manual_seed(1))
    return [text[(start + torch.arange(args.tokens)) % len(text)][None].to(device) for start in starts]


# ------------------------------------------------------------------------------------ compile, train, measure


def compile_all(variants: Mapping[str, Variant], ids: torch.Tensor, bar: Any) -> dict[str, float]:
    """Seconds of each variant's first step, which compiles it. No parameter changes."""
    seconds = {}
    compiled = [name for name in variants if name != EAGER]
    task = bar.add_task("compile", total=len(compiled))
    for name in compiled:
        bar.update(task, description=f"compile {name}")
        start = time.perf_counter()
        variants[name].step(ids)
        seconds[name] = time.perf_counter() - start
        bar.advance(task)
    return seconds


def train(name: str, variant: Variant, batches: list[torch.Tensor], bar: Any) -> list[float]:
    """Trains the adapters by AdamW, one step for each batch; returns the losses."""
    parameters = [p for p in variant.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for ids in bar.track(batches, description=f"train {name}"):
        loss = variant.loss(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        variant.clear()
        losses.append(loss.item())
    return losses


def measure(
    variants: Mapping[str, Variant], ids: torch.Tensor, device: torch.device, bar: Any
) -> dict[str, tuple[Memory, float]]:
    """Memory and median seconds of a step of each variant."""
    task = bar.add_task("measure memory and time", total=len(variants) + ROUNDS)
    memory = {}
    for name, variant in variants.items():
        memory[name] = memory_of(lambda v=variant: v.loss(ids), variant.clear, device)  # type: ignore[misc]
        bar.advance(task)
    steps = {name: lambda v=variant: v.step(ids) for name, variant in variants.items()}  # type: ignore[misc]
    times = median_times(steps, device, ROUNDS, after_round=lambda: bar.advance(task))
    return {name: (memory[name], times[name]) for name in variants}


# --------------------------------------------------------------------------------------------------- printing


def _title(args: argparse.Namespace, model: Any, device: torch.device) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    return (
        f"Llama on {device.type}: {args.layers} layers, hidden size {args.hidden}, {args.tokens} tokens a step, "
        f"{(everything - trained) / 1e6:.2f} M parameters in bfloat16;\n"
        f"LoRA of rank {args.rank} on all linear layers: {trained / 1e6:.2f} M parameters in float32"
    )


def _print_losses(losses: Mapping[str, list[float]]) -> None:
    steps = len(losses[EAGER])
    shown = sorted({round(i * (steps - 1) / (ROWS - 1)) for i in range(ROWS)})
    rows = [(i + 1, *(f"{curve[i]:.4f}" for curve in losses.values())) for i in shown]
    worst = {n: max(abs(a - b) for a, b in zip(losses[n], losses[EAGER], strict=True)) for n in (INDUCTOR, OURS)}
    print("\n1. Losses, from the same start on the same batches\n")
    print(tabulate(rows, headers=("step", *losses), disable_numparse=True, stralign="right"))
    print("\nlargest difference from eager at any step: " + ", ".join(f"{worst[n]:.4f} ({n})" for n in worst))


def _print_adapters(variant: Variant) -> None:
    print("\n2. What the backend did: peft_fx.explain(compiled_model)\n")
    print(peft_fx.explain(variant.call))


def _print_costs(costs: Mapping[str, tuple[Memory, float]], compiling: Mapping[str, float]) -> None:
    floor, frozen_seconds = costs[FROZEN]
    rows = []
    for name, (memory, seconds) in costs.items():
        kept = (f"{memory.kept / 1e6:.2f}", f"{memory.kept / floor.kept:.2f}×")
        peak = (f"{memory.peak / 1e6:.2f}", f"{memory.peak / floor.peak:.2f}×")
        step = (f"{1e3 * seconds:.1f}", f"{seconds / frozen_seconds:.2f}×")
        rows.append((name, *kept, *peak, *step, f"{compiling[name]:.0f}" if name in compiling else ""))
    head = ("", "kept, MB", "", "peak, MB", "", "step, ms", "", "first step, s")
    print("\n3. What a training step costs; × the model without adapters\n")
    print(tabulate(rows, headers=head, disable_numparse=True, colalign=("left", *["right"] * 7)))
