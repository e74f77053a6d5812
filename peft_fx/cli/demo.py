"""`python -m peft_fx demo`: a small Llama with PEFT LoRA, trained three ways from the same start."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import peft_fx
from peft_fx import compat, machines
from peft_fx.cli.configs import budget, positive
from peft_fx.cli.terminal import Problem, require, silence_others
from peft_fx.compiling import is_disabled
from peft_fx.measuring import Memory, memory_of, quartiles, times_in_turn
from peft_fx.options import CHOICES
from peft_fx.passes.decide.machine import DTYPES

EAGER, INDUCTOR, OURS, FROZEN = "PEFT, eager", "PEFT, Inductor", "PEFT, peft_fx", "no adapters, Inductor"
WITHIN = "PEFT, peft_fx in a budget"  # where one is asked for
ROUNDS = 11  # of timed steps
SAME = 0.05  # a difference in time that is none
ROWS = 8  # of the table of losses

DESCRIPTION = """\
Builds a small Llama from its config (random weights, nothing is downloaded), puts PEFT's LoRA on every linear layer,
and trains the adapters on the text of Python's own help pages, byte by byte: in eager mode, through Inductor, and
through peft_fx, from the same start on the same batches. The weights are bfloat16, or float32 on a CPU that multiplies
that sooner.

It prints what peft_fx gives, in a sentence; then what a training step costs in each case, beside the same model without
any adapter; the form chosen for each adapter, and why; and the three loss curves.

  kept   bytes that forward leaves for backward
  peak   most bytes allocated at one time during a step, on top of the weights
  step   median time of forward and backward, the variants taking turns; half of the rounds took from … to

Compiling needs a C++ compiler, and is most of the demo's time: one to three minutes at the default size.
"""
EPILOG = """\
examples:
  python -m peft_fx demo                                the default: 2 layers, 512 tokens
  python -m peft_fx demo --tokens 2048 --layers 4       more tokens: more of a difference
  python -m peft_fx demo --tokens 64                    few tokens: adapters stay as they are written
  python -m peft_fx demo --tokens 64 --form weight      all the same in weight form, and what that costs
  python -m peft_fx demo --dtype bfloat16               in bfloat16, whatever the CPU
  python -m peft_fx demo --budget 9MB                   once more, in a step of that many bytes, if there is one

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
    dtype_help = "of the weights (default: bfloat16 where this machine multiplies it sooner than float32)"
    demo.add_argument("--dtype", choices=("bfloat16", "float32"), help=dtype_help)
    demo.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    budget_help = "bytes, as 9MB: peft_fx once more, with a step that allocates no more (docs/memory-budget.md)"
    demo.add_argument("--budget", type=budget, metavar="BYTES", help=budget_help)
    demo.set_defaults(run=run)


