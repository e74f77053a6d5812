"""Text that comes with Python, as bytes: its documentation, and its source code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

READ = ("argparse", "inspect", "typing", "dataclasses", "ast")


def _text(of: str) -> Tensor:
    """Python's documentation, or source code, as bytes."""
    if of == "documentation":
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = "\n".join(inspect.getsource(importlib.import_module(name)) for name in READ)
    return torch.tensor(list(text.encode()), dtype=torch.long)


@cache
def parts(of: str, length: int) -> tuple[Tensor, Tensor]:
    """Nine tenths to train on, and 64 sequences spread over the last tenth to look at."""
    text = _text(of)
    cut = len(text) * 9 // 10
    starts = torch.linspace(cut, len(text) - length, 64).long()
    return text[:cut], _sequences(text, starts, length)


def _sequences(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length)]


def batches_of(of: str, seed: int, steps: int, size: int, length: int) -> Iterable[Tensor]:
    """Sequences [size, length] from the part to train on."""
    text, _ = parts(of, length)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield _sequences(text, torch.randint(len(text) - length, (size,), generator=generator), length)
