"""Which tensors a loss keeps for backward: read off the autograd graph, grouped by dtype and shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch


def tensors_of(loss: torch.Tensor, model: torch.nn.Module) -> list[dict[str, Any]]:
    """One entry for each dtype and shape: how many such tensors are kept, and their bytes in all.

    Parameters and buffers are left out, and so is a second view of the same storage. A few bytes in `Memory.kept` are
    not here: a loss function's own, say.
    """
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for tensor in _saved(loss):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or not storage.nbytes():
            continue
        seen.add(storage.data_ptr())
        key = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        counts[key] += 1
        sizes[key] += storage.nbytes()
    return [
        {"dtype": dtype, "shape": shape, "count": counts[dtype, shape], "bytes": size}
        for (dtype, shape), size in sizes.most_common()
    ]


def _saved(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """Every tensor that a node of the autograd graph below the loss has saved."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for value in _values(node):
            if isinstance(value, torch.Tensor):
                yield value


def _values(node: Any) -> Iterator[Any]:
    """What one node holds: C++ nodes have an attribute for each, Python's and AOTAutograd's a list or two."""
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            yield from value if isinstance(value, (list, tuple)) else (value,)
    yield from getattr(node, "saved_tensors", ())
    yield from getattr(node, "_tensors_no_vc_check", None) or ()


def masks(tensors: list[dict[str, Any]], width: int) -> int:
    """Elements of the bool tensors [..., width] among kept tensors: where a ReLU of that width keeps its sign alone."""
    found = [t for t in tensors if t["dtype"] == "bool" and t["shape"] and t["shape"][-1] == width]
    return sum(t["bytes"] for t in found)
