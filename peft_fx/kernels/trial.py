"""Whether the kernels work on a device: each is run there once, on small tensors, beside what it is to compute.

A compile asks, with fake tensors, modes of its own and perhaps a CUDA graph around it. So the trial runs in a thread of
its own, which has none of the caller's modes, draws no random number and keeps no memory. What a kernel is to compute
is computed on the CPU, where no setting makes float32 products coarser. A kernel that breaks the process's CUDA
context, by an illegal address, breaks it for the model too: that no trial within a process can mend.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peft_fx.kernels.library import KERNELS
from peft_fx.kernels.merge import WIDER, merge
from peft_fx.kernels.narrow import DTYPE, narrow_both, narrow_in, narrow_out

log = logging.getLogger("peft_fx")
CLOSE = 2.0**-14  # of the norm: sums in fp32 err by less, and factors in half precision, or in TF32, by far more
CLOSE_IN_FP64 = 2.0**-40  # as much, of sums in fp64
Case = tuple[Any, tuple[Any, ...], float]  # op, arguments, and what its results may err by at most

_answers: dict[torch.device, bool] = {}
_lock = threading.Lock()


def exists(device: torch.device) -> bool:
    """Whether there is such a device, which graphs may be told of without: not with a PyTorch that has no CUDA."""
    return bool(device.type == "cuda" and torch.backends.cuda.is_built() and torch.cuda.is_available())


def works(device: torch.device) -> bool:
    """Whether each kernel computes what its decomposition does, found once in a process for each device: seconds, where
    Triton compiles them for the first time. Where not, one warning says why. True of a device that does not exist, for
    nothing runs there; False, and asked again, while a CUDA graph is captured."""
    if not exists(device):
        return True
    with _lock:
        if device not in _answers:
            if torch.cuda.is_current_stream_capturing():
                return False
            why = failure(device)
            _answers[device] = not why
            if why:
                text = f"peft_fx's own kernels do not work on {device}, and graphs go without: {why}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                log.warning(text)
    return _answers[device]


def failure(device: torch.device) -> str:
    """What goes wrong in the trial on a device, in words, or nothing."""
    found = ["the trial did not end"]

    def run() -> None:
        try:
            with torch.no_grad():
                found[0] = next((told for case in cases() if (told := _wrong(case, device))), "")
        except BaseException as error:
            log.debug("a kernel failed in its trial", exc_info=error)
            found[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=run, name="peft_fx-trial")
    thread.start()
    thread.join()
    return found[0]


def _wrong(case: Case, device: torch.device) -> str:
    op, arguments, allowed = case
    decomposition, launch = KERNELS[op]
    want = decomposition(*arguments)
    got = launch(*(_on(device, a) for a in arguments))
    pairs = zip(got, want, strict=True) if isinstance(want, list) else [(got, want)]
    for one, other in pairs:
        one, other = one.cpu().double(), other.double()
        if not bool((one - other).norm() <= allowed):  # nor where it is NaN
            return f"{op} gives wrong numbers"
    return ""


def _on(device: torch.device, argument: Any) -> Any:
    """A list of tensors on a device, strides and all."""
    if not isinstance(argument[0], Tensor):
        return argument
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t) for t in argument]


def cases() -> Iterator[Case]:
    """Ragged sizes, either order of strides, several of everything; integers, which must be exact, and fractions; few
    tokens, and so many that they are split."""
    for dtype, wide in WIDER.items():
        W, V = _integers(70, 50, dtype), _integers(140, 33, dtype).t()
        L, R = [_integers(70, 4), _integers(33, 3, dtype), _integers(33, 20)], [_integers(4, 50)]
        yield merge, ([W, V], L, [*R, _integers(3, 140), _integers(140, 20).t()], [2.0, 1.0, -0.5], [1, 2]), 0.0
        left, right = _fractions(70, 16), _fractions(16, 130)
        delta = left.double() @ right.double() / 3
        near = CLOSE_IN_FP64 if wide == torch.float64 else CLOSE
        # W' is what W, the delta rounded, lacks: as precise as the kernel's own delta
        yield merge, ([-delta.to(dtype)], [left], [right], [1 / 3], [1]), near * float(delta.norm())
    for T in (40, 600):
        for make, allowed in ((_integers, 0.0), (_fractions, CLOSE)):
            us = [make(T, 72).to(DTYPE), make(50, T).to(DTYPE).t()]
            factors, scales, counts = [make(72, 4), make(16, 72).t(), make(50, 3)], [1.0, 2.0, -0.5], [2, 1]
            size = allowed * math.sqrt(T)
            yield narrow_out, (us, factors, counts, scales), size
            zs = [make(T, 4), make(16, T).t(), make(T, 3)]
            into = zs, counts, scales, [False, True, False]
            yield narrow_in, (us, *into), size
            yield narrow_both, (us, factors, counts, scales, *into), size


def _integers(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    return (numbers * 7919 % 61 % 5 - 2).reshape(rows, columns).to(dtype)


def _fractions(rows: int, columns: int) -> Tensor:
    """Of 16 bits, between -1/2 and 1/2."""
    numbers = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    return (numbers * 40503 % 65521).reshape(rows, columns).float() / 65521 - 0.5
