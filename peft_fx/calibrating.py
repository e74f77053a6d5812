"""`python -m peft_fx calibrate`: measures how fast this machine is, and stores it for the price to reckon with."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from peft_fx import machines
from peft_fx.measuring import clock_of
from peft_fx.passes.machine import DTYPES, Machine, Speed
from peft_fx.terminal import Say, progress

Run = Callable[[], object]

DESCRIPTION = """\
Measures how fast this machine multiplies, reads and starts kernels, in under a minute, and stores what it finds in the
user's cache directory ({folder}; PEFT_FX_CACHE_DIR names another). From then on the price reckons with it, here and
wherever the device, its threads and the minor version of PyTorch are the same. Compiled code of other constants is not
used again.

Each number is the fastest of several runs: other processes can only make one slower. But leave the machine alone.
"""
EPILOG = """\
examples:
  python -m peft_fx calibrate                           the CPU, and the GPU where there is one
  OMP_NUM_THREADS=1 python -m peft_fx calibrate         the CPU with one thread: for processes with one
  python -m peft_fx calibrate --device cuda --output a100.json
        to a file: for torch.compile(..., options={"peft_fx.machine": "a100.json"}) and --machine a100.json elsewhere

exit status: 0; 2 where there is no such device, or the result cannot be stored
"""
LARGE = {"cpu": 512, "cuda": 8192}  # side of the square products that give a dtype's peak
WIDE = {"cpu": (1024, 512), "cuda": (8192, 4096)}  # T and K of the narrow ones
RANKS = (4, 16)
SMALL = ((16, 512, 32), (32, 16, 512), (512, 16, 32), (64, 64, 64))  # products that take no longer than to start
STORED = {"cpu": 2048, "cuda": 8192}  # side of the result of one that does little but store it
PASS = {"cpu": 1 << 24, "cuda": 1 << 28}  # elements added in a pass through memory
SECONDS = 0.25  # of each measurement


def add_command(commands: Any) -> None:
    """Adds `calibrate` to the sub-commands of an argument parser."""
    calibrate = commands.add_parser(
        "calibrate",
        help="measure this machine, so that the price is right on it",
        description=DESCRIPTION.format(folder=machines.folder()),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate.add_argument("--device", choices=("cpu", "cuda"), help="(default: both, where there is a GPU)")
    calibrate.add_argument("--output", type=Path, metavar="FILE", help="for options={'peft_fx.machine': FILE}")
    calibrate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and stores each device; returns the exit status, 2 where there is no GPU to measure, or no place to
    store."""
    wanted = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if "cuda" in wanted and not torch.cuda.is_available():
        print("There is no GPU here that PyTorch can use.", file=sys.stderr)
        return 2
    if args.output and len(wanted) > 1:
        print("One file is for one device: say which with --device.", file=sys.stderr)
        return 2
    for device in map(torch.device, wanted):
        path = args.output or machines.path_of(device)
        with progress(f"measuring {machines.described(device)}", steps=len(DTYPES) + 2) as say:
            machine = measure(device, say)
        print(f"\n{machine.name}\n\n{table(machine)}\n")
        try:
            machines.store(machine, device, path)
        except OSError as error:
            print(f"This cannot be stored: {error}. --output names another file.", file=sys.stderr)
            return 2
        print(path)
    return 0


def table(machine: Machine) -> str:
    """The constants, each with its unit."""
    head = ("products in", "TFLOP/s", "start, µs", "inner, elements", "outer, elements")
    lines = [
        (
            str(dtype).removeprefix("torch."),
            f"{s.peak / 1e12:.3g}",
            f"{1e6 * s.start:.2g}",
            f"{s.inner:.2g}",
            f"{s.outer:.2g}",
        )
        for dtype, s in machine.speeds
    ]
    lines += [("float32 by TF32", f"{machine.tf32 / 1e12:.3g}", "", "", "")] if machine.tf32 else []
    products = tabulate(lines, head, "simple", colalign=("left", *4 * ("right",)), disable_numparse=True)
    memory = f"{machine.bandwidth / 1e9:.3g} GB/s, {machine.stores / 1e9:.3g} GB/s for products"
    return f"{products}\n\nmemory {memory}; start of a kernel {1e6 * machine.launch:.2g} µs"


