"""`python -m peft_fx calibrate`: measures how fast this machine is, and stores it for the price to reckon with."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from peft_fx import machines
from peft_fx.cli.terminal import Say, progress
from peft_fx.measuring import clock_of
from peft_fx.passes.decide.machine import DTYPES, Machine, Speed, implausible

Run = Callable[[], object]

DESCRIPTION = """\
Measures how fast this machine multiplies, reads and starts kernels, in under a minute, and stores what it finds in the
user's cache directory ({folder}; PEFT_FX_CACHE_DIR names another). From then on the price reckons with it, here and
wherever the device, its threads and the minor version of PyTorch are the same. Compiled code of other constants is not
used again.

Each number is the fastest of several runs, taken by turns: other processes can only make one slower. Where they do so
all the time, which the runs tell, or the numbers are those of no device, nothing is stored. So leave the machine alone.
"""
EPILOG = """\
examples:
  python -m peft_fx calibrate                           the CPU, and the GPU where there is one
  OMP_NUM_THREADS=1 python -m peft_fx calibrate         the CPU with one thread: for processes with one
  python -m peft_fx calibrate --device cuda --output a100.json
        to a file: for torch.compile(..., options={"peft_fx.machine": "a100.json"}) and --machine a100.json elsewhere

exit status: 0; 1 where other work disturbed it; 2 where there is no such device, or the result cannot be stored
"""
LARGE = {"cpu": 512, "cuda": 8192}  # side of the square products that give a dtype's peak
WIDE = {"cpu": (1024, 512), "cuda": (8192, 4096)}  # T and K of the narrow ones
RANKS = (4, 16)
SMALL = ((16, 512, 32), (32, 16, 512), (512, 16, 32), (64, 64, 64))  # products that take no longer than to start
STORED = {"cpu": 2048, "cuda": 8192}  # side of the result of one that does little but store it
PASS = {"cpu": 1 << 24, "cuda": 1 << 28}  # elements added in a pass through memory
SECONDS = 0.05  # of each measurement in a round
KERNELS = 100  # started one after another
ROUNDS, MOST = 5, 20  # of all measurements, by turns: as many as it takes for the numbers to settle
SETTLED = 1.3  # a quarter of the rounds come so near to the best


REST = (
    "Something else uses the machine: try again while it rests, or leave it to the probe that is made where there is "
    "no calibration."
)


class Disturbed(Exception):
    """The numbers are not the device's; the text says how that can be told."""


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
    """Measures and stores each device; returns the exit status: 1 where the numbers are worth nothing, 2 where there is
    no GPU to measure, or no place to store."""
    wanted = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if "cuda" in wanted and not torch.cuda.is_available():
        print("There is no GPU here that PyTorch can use.", file=sys.stderr)
        return 2
    if args.output and len(wanted) > 1:
        print("One file is for one device: say which with --device.", file=sys.stderr)
        return 2
    for device in map(torch.device, wanted):
        path = args.output or machines.path_of(device)
        try:
            with progress(f"measuring {machines.described(device)}") as say:
                machine = measure(device, say)
        except Disturbed as why:
            print(f"Nothing is stored: {why}. {REST}", file=sys.stderr)
            return 1
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


Key = tuple[str, ...]


@dataclass(frozen=True)
class Quantity:
    """What is timed: `make` gives a run of it, with its operands; `tf32` whether products of float32 may be in that."""

    key: Key
    make: Callable[[], Run]
    tf32: bool = False


def measure(device: torch.device, say: Say = lambda text: None) -> Machine:
    """The constants of a device, by products and passes of a few sizes. Raises Disturbed where they are not its own."""
    taken = timed(quantities(device), device, say)
    machine = machine_of({key: min(seconds) for key, seconds in taken.items()}, device)
    key, found = max(((key, spread(seconds)) for key, seconds in taken.items()), key=lambda pair: pair[1])
    if found > SETTLED:
        what = " ".join(key)
        raise Disturbed(f"most runs of one thing ({what}) took more than {found:.1f} times what the quickest took")
    if doubt := implausible(machine):
        raise Disturbed(f"no device is like that, {doubt}")
    return machine


def quantities(device: torch.device) -> list[Quantity]:
    """Of memory; and of each dtype a large product, what small ones take, and narrow ones, in all the ways that an
    adapter multiplies."""
    n = STORED[device.type]
    found = [
        Quantity(("memory",), partial(_pass, device)),
        Quantity(("kernels",), partial(_kernels, device)),
        Quantity(("stores",), partial(_product, device, torch.float32, n, 8, n)),
    ]
    for name, dtype in DTYPES.items():
        found.append(Quantity((name, "large"), partial(_large, device, dtype)))
        found.append(Quantity((name, "small"), partial(_small, device, dtype)))
        for way, r in itertools.product(WAYS, RANKS):
            found.append(Quantity((name, way, str(r)), partial(_narrow, device, dtype, way, r)))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        found.append(Quantity(("float32", "TF32"), partial(_large, device, torch.float32), tf32=True))
    return found


