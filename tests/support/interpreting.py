"""Our kernels by Triton's interpreter: `python -m tests.support.interpreting`, with TRITON_INTERPRET=1, reads calls as
JSON, [{"op", "given"}, …], and writes whether each gives the bits of its decomposition, on integers whose sums are
exact.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from peft_fx.kernels import merge, narrow  # noqa: F401 - their ops
from peft_fx.kernels.library import KERNELS


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    by_name = {op.name(): kernel for op, kernel in KERNELS.items()}
    answers.write(json.dumps([same(*by_name[call["op"]], call["given"]) for call in json.load(sys.stdin)]))
    answers.close()
    return 0


def same(decomposition: Any, launch: Any, given: Any) -> bool:
    given = made(given)
    pairs = zip(launch(*given), decomposition(*given), strict=True)
    return all(torch.equal(got, want) and got.dtype == want.dtype for got, want in pairs)


def made(told: Any) -> Any:
    """Integers from -2 to 2 for a tensor, in its layout; anything else as it is."""
    if isinstance(told, dict):
        t = torch.empty_strided(told["shape"], told["stride"], dtype=getattr(torch, told["dtype"]))
        numbers = torch.arange(t.numel()) * 7919 % 61 % 5 - 2
        return t.copy_(numbers.reshape(t.shape))
    return [made(v) for v in told] if isinstance(told, list) else told


if __name__ == "__main__":
    raise SystemExit(main())
