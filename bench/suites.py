"""Fixed lists of measurements, whose results are committed: `cpu` for any machine, `gpu` for one large GPU, `loss`
for either."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.commands import device_of, memory_requests, results_of, step_request
from bench.models import METHODS, Setup, setup_of
from bench.report import print_rows
from bench.running import describe, measure_all
from bench.variants import CHECKPOINTED, LOSSES, VARIANTS

SUITE = """\
cpu   under 20 minutes on two idle cores: kept bytes per layer in every dtype setting and model family, of DoRA, IA3 and
      VeRA, a step of a Llama of 8 layers by every variant, and memory and time against T
methods
      a step of a Llama of 2 layers, T = 1024, by each of PEFT's methods: 15 minutes on two idle cores
loss  a step of a Llama of 4 layers and width 512 that returns its loss alone, T = 2048, a vocabulary of 128256:
      what the logits cost. Liger's kernel runs on a GPU alone, and says NotRun elsewhere
gpu   the shape of Llama-3.2-1B at T = 2048, 8192, 16384 and 32768, every variant. In calls of --minutes each: the same
      command again goes on where the last one stopped. --toy runs the same code small, on a CPU if need be

What was measured already, with the same versions on the same device and, for peft_fx, from the same source, is kept;
--fresh measures all of it again. Results: bench/results/cpu.json, methods.json, loss.json,
gpu.json, gpu-toy.json.
"""

DEPTHS = (1, 2)
LENGTHS = (2048, 8192, 16384, 32768)
PLAIN = ("frozen", "eager", "inductor", "peft_fx", "paper", "handwritten")
OTHERS = ("frozen", "full", *CHECKPOINTED)  # apart from PLAIN: one process of all would not fit in one call's time


def add_command(commands: Any) -> None:
    """Adds `suite` to the sub-commands of an argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    suite = commands.add_parser(
        "suite", help="the measurements that are committed", description=SUITE, formatter_class=formatter
    )
    suite.add_argument("suite", choices=("cpu", "methods", "loss", "gpu"))
    suite.add_argument("--toy", action="store_true", help="gpu at toy size, to see that it runs")
    suite.add_argument("--fresh", action="store_true", help="measure everything again")
    suite.add_argument("--method", nargs="+", choices=METHODS, metavar="NAME", help="of the suite, these methods alone")
    suite.add_argument("--list", action="store_true", help="say what would be measured, and measure nothing")
    suite.add_argument("--minutes", type=float, default=0, metavar="M", help="start nothing new after so long")
    suite.add_argument("--device", choices=("cpu", "cuda"), help="for gpu (default: cuda where there is one)")
    suite.add_argument("--output", type=Path, metavar="FILE", help="(default: bench/results/<suite>.json)")
    suite.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.suite in ("cpu", "methods"):
        args.device = "cpu"
    device = device_of(args)
    if args.suite == "gpu" and device == "cpu" and not args.toy:
        print("There is no GPU here. --toy runs the same suite at toy size.")
        return 2
    suites = {"cpu": cpu, "methods": methods, "loss": lambda: loss(device), "gpu": lambda: gpu(device, args.toy)}
    suite = unique(suites[args.suite]())
    requests = [r for r in suite if not args.method or r["setup"]["method"] in args.method]
    if args.list:
        print("\n".join(describe(request) for request in requests))
        return 0
    results = results_of(args, args.suite + ("-toy" if args.toy and args.suite == "gpu" else ""))
    results.keep_only(suite)
    print_rows(measure_all(requests, results, again=args.fresh, minutes=args.minutes))
    return 0


def unique(requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for request in requests:
        if request not in found:
            found.append(request)
    return found


def cpu() -> Iterable[dict[str, Any]]:
    """Small models: on CPU bytes are exact at any size, and a compile costs more than the steps."""
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
    yield step_request(setup_of("llama-512"), VARIANTS, rounds=5)
    for T in (512, 1024, 2048):
        yield step_request(setup_of("llama-256", layers=2, tokens=T), compared, rounds=5, cold=False)


def methods() -> Iterable[dict[str, Any]]:
    """What each method costs, beside Inductor and no adapter at all."""
    for method in METHODS:
        setup = setup_of("llama-512", layers=2, method=method)
        yield step_request(setup, ("frozen", "inductor", "peft_fx"), rounds=15, cold=False)


def loss(device: str) -> Iterable[dict[str, Any]]:
    """The largest activation, with all of it and in chunks."""
    setup = setup_of("llama-512", layers=4, tokens=2048, vocab=128256, dtype="peft", device=device)
    yield step_request(setup, LOSSES, rounds=5, cold=False)


def gpu(device: str, toy: bool) -> Iterable[dict[str, Any]]:
    """Llama-3.2-1B: per layer at one length; then every length, in two processes each."""
    setup = setup_of("llama-3.2-1b", device=device)
    lengths, rounds = LENGTHS, 15
    if toy:
        setup, lengths, rounds = _toy(setup), (64, 128), 2
    eight = replace(setup, tokens=lengths[1])
    yield from memory_requests([eight, replace(eight, dropout=0.1)], ("frozen", "inductor", "peft_fx"), DEPTHS)
    for variants in (PLAIN, OTHERS):
        for T in lengths:
            yield step_request(replace(setup, tokens=T), variants, rounds)


def _toy(setup: Setup) -> Setup:
    """Two layers of width 64: what takes time then is compiling."""
    return replace(setup, layers=2, hidden=64, vocab=256, rank=4)
