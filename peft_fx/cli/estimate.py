"""`python -m peft_fx estimate`: what training takes, of a model that is there as a configuration alone."""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import peft_fx
from peft_fx.budgeting import OPTIMIZERS
from peft_fx.cli import configs
from peft_fx.cli.terminal import Problem, Say, check_writable, progress, require, silence_others
from peft_fx.estimates import Estimate, joined, unit_of
from peft_fx.options import parse
from peft_fx.variants import EXACT, VARIANTS, WITHIN, LeftOut, by_preparation

DESCRIPTION = """\
Peak memory and time of a training step, before any GPU is rented: PEFT by Inductor alone, by peft_fx, with checkpoints,
full fine-tuning, and the model without adapters, which is the floor. The model is built from its configuration on the
meta device: no weight exists, nothing is downloaded, nothing is computed.

The peak of each is split into weights, gradients, the optimiser's state, what forward keeps for backward, and what is
alive besides at the highest point. Attention is taken to need no mask of T×T, as FlashAttention needs none.
"""
EPILOG = """\
examples:
  python -m peft_fx estimate config.json --seq 4096 --machine h100
        every variant with exact gradients, at one length
  python -m peft_fx estimate config.json --seq 2048:131072 --targets attention --png memory.png
        lengths from 2048 on, each twice the last, and a figure
  python -m peft_fx estimate ~/models/llama --seq 2048:131072 --variants inductor,peft_fx,full --memory 80
        and the longest sequence that fits in 80 GB
  python -m peft_fx estimate config.json --seq 2048:131072 --machine rtx4090 --budget 24GB --png frontier.png
        and what a step takes that is held to 24 GB

exit status: 0; 2 where something is missing or wrong
"""


def add_command(commands: Any) -> None:
    """Adds `estimate` to the sub-commands of an argument parser."""
    command = commands.add_parser(
        "estimate",
        help="memory and time of a training step by variant, from its config.json",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configs.add_arguments(command)
    seq = "tokens of a sequence: one number, or FIRST:LAST, each twice the one before (default: %(default)s)"
    command.add_argument("--seq", type=lengths, default="2048", metavar="T", help=seq)
    configs.add_backend_arguments(command, "whose speeds are reckoned with")
    names = f"with commas between, of {', '.join(VARIANTS)} (default: without lossy keeps; -budget where there is one)"
    command.add_argument("--variants", nargs="+", type=variants, metavar="NAME,…", help=names)
    command.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: %(default)s)")
    budget = "bytes that a step may take in all, as 24GB: what is quickest within them, and which T fits"
    command.add_argument("--budget", type=configs.budget, metavar="BYTES", help=budget)
    command.add_argument("--memory", type=float, metavar="GB", help="say which T fits in so much")
    command.add_argument("--json", type=Path, metavar="FILE", help="the estimate as JSON")
    command.add_argument("--png", type=Path, metavar="FILE", help="a figure of it; needs matplotlib")
    command.set_defaults(run=run)


def lengths(text: str) -> list[int]:
    """`2048` is one length; `2048:131072` are 2048, 4096, …, 131072."""
    first, colon, last = text.partition(":")
    found = [configs.positive(first)]
    end = configs.positive(last) if colon else found[0]
    if end < found[0]:
        raise argparse.ArgumentTypeError(f"must be FIRST:LAST with LAST no smaller, not {text!r}")
    while 2 * found[-1] <= end:
        found.append(2 * found[-1])
    return found if found[-1] == end else [*found, end]


