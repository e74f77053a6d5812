"""An op of our own: what it computes in ATen, what its result looks like, and what launches it on a GPU."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("peft_fx", "DEF")
KERNELS: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # of each op: decomposition and launch


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, for NVIDIA's cards."""
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


def available(device: torch.device) -> bool:
    """Whether graphs on a device can use the ops, if they work there (`trial.py`)."""
    return device.type == "cuda" and has_triton()


def define(
    schema: str, decomposition: Callable[..., Any], launch: Callable[..., Any], shape: Callable[..., Any]
) -> Any:
    """The op of a schema such as `f(Tensor x) -> Tensor`: `decomposition` runs on any device, `launch` on CUDA in its
    place, and `shape` gives an empty result of the right sizes, strides and dtype for fake tensors."""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    LIBRARY.impl(name, decomposition, "CompositeExplicitAutograd")
    LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"peft_fx::{name}", shape, lib=LIBRARY)
    op = getattr(torch.ops.peft_fx, name).default
    KERNELS[op] = decomposition, launch
    return op