# --------------------------------------------------------------------------------------------------- measuring


def measure(device: torch.device, say: Say = lambda text: None) -> Machine:
    """The constants of a device, by products and passes of a few sizes."""
    say("memory")
    bandwidth, launch, stores = _bandwidth(device), _launch(device), _stores(device)
    speeds = []
    with _products_in(tf32=False):
        for name, dtype in DTYPES.items():
            say(name)
            speeds.append((dtype, _speed(device, dtype, launch)))
    tf32 = 0.0
    say("TF32")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        with _products_in(tf32=True):
            tf32 = _peak(device, torch.float32)
    name, mixed = f"calibrated {machines.described(device)}", device.type == "cuda"
    return Machine(name, tuple(speeds), _three(bandwidth), _three(launch), _three(stores), tf32, mixed)


def _speed(device: torch.device, dtype: torch.dtype, launch: float) -> Speed:
    """The peak by a large product; what a small one takes beyond its FLOPs; and what narrow ones do, the median over
    ranks and over the ways that an adapter multiplies."""
    peak = _peak(device, dtype)
    small = seconds(_in_turn([_product(device, dtype, *sizes) for sizes in SMALL]), device) / len(SMALL)
    start = max(0.0, small - launch - statistics.mean(2 * m * k * n for m, k, n in SMALL) / peak)
    T, K = WIDE[device.type]
    inner: list[float] = []
    outer: list[float] = []
    for r in RANKS:
        x, A, g = (_random(device, dtype, *sizes) for sizes in ((T, K), (K, r), (T, r)))
        for found, run in (
            (inner, lambda g=g, A=A: g @ A.T),
            (outer, lambda x=x, A=A: x @ A),
            (outer, lambda x=x, g=g: x.T @ g),
            (outer, lambda x=x, g=g: g.T @ x),
        ):
            found.append((seconds(run, device) - start - launch) * peak / (2 * T * K) - r)
    return Speed(peak, *(_three(max(0.0, n)) for n in (start, statistics.median(inner), statistics.median(outer))))


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    n = LARGE[device.type]
    return _three(2 * n**3 / seconds(_product(device, dtype, n, n, n), device))


def _product(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> Run:
    a, b, out = (_random(device, dtype, *sizes) for sizes in ((m, k), (k, n), (m, n)))
    return lambda: torch.mm(a, b, out=out)


def _random(device: torch.device, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, device=device).to(dtype)


def _bandwidth(device: torch.device) -> float:
    """Bytes/s of adding two large vectors into a third."""
    a, b, out = (torch.ones(PASS[device.type], device=device) for _ in range(3))
    elements: int = a.numel()
    return 3 * 4 * elements / seconds(lambda: torch.add(a, b, out=out), device)


def _stores(device: torch.device) -> float:
    """Bytes/s of a product of low rank."""
    n, r = STORED[device.type], 8
    return 4 * (n * n + 2 * n * r) / seconds(_product(device, torch.float32, n, r, n), device)


def _launch(device: torch.device) -> float:
    """Seconds of a product too small to take any, its result a new tensor as in generated code."""
    a, b = (_random(device, torch.float32, 16, 16) for _ in range(2))

    def one() -> None:
        torch.mm(a, b, out=torch.empty_strided((16, 16), (16, 1), device=device))

    return seconds(_in_turn(100 * [one]), device) / 100


def _in_turn(runs: Sequence[Run]) -> Run:
    """All of them, one after another: what one left in the caches is of no use to the next."""

    def run() -> None:
        for one in runs:
            one()

    return run


def seconds(run: Run, device: torch.device, budget: float = SECONDS) -> float:
    """The fastest of at least three runs, a GPU's work waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    clock = clock_of(device)
    run()
    wait()
    best, runs, end = float("inf"), 0, time.perf_counter() + budget
    while runs < 3 or time.perf_counter() < end:
        start = clock()
        run()
        wait()
        best, runs = min(best, clock() - start), runs + 1
    return best


def _three(value: float) -> float:
    """Three digits: more are noise."""
    return float(f"{value:.3g}")


@contextlib.contextmanager
def _products_in(tf32: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