def variants(text: str) -> list[str]:
    """`inductor,peft_fx` are two variants."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(VARIANTS)}, not {unknown[0] if unknown else text!r}")
    return names


def run(args: argparse.Namespace) -> int:
    """Estimates and writes what was asked for; returns the exit status."""
    if args.budget:
        args.option.append(f"memory_budget={args.budget}")
    options = configs.options_of(args)  # a Problem now rather than in each group
    budget = parse(options).memory_budget
    if isinstance(budget, (float, str)):
        raise Problem(f"memory_budget={budget}: it must be bytes, as 24GB: what a part is of is not known here")
    names = list(dict.fromkeys(itertools.chain.from_iterable(args.variants or ()))) or None
    for path in filter(None, (args.json, args.png)):
        check_writable(path)
    if args.png:
        require("A figure", "matplotlib", extra="bench")
    order = names or [*EXACT, *WITHIN * (budget is not None)]
    groups = list(by_preparation(order).values())
    with progress(f"{args.config}, rank {args.rank}", steps=len(args.seq) * len(groups)) as say:  # at most
        found = list(_estimates(args, groups, asked=names is not None, say=say))
    whole = joined(found)
    whole.rows.sort(key=lambda r: (r.tokens, order.index(r.name)))
    print(whole)
    print(_conclusions(whole, budget or (args.memory and args.memory * 1e9)))
    if args.json:
        args.json.write_text(whole.to_json(), encoding="utf-8")
    if args.png:
        whole.save_figure(args.png)
    return 0


def _estimates(args: argparse.Namespace, groups: Sequence[list[str]], asked: bool, say: Say) -> Iterator[Estimate]:
    """Estimates of groups of variants, on as many processors as there are.
    `asked`: a variant that the model does not allow is a Problem, else it is left out."""
    workers = min(len(os.sched_getaffinity(0)), len(groups))
    if workers == 1:
        yield from (_estimate(args, names, asked, say) for names in groups)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would have torch's threads' locks without them
    lines = context.SimpleQueue()
    with futures.ProcessPoolExecutor(workers, context, initializer=_tell, initargs=(lines,)) as pool:
        todo = {pool.submit(_estimate, args, names, asked) for names in groups}
        try:
            while todo:
                done, todo = futures.wait(todo, timeout=0.2, return_when=futures.FIRST_COMPLETED)
                while not lines.empty():
                    say(lines.get())
                yield from (future.result() for future in done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_told: Any = None  # the lines that a worker of the pool tells


def _tell(lines: Any) -> None:
    global _told
    _told = lines
    gc.freeze()  # else what was imported is walked through every few hundred nodes, an eighth of the time
    gc.set_threshold(20_000, 10, 10)


def _estimate(args: argparse.Namespace, names: Sequence[str], asked: bool, say: Say | None = None) -> Estimate:
    """The estimate of variants that share one prepared model."""
    silence_others()
    model = configs.without_mask(configs.model_of(args))
    chosen = {"options": configs.options_of(args), "device": args.device, "optimizer": args.optimizer}
    batch = configs.batch_of(model, args.seq[0], args.batch)
    try:
        return peft_fx.estimate(model, **chosen, variants=names, seq_lens=args.seq, progress=say or _told.put, **batch)
    except LeftOut as why:
        if asked:
            raise Problem(str(why)) from why
        return Estimate([], "", dict.fromkeys(names, str(why.__cause__)))
    except ValueError as error:
        raise Problem(str(error)) from error


def _conclusions(estimate: Estimate, memory: float | None) -> str:
    """What follows of it; `memory` are the bytes that a step may take."""
    lines = []
    if {"inductor", "full"} <= {r.name for r in estimate.rows}:
        tokens = estimate.crossover()
        text = f"from T = {tokens} on" if tokens else "at none of these lengths"
        lines.append(f"PEFT by Inductor needs more memory than full fine-tuning {text}.")
    if memory:
        fits = ", ".join(f"{name} {T}" for name, T in estimate.largest(memory).items())
        lines.append(f"T that fits in {memory / 1e9:g} GB: {fits}")
    if len({r.tokens for r in estimate.rows}) == 1 and estimate.rows:
        unit, size = unit_of(r.kept_bytes for r in estimate.rows)
        for row in estimate.rows:
            parts = ", ".join(f"{k} {n / size:.2f}" for k, n in row.components.items())
            lines.append(f"{row.name} keeps, {unit}: {parts}")
    return "\n" + "\n".join(lines)
