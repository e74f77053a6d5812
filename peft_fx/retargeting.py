"""A graph that was traced on a CPU, as a GPU would be given it: there need be no GPU and no driver.

Without a driver no model can be traced on fake CUDA tensors; its joint graph can be told that it is on one afterwards.
What then differs from the graph of a model on that GPU is what PyTorch chooses by device while it traces: attention,
which is exchanged here. Everything else that goes by device is asked of the graph while it is `there`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from peft_fx import compat, machines
from peft_fx.compat import pytree
from peft_fx.inductor_passes import AdapterPass
from peft_fx.options import Options
from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import COPIES, argument, aten, shape, tensor_arg, value
from peft_fx.records import Record
from peft_fx.tracing import CPU

GPU = torch.device("cuda", 0)
DEVICES = ("cpu", "cuda")
HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256  # of the flash kernel


def device_of(options: Options, asked: str | torch.device | None, traced: torch.device) -> torch.device:
    """The device whose graph is told of: where the model is, unless that is a CPU; else the one asked for, else that of
    the machine named. ValueError for a device that cannot be had."""
    if asked is None:
        if traced.type != "cpu" or options.machine == "auto":
            return traced
        return traced if machines.resolve(options.machine, traced).is_cpu else GPU
    wanted = str(asked).partition(":")[0]
    if wanted not in DEVICES:
        raise ValueError(f"device cannot be {str(asked)!r}; valid ones: {', '.join(map(repr, DEVICES))}")
    if traced.type == "cpu":
        return CPU if wanted == "cpu" else GPU
    if traced.type != wanted:
        raise ValueError(
            f"device cannot be {str(asked)!r} where the model is on {traced}: only a model on the CPU or the meta "
            "device can be told of as if it were on another; move it there first, or leave device out"
        )
    return traced


@dataclass(frozen=True)
class Retarget:
    """The way of graphs that were traced on `traced` to `device` and back; no way at all where these are one."""

    traced: torch.device
    device: torch.device

    def exchange(self, graph: Graph, fake_mode: compat.FakeTensorMode) -> None:
        """Puts the attention that the device has in the place of the one that the trace took. The values stay on the
        device of the trace."""
        if self.traced.type == "cpu" and self.device.type == "cuda":
            _exchanged(graph, fake_mode)

    @contextlib.contextmanager
    def there(self, *graphs: Graph) -> Iterator[None]:
        """Inside the block all values of the graphs, and what makes them, are on the device; after it those that came,
        and those made meanwhile, are where they were."""
        if self.traced == self.device:
            yield
            return
        known = [t for graph in graphs for t in _values(graph) if t.fake_device == self.traced]
        for graph in graphs:
            _move(graph, self.traced, self.device)
        try:
            yield
        finally:
            for graph in graphs:
                _move(graph, self.device, self.traced)
            for tensor in known:
                tensor.fake_device = self.traced


class Home(compat.CustomGraphPass):  # type: ignore[misc]
    """Ends being there early, from inside Inductor's passes: some of those compute on fake values in ways that ask for
    the device."""

    def __init__(self, retarget: Retarget):
        self.retarget = retarget

    def __call__(self, graph: Graph) -> None:
        _move(graph, self.retarget.device, self.retarget.traced)

    def uuid(self) -> Any:
        return None


class RetargetedPass(AdapterPass):
    """The backend's pass on a graph that is told to be on another device."""

    def __init__(self, record: Record, retarget: Retarget):
        super().__init__(record)
        self.retarget = retarget

    def apply(self, graph: Graph) -> list[Outcome]:
        with self.retarget.there(graph):
            return super().apply(graph)


def _graphs(graph: Graph) -> Iterator[Graph]:
    """A graph, and those that it calls."""
    yield graph
    for node in graph.find_nodes(op="get_attr"):
        called = getattr(graph.owning_module, str(node.target), None)
        if isinstance(called, GraphModule):
            yield from _graphs(called.graph)


def _values(graph: Graph) -> Iterator[compat.FakeTensor]:
    for one in _graphs(graph):
        for node in one.nodes:
            for val in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(val, compat.FakeTensor):
                    yield val


def _move(graph: Graph, old: torch.device, new: torch.device) -> None:
    for val in _values(graph):
        if val.fake_device == old:
            val.fake_device = new

    def moved(arg: Any) -> Any:
        return new if isinstance(arg, torch.device) and arg.type == old.type else arg

    for one in _graphs(graph):
        for node in one.nodes:
            if any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values())):
                node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)


# -------------------------------------------------------------------------------------------------------- attention