def timed(quantities: Sequence[Quantity], device: torch.device, say: Say) -> dict[Key, list[float]]:
    """Seconds of each in every round. What disturbs the machine for a while disturbs a round of all, not all of one."""
    taken: dict[Key, list[float]] = {q.key: [] for q in quantities}
    for i in range(MOST):
        for q in quantities:
            if len(q.key) < 2 or q.key[1] == "large":
                say(f"{q.key[0]}, round {i + 1}")
            with _products_in(q.tf32):
                taken[q.key].append(seconds(q.make(), device))
        if i + 1 >= ROUNDS and max(map(spread, taken.values())) <= SETTLED:
            break
    return taken


def spread(taken: Sequence[float]) -> float:
    """How much longer than the quickest run the quickest quarter of all took: 1 where a best is no luck."""
    ordered = sorted(taken)
    return ordered[max(1, len(ordered) // 4)] / max(ordered[0], 1e-12) if len(ordered) > 1 else 1.0


def machine_of(best: Mapping[Key, float], device: torch.device) -> Machine:
    """The constants, by the least seconds of each quantity."""
    n, pass_, launch = STORED[device.type], PASS[device.type], best["kernels",] / KERNELS
    bandwidth, stores = 3 * 4 * pass_ / best["memory",], 4 * (n * n + 2 * n * 8) / best["stores",]
    speeds = tuple((dtype, _speed(best, name, device, launch)) for name, dtype in DTYPES.items())
    tf32 = _rate(best["float32", "TF32"], device) if ("float32", "TF32") in best else 0.0
    name, mixed = f"calibrated {machines.described(device)}", device.type == "cuda"
    return Machine(name, speeds, _three(bandwidth), _three(launch), _three(stores), tf32, mixed)


def _speed(best: Mapping[Key, float], name: str, device: torch.device, launch: float) -> Speed:
    """The peak by a large product; what a small one takes beyond its FLOPs; and what narrow ones do, the median over
    ranks and over the ways that an adapter multiplies."""
    peak = _rate(best[name, "large"], device)
    small = best[name, "small"] / len(SMALL)
    start = max(0.0, small - launch - statistics.mean(2 * m * k * n for m, k, n in SMALL) / peak)
    T, K = WIDE[device.type]
    inner: list[float] = []
    outer: list[float] = []
    for way, r in itertools.product(WAYS, RANKS):
        longer = (best[name, way, str(r)] - start - launch) * peak / (2 * T * K) - r
        (inner if way == "gAᵀ" else outer).append(longer)
    return Speed(peak, *(_three(max(0.0, n)) for n in (start, statistics.median(inner), statistics.median(outer))))


def _rate(taken: float, device: torch.device) -> float:
    return _three(2 * LARGE[device.type] ** 3 / taken)


def _large(device: torch.device, dtype: torch.dtype) -> Run:
    n = LARGE[device.type]
    return _product(device, dtype, n, n, n)


def _small(device: torch.device, dtype: torch.dtype) -> Run:
    return _in_turn([_product(device, dtype, *sizes) for sizes in SMALL])


WAYS: Mapping[str, Callable[..., torch.Tensor]] = {
    "gAᵀ": lambda x, A, g: g @ A.T,
    "xA": lambda x, A, g: x @ A,
    "xᵀg": lambda x, A, g: x.T @ g,
    "gᵀx": lambda x, A, g: g.T @ x,
}


def _narrow(device: torch.device, dtype: torch.dtype, way: str, r: int) -> Run:
    T, K = WIDE[device.type]
    return partial(WAYS[way], *(_random(device, dtype, *sizes) for sizes in ((T, K), (K, r), (T, r))))


def _product(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> Run:
    a, b, out = (_random(device, dtype, *sizes) for sizes in ((m, k), (k, n), (m, n)))
    return lambda: torch.mm(a, b, out=out)


def _random(device: torch.device, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, device=device).to(dtype)


def _pass(device: torch.device) -> Run:
    """Adding two large vectors into a third."""
    a, b, out = (torch.ones(PASS[device.type], device=device) for _ in range(3))
    return lambda: torch.add(a, b, out=out)


def _kernels(device: torch.device) -> Run:
    """Products too small to take any time, each result a new tensor as in generated code."""
    a, b = (_random(device, torch.float32, 16, 16) for _ in range(2))

    def one() -> None:
        torch.mm(a, b, out=torch.empty_strided((16, 16), (16, 1), device=device))

    return _in_turn(KERNELS * [one])


def _in_turn(runs: Sequence[Run]) -> Run:
    """All of them, one after another: what one left in the caches is of no use to the next."""

    def run() -> None:
        for one in runs:
            one()

    return run


def seconds(run: Run, device: torch.device) -> float:
    """The fastest of one run or more, in so much time, a GPU's work waited for; one before them is not timed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    clock = clock_of(device)
    run()
    wait()
    best, runs, end = float("inf"), 0, time.perf_counter() + SECONDS
    while runs < 1 or time.perf_counter() < end:
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