def _width(text: str) -> int:
    if positive(text) % 64:
        raise argparse.ArgumentTypeError(f"must be a multiple of 64, not {text}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """The whole demo; returns the exit status. Raises a Problem where something that it needs is missing."""
    require("The demo", "transformers", "peft", "rich")
    if problem := _switched_off() or _missing_compiler():
        raise Problem(problem)
    silence_others()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, why = dtype_for(args, device)
    variants = make_variants(args, device, dtype)
    batches = make_batches(args, device)
    print(_title(args, variants[EAGER].model, device, dtype) + why)
    with _progress() as bar:
        compiling = compile_all(variants, batches[0], bar)
        losses = {name: train(name, variants[name], batches, bar) for name in variants if name != FROZEN}
        costs = measure(variants, batches[0], device, bar)
    print(f"\n{in_a_sentence(costs)}")
    _print_costs(costs, compiling)
    _print_adapters(variants[WITHIN if args.budget else OURS])
    _print_losses(losses)
    return 0


def _switched_off() -> str:
    """What would make the demo compare something with itself."""
    if compat.dynamo_config.disable:
        return "torch.compile is switched off: unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE."
    if is_disabled():
        return "peft_fx is switched off: unset PEFT_FX_DISABLE."
    return ""


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


def dtype_for(args: argparse.Namespace, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the weights, and a remark where it is not what one would expect."""
    if args.dtype:
        return DTYPES[args.dtype], ""
    machine = machines.resolve("auto", device)
    if device.type != "cpu" or machine.has_units_of(torch.bfloat16):
        return torch.bfloat16, ""
    times = machine.speed(torch.float32).peak / machine.speed(torch.bfloat16).peak
    return torch.float32, f"\n(float32, which this CPU multiplies {times:.2g} times as fast as bfloat16: see --dtype)"


def make_variants(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Variant]:
    """The same weights four times: with adapters in eager, by Inductor, by peft_fx; and without adapters. Once more by
    peft_fx where there is a budget."""
    from peft import LoraConfig, get_peft_model

    base = make_llama(args).to(device, dtype)
    frozen = copy.deepcopy(base).requires_grad_(False)
    # without adapters nothing would need a gradient, and backward would have nothing to do
    frozen.get_input_embeddings().weight.requires_grad_(True)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    adapted = get_peft_model(base, config)
    models = {EAGER: adapted, INDUCTOR: copy.deepcopy(adapted), OURS: copy.deepcopy(adapted), FROZEN: frozen}
    options = {"peft_fx.form": args.form}
    ours = torch.compile(models[OURS], backend=peft_fx.backend, options=options)
    calls = {EAGER: adapted, INDUCTOR: torch.compile(models[INDUCTOR]), OURS: ours, FROZEN: torch.compile(frozen)}
    if args.budget:
        models[WITHIN] = copy.deepcopy(adapted)
        within = {"peft_fx.memory_budget": args.budget, "peft_fx.memory_budget_of": "step"}
        calls[WITHIN] = torch.compile(models[WITHIN], backend=peft_fx.backend, options=options | within)
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


@dataclass(frozen=True)
class Cost:
    """What a step of one variant takes: bytes, and seconds in each round."""

    memory: Memory
    times: list[float]

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    def times_longer(self, other: Cost) -> float:
        """The median over the rounds, of which each had a step of both."""
        return statistics.median(a / b for a, b in zip(self.times, other.times, strict=True))


def measure(variants: Mapping[str, Variant], ids: torch.Tensor, device: torch.device, bar: Any) -> dict[str, Cost]:
    """Memory and seconds of a step of each variant."""
    task = bar.add_task("measure memory and time", total=len(variants) + ROUNDS)
    memory = {}
    for name, variant in variants.items():
        memory[name] = memory_of(lambda v=variant: v.loss(ids), variant.clear, device)  # type: ignore[misc]
        bar.advance(task)
    steps = {name: lambda v=variant: v.step(ids) for name, variant in variants.items()}  # type: ignore[misc]
    times = times_in_turn(steps, device, ROUNDS, after_round=lambda: bar.advance(task))
    return {name: Cost(memory[name], times[name]) for name in variants}


# --------------------------------------------------------------------------------------------------- printing


def in_a_sentence(costs: Mapping[str, Cost]) -> str:
    """What the user came for: memory and time against PEFT in eager mode and by Inductor."""
    ours, inductor, eager = (costs[name] for name in (OURS, INDUCTOR, EAGER))
    kept = (
        f"For backward peft_fx keeps {ours.memory.kept / 1e6:.1f} MB, where PEFT by Inductor keeps "
        f"{_compared(inductor.memory.kept / ours.memory.kept)} ({inductor.memory.kept / 1e6:.1f} MB) and PEFT in eager "
        f"mode {_compared(eager.memory.kept / ours.memory.kept)} ({eager.memory.kept / 1e6:.1f} MB)"
    )
    step = f"a step takes {_longer(ours, inductor)} by Inductor, and {_longer(ours, eager)} in eager mode"
    return textwrap.fill(f"{kept}; {step}.", 100)


def _compared(ratio: float) -> str:
    return "as much" if abs(ratio - 1) < SAME else f"{ratio:.2g} times as much"


def _longer(a: Cost, b: Cost) -> str:
    ratio = a.times_longer(b)
    return "the same time as" if abs(ratio - 1) < SAME else f"{ratio:.2f} times as long as"


def _title(args: argparse.Namespace, model: Any, device: torch.device, dtype: torch.dtype) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    return (
        f"Llama on {device.type}: {args.layers} layers, hidden size {args.hidden}, {args.tokens} tokens a step, "
        f"{(everything - trained) / 1e6:.2f} M parameters in {str(dtype).removeprefix('torch.')};\n"
        f"LoRA of rank {args.rank} on all linear layers: {trained / 1e6:.2f} M parameters in float32"
    )


def _print_losses(losses: Mapping[str, list[float]]) -> None:
    steps = len(losses[EAGER])
    shown = sorted({round(i * (steps - 1) / (ROWS - 1)) for i in range(ROWS)})
    rows = [(i + 1, *(f"{curve[i]:.4f}" for curve in losses.values())) for i in shown]
    others = {name: curve for name, curve in losses.items() if name != EAGER}
    worst = {n: max(abs(a - b) for a, b in zip(curve, losses[EAGER], strict=True)) for n, curve in others.items()}
    print("\n3. Losses, from the same start on the same batches\n")
    print(tabulate(rows, headers=("step", *losses), disable_numparse=True, stralign="right"))
    print("\nlargest difference from eager at any step: " + ", ".join(f"{worst[n]:.4f} ({n})" for n in worst))


def _print_adapters(variant: Variant) -> None:
    print("\n2. What the backend did: peft_fx.explain(compiled_model)\n")
    print(peft_fx.explain(variant.call))


def _print_costs(costs: Mapping[str, Cost], compiling: Mapping[str, float]) -> None:
    floor = costs[FROZEN]
    rows = []
    for name, cost in costs.items():
        kept = (f"{cost.memory.kept / 1e6:.2f}", f"{cost.memory.kept / floor.memory.kept:.2f}×")
        peak = (f"{cost.memory.peak / 1e6:.2f}", f"{cost.memory.peak / floor.memory.peak:.2f}×")
        low, high = quartiles(cost.times)
        step = (f"{1e3 * cost.seconds:.1f}", f"{1e3 * low:.1f} … {1e3 * high:.1f}", f"{cost.times_longer(floor):.2f}×")
        rows.append((name, *kept, *peak, *step, f"{compiling[name]:.0f}" if name in compiling else ""))
    head = ("", "kept, MB", "", "peak, MB", "", "step, ms", "from … to", "", "first step, s")
    print("\n1. What a training step costs; × the model without adapters\n")
    print(tabulate(rows, headers=head, disable_numparse=True, colalign=("left", *["right"] * 8)))