CPU_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
CPU_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FLASH = aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default
LOGSUMEXP = 1  # its place among the results of each


def _exchanged(graph: Graph, fake_mode: compat.FakeTensorMode) -> None:
    """Attention's kernels as a GPU has them: the flash kernel in half precision without a mask, else the one that is
    efficient in memory. Where there is none, as in float64, the CPU's stays."""
    edit = Editor(graph, fake_mode)
    for node in graph.find_nodes(op="call_function", target=CPU_FLASH):
        if _takes_flash(node) or _takes_efficient(node):
            with edit.at(node):
                _replace(edit, node, _attention(edit, node))
    for node in graph.find_nodes(op="call_function", target=CPU_FLASH_BACKWARD):
        forward = _maker(argument(node, "logsumexp"))
        if forward.target in (FLASH, EFFICIENT):
            random = _random_state(edit, forward)
            with edit.at(node):
                _replace(edit, node, _attention_backward(edit, node, forward, random))


def _takes_flash(node: Node) -> bool:
    q = value(argument(node, "query"))
    return bool(argument(node, "attn_mask") is None and q.dtype in HALF and q.shape[-1] <= WIDEST_HEAD)


def _takes_efficient(node: Node) -> bool:
    """Not of queries that share keys."""
    q, k = (value(argument(node, name)) for name in ("query", "key"))
    return bool(q.dtype != torch.float64 and q.shape[1] == k.shape[1])


def _attention(edit: Editor, node: Node) -> Node:
    """The forward kernel; the CPU's two results are the first two of its own."""
    q, k, v, mask = (argument(node, name) for name in ("query", "key", "value", "attn_mask"))
    dropout, causal, scale = (argument(node, name) for name in ("dropout_p", "is_causal", "scale"))
    if _takes_flash(node):
        return edit.call(FLASH, q, k, v, dropout, causal, scale=scale)
    in_backward = any(item.args[1] == LOGSUMEXP and item.users for item in node.users)
    bias = None if mask is None else _for_each_row(edit, mask, q, k)
    return edit.call(EFFICIENT, q, k, v, bias, in_backward, dropout, causal, scale=scale)


def _for_each_row(edit: Editor, mask: Node, q: Node, k: Node) -> Node:
    """A mask [batch, heads, T, others]: without memory of its own where it was smaller."""
    wanted = (*shape(q)[:3], shape(k)[2])
    if shape(mask) == wanted:
        return mask
    return edit.call(aten.expand.default, mask, [*edit.sizes_of(q)[:3], edit.sizes_of(k)[2]])


def _random_state(edit: Editor, forward: Node) -> list[Node]:
    """Seed and offset of a forward kernel's dropout, which its backward asks for with dropout or without."""
    first = 6 if forward.target is FLASH else 2
    with edit.at(forward, after=True):
        return [edit.item(forward, first + i) for i in range(2)]


def _attention_backward(edit: Editor, node: Node, forward: Node, random: list[Node]) -> Node:
    """The backward of such a forward kernel; the first results are the gradients of q, k and v, as of the CPU's."""
    names = ("grad_out", "query", "key", "value", "out", "logsumexp")
    dy, q, k, v, out, lse = (argument(node, name) for name in names)
    dropout, causal, scale = (argument(node, name) for name in ("dropout_p", "is_causal", "scale"))
    if forward.target is FLASH:
        lengths = [edit.sizes_of(n)[2] for n in (q, k)]
        no_sequences = (None, None)  # of several in one row
        args = (dy, q, k, v, out, lse, *no_sequences, *lengths, dropout, causal, *random)
        return edit.call(FLASH_BACKWARD, *args, scale=scale)
    wanted = [True, True, True, False]  # no gradient of the mask
    args = (dy, q, k, v, argument(forward, "attn_bias"), out, lse, *random, dropout, wanted, causal)
    return edit.call(EFFICIENT_BACKWARD, *args, scale=scale)


def _replace(edit: Editor, old: Node, new: Node) -> None:
    """Each result of one kernel in the place of the other's, in the layout that its readers know."""
    for item in list(old.users):
        result = edit.call(operator.getitem, new, item.args[1])
        if shape(result) == shape(item) and value(item).ndim == 4:  # no logsumexp
            result = edit.laid_out(result, value(item).stride())
        edit.reroute(item, result)
        edit.erase(item)
    edit.erase(old)


def _maker(item: Node) -> Node:
    """The kernel that a result is one of."""
    while item.target is not operator.getitem and item.target in COPIES:
        item = tensor_arg(item, 0)
    return item.all_input_nodes[0]
