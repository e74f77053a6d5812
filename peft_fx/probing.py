"""How fast this CPU is, found in a few milliseconds: what the price reckons with where nothing was calibrated.

CPUs differ in what decides most, by a factor of a hundred: how quickly they multiply bfloat16 beside float32. So do a
CPU and itself, where the process may not use all of it. What a probe finds is rounded to powers of two, since the
constants are part of the keys of compiled code, and stored: the next process on this machine reads it.

It runs in a thread of its own, which has none of the caller's modes: a compile calls it while tensors are fake. One
core's work is measured, by the time that it ran, so that other processes change little, and taken for that of each.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peft_fx.passes.decide.machine import DTYPES, Machine, cpu

Run = Callable[[], object]
ROUNDS = 7
FEW = 3  # times at least
ENOUGH = 0.02  # seconds in all, after a first round that warms up
SMALL, LARGE = 64, 256  # sides of the products: without half precision the small one takes a third of a millisecond
QUICK = 1e-4  # seconds, below which a small product says little of a large one's
PASS = 1 << 20  # elements added in a pass over memory
STORED, RANK = 1024, 8  # sides of a product that does little but store


def probe(name: str) -> Machine:
    """A CPU's constants under a name. Takes some 50 ms, draws no random number and keeps no memory. RuntimeError where
    the CPU lacks something that it runs."""
    found: list[Machine | Exception] = []
    threads = torch.get_num_threads()

    def run() -> None:
        try:
            found.append(_measured(name, threads))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="peft_fx-probe")
    thread.start()
    thread.join()
    (result,) = found
    if isinstance(result, Exception):
        raise RuntimeError(f"the probe of this CPU failed: {result}") from result
    return result


def _measured(name: str, threads: int) -> Machine:
    cores = min(usable_cores(), threads)
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            seconds, sides = _seconds()
    finally:
        torch.set_num_threads(threads)
    rates = [cores * 2 * sides[d] ** 3 / seconds[d] for d in DTYPES]
    bandwidth, stores = 3 * 4 * PASS / seconds["pass"], 4 * STORED * (STORED + 2 * RANK) / seconds["stores"]
    # ratios first: what is chosen hangs on them, and two rates rounded apart would be equal now and then
    single = rounded(rates[2] / 1e12)
    bf16, fp16, fp32, fp64 = (single * rounded(rate / rates[2]) for rate in rates)
    return cpu(name, (bf16, fp16, fp32, fp64), rounded(cores * bandwidth / 1e9), rounded(cores * stores / 1e9))


def rounded(value: float) -> float:
    """To a power of two."""
    return float(2.0 ** round(math.log2(value)))


def _seconds() -> tuple[dict[str, float], dict[str, int]]:
    """The least seconds of each thing measured, all in turn; and the sides of the square products."""
    runs = {name: _product(dtype, SMALL) for name, dtype in DTYPES.items()}
    sides = dict.fromkeys(DTYPES, SMALL)
    for name, dtype in DTYPES.items():
        runs[name]()
        if min(_taken(runs[name]) for _ in range(FEW)) < QUICK:  # else one that was disturbed decides what is measured
            runs[name], sides[name] = _product(dtype, LARGE), LARGE
    a, b, out = (torch.ones(PASS, device="cpu", dtype=torch.float32) for _ in range(3))
    runs["pass"] = functools.partial(torch.add, a, b, out=out)
    runs["stores"] = _product(torch.float32, STORED, RANK)
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, math.inf)
    end = time.thread_time() + ENOUGH
    for i in range(ROUNDS):
        if i >= FEW and time.thread_time() > end:
            break
        for name, run in runs.items():
            best[name] = min(best[name], _taken(run))
    return best, sides


def _taken(run: Run) -> float:
    start = time.thread_time()
    run()
    return max(1e-9, time.thread_time() - start)


def _product(dtype: torch.dtype, side: int, inner: int = 0) -> Run:
    sizes = (side, inner or side), (inner or side, side), (side, side)
    a, b, out = (torch.ones(size, device="cpu", dtype=dtype) for size in sizes)
    return functools.partial(torch.mm, a, b, out=out)


# ------------------------------------------------------------------------------------------- what limits a process


def usable_cores() -> int:
    """Cores that the process may run on: those of its affinity, and no more than its control group's share of time."""
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(known, _quota())))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that a control group of either version gives."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / file).read_text() for file in files).split()
            if float(quota) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return math.inf


SWITCHES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


def limits() -> list[str]:
    """What this process may use less of the CPU for than another, beside its threads: in words, none where nothing."""
    threads, cores = torch.get_num_threads(), usable_cores()
    found = [f"{cores} cores for them"] if cores < threads else []
    found += [f"{name}={os.environ[name]}" for name in SWITCHES if os.environ.get(name)]
    if not torch.backends.mkldnn.enabled:
        found.append("without oneDNN")
    if torch.get_float32_matmul_precision() != "highest":
        found.append(f"float32 products {torch.get_float32_matmul_precision()}")
    return found
