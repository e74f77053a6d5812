"""Bytes and seconds of a training step, measured alike for every variant: for the demo and the benchmarks.

Bytes are those that torch's own allocator hands out: exact, and blind to what a library takes from elsewhere.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from peft_fx import compat

Step = Callable[[], object]


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before the step: `kept` from forward for backward, `peak` of the whole step."""

    kept: int
    peak: int


def memory_of(forward: Callable[[], torch.Tensor], clear: Step, device: torch.device) -> Memory:
    """What one step allocates. `forward` returns the loss, `clear` drops the gradients: a step makes them anew.

    One step runs before the measured ones: a first call compiles, and fills caches.
    """

    def step() -> None:
        forward().backward()  # type: ignore[no-untyped-call]
        clear()

    step()
    allocated = _allocated_on_cuda if device.type == "cuda" else _allocated_on_cpu
    kept, _ = allocated(forward)
    _, peak = allocated(step)
    return Memory(kept, peak)


def _allocated_on_cpu(run: Step) -> tuple[int, int]:
    """Bytes alive at the end of a run while its result is held, and at its peak, by the allocator's own events."""
    gc.collect()  # what an earlier run left would be freed inside this one, and counted below zero
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce on stderr that it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    alive = peak = 0
    for size in _allocations(recorded):
        alive += size
        peak = max(peak, alive)
    del result
    return alive, peak


def _allocations(recorded: Any) -> list[int]:
    """Bytes of every allocation (above zero) and release (below) on the CPU, in order of time.

    No public name lists them.
    """
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == torch.autograd.DeviceType.CPU]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def _allocated_on_cuda(run: Step) -> tuple[int, int]:
    """The same on the current CUDA device."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    alive, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    del result
    return alive, peak


def kept_tensors(loss: torch.Tensor, model: torch.nn.Module) -> list[dict[str, Any]]:
    """What a loss keeps for backward, read off the autograd graph: one entry for each dtype and shape, with how many
    such tensors there are, and their bytes in all; the largest first.

    Parameters and buffers are left out, and so is a second view of the same storage. A few bytes in `Memory.kept` are
    not here: a loss function's own, say.
    """
    seen = {compat.place_of(t) for t in (*model.parameters(), *model.buffers())}
    sizes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for tensor in _saved(loss):
        place, size = compat.place_of(tensor), compat.storage_of(tensor).nbytes()
        if place not in seen and size:
            seen.add(place)
            key = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            sizes.setdefault(key, []).append(size)
    found = [{"dtype": d, "shape": shape, "count": len(n), "bytes": sum(n)} for (d, shape), n in sizes.items()]
    return sorted(found, key=lambda entry: entry["bytes"], reverse=True)


def _saved(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """Every tensor that a node of the autograd graph below the loss has saved."""
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        yield from (value for value in _values(node) if isinstance(value, torch.Tensor))


def _values(node: Any) -> Iterator[Any]:
    """What one node holds: C++ nodes have an attribute for each, Python's and AOTAutograd's a list or two."""
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            yield from value if isinstance(value, (list, tuple)) else (value,)
    yield from compat.saved_by(node)


def times_in_turn(
    steps: Mapping[str, Step], device: torch.device, rounds: int = 9, after_round: Step = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each step in each round. The steps take turns, so that a machine that slows down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, device))
        after_round()
    return times


def median_times(
    steps: Mapping[str, Step], device: torch.device, rounds: int = 9, after_round: Step = lambda: None
) -> dict[str, float]:
    """Median seconds of each step, the steps taking turns."""
    return {name: statistics.median(taken) for name, taken in times_in_turn(steps, device, rounds, after_round).items()}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Half of the values are between these."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]


def _seconds(step: Step, device: torch.device) -> float:
    """Seconds of one step, a GPU's work waited for."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def clock_of(device: torch.device) -> Callable[[], float]:
    """What to time a device's work with. Of one thread, the seconds that it ran: not those in which another process
    had the core."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
