"""`python -m bench suite`: fixed lists of steps, whose results are committed: `cpu` and `methods` for any machine,
`gpu` for one large GPU, `loss` for either."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from bench import tables
from bench.experiment import DEVICE, Argument, Command, Experiment, Kind, Row, Session, describe, device_of, option
from bench.experiments.steps import memory_requests, step_request
from bench.results import FOLDER, Results, unique
from bench.variants import CHECKPOINTED, LOSSES, WHOLE
from peft_fx.cli.terminal import Problem
from tests.support.rehearsing import rehearsal, rehearse
from zoo.models import METHODS, setup_of

DEPTHS = (1, 2)
LENGTHS = (2048, 8192, 16384, 32768)
PLAIN = ("frozen", "eager", "inductor", "peft_fx", "paper", "handwritten")
OTHERS = ("frozen", "full", *CHECKPOINTED)  # apart from PLAIN: one process of all would not fit in one call's time


def cpu(args: Namespace) -> Iterable[dict[str, Any]]:
    """Small models, for any machine: under 20 minutes on two idle cores.

    Kept bytes per layer in every dtype setting and model family, of DoRA, IA3 and VeRA, a step of a Llama of 8 layers
    by every variant, and memory and time against T. On CPU bytes are exact at any size, and a compile costs more than
    the steps.
    """
    compared, floor = ("frozen", "eager", "inductor", "peft_fx"), ("frozen", "peft_fx")
    llama = [setup_of("llama-256", tokens=512, dtype=dtype) for dtype in ("peft", "bf16", "fp32", "autocast")]
    dropped = [replace(setup, dropout=0.1) for setup in llama if setup.dtype in ("peft", "fp32")]
    names = ("roberta", "gpt2", "t5-v1.1", "vit", "t5", "opt")
    families = [setup_of(name, hidden=128, tokens=256, vocab=512) for name in names]
    methods = [replace(llama[0], method=method) for method in ("dora", "ia3", "vera")]
    yield from memory_requests(llama[:1], compared, DEPTHS)
    yield from memory_requests([*llama, *dropped[:1]], ("frozen", "inductor", "peft_fx"), DEPTHS)
    yield from memory_requests(methods, ("frozen", "inductor", "peft_fx"), DEPTHS)
    yield from memory_requests([*dropped[1:], *families], floor, DEPTHS)
    yield step_request(setup_of("llama-512"), WHOLE, rounds=5)
    for T in (512, 1024, 2048):
        yield step_request(setup_of("llama-256", layers=2, tokens=T), compared, rounds=5, cold=False)


def methods(args: Namespace) -> Iterable[dict[str, Any]]:
    """A step by each of PEFT's methods: 15 minutes on two idle cores.

    Of a Llama of 2 layers, T = 1024, beside Inductor and no adapter at all.
    """
    for method in METHODS:
        setup = setup_of("llama-512", layers=2, method=method)
        yield step_request(setup, ("frozen", "inductor", "peft_fx"), rounds=15, cold=False)


def loss(args: Namespace) -> Iterable[dict[str, Any]]:
    """What the logits cost, the largest activation: with all of it and in chunks.

    A step of a Llama of 4 layers and width 512 that returns its loss alone, T = 2048, a vocabulary of 128256. Liger's
    kernel runs on a GPU alone, and says NotRun elsewhere.
    """
    setup = setup_of("llama-512", layers=4, tokens=2048, vocab=128256, dtype="peft", device=device_of(args))
    yield step_request(setup, LOSSES, rounds=5, cold=False)


def gpu(args: Namespace) -> Iterable[dict[str, Any]]:
    """For one large GPU: the shape of Llama-3.2-1B.

    Per layer at one length; then T = 2048, 8192, 16384 and 32768, every variant, in two processes each. In calls of
    --minutes each: the same command again goes on where the last one stopped. A toy of it has two layers of width 64,
    and runs on a CPU if need be: what takes time then is compiling. --offline does all of it that takes no GPU, on any
    machine with Triton: code is generated, kernels of ours are interpreted, nothing is timed.
    """
    if device_of(args) == "cpu" and not (args.toy or args.offline):
        raise Problem("There is no GPU here. --toy runs the same suite at toy size, --offline what of it takes no GPU.")
    setup, lengths, rounds = setup_of("llama-3.2-1b", device=device_of(args)), LENGTHS, 15
    if args.toy:
        setup, lengths, rounds = replace(setup, layers=2, hidden=64, vocab=256, rank=4), (64, 128), 2
    eight = replace(setup, tokens=lengths[1])
    yield from memory_requests([eight, replace(eight, dropout=0.1)], ("frozen", "inductor", "peft_fx"), DEPTHS)
    for variants in (PLAIN, OTHERS):
        for T in lengths:
            yield step_request(replace(setup, tokens=T), variants, rounds)


def suite(requests: Callable[[Namespace], Iterable[dict[str, Any]]], *arguments: Argument, **kinds: Kind) -> Experiment:
    def measured(args: Namespace, session: Session) -> Sequence[Row]:
        every = unique(requests(args))
        asked = [r for r in every if not args.method or r["setup"]["method"] in args.method]
        if args.list:
            print("\n".join(map(describe, asked)))
            raise SystemExit(0)
        apart = next((mode for mode in ("offline", "toy") if getattr(args, mode, False)), "")
        if apart and not args.output:
            session = replace(session, results=Results(FOLDER / f"gpu-{apart}.json", device_of(args)))
        if apart == "offline":
            rehearse(asked, session)
            raise SystemExit(0)
        return session.measure(asked, only=every)

    common = (
        option("--method", nargs="+", choices=METHODS, metavar="NAME", help="of the suite, these methods alone"),
        option("--list", action="store_true", help="say what would be measured, and measure nothing"),
        option("--minutes", type=float, default=0, metavar="M", help="start nothing new after so long"),
    )
    return Experiment(
        name=requests.__name__,
        text=inspect.getdoc(requests),
        arguments=(*arguments, *common),
        measured=measured,
        tables={"": tables.listing},
        kinds=kinds,
        fresh=False,
    )


TOY = option("--toy", action="store_true", help="at toy size, to see that it runs")
OFFLINE = option("--offline", action="store_true", help="for a GPU that is not there: code and kernels, no times")
SUITES = (suite(cpu), suite(methods), suite(loss, DEVICE), suite(gpu, TOY, OFFLINE, DEVICE, rehearsal=rehearsal))
SUITE = Command(
    name="suite",
    text="""\
The steps that are committed, in suites.

What was measured already, with the same versions on the same device and, for peft_fx, from the same source, is kept;
--fresh measures all of it again.
""",
    members=SUITES,
)
