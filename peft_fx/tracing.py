"""Tracing a call without its numbers: a model's ghost on fake tensors, called through a backend that computes
nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from peft_fx import compat
from peft_fx.compat import pytree
from peft_fx.passes.nodes import expr

CPU = torch.device("cpu")
# where a graph is only looked at, no cache answers in the place of our passes, and nothing is timed on a device
IDLE: dict[str, Any] = {"fx_graph_cache": False, "shape_padding": False}


def new_fake_mode() -> compat.FakeTensorMode:
    return compat.FakeTensorMode(allow_non_fake_inputs=True, shape_env=compat.ShapeEnv())


@contextlib.contextmanager
def nothing_changed() -> Iterator[None]:
    """The random state as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def ghost_of(model: Any, fake_mode: compat.FakeTensorMode) -> Any:
    """A copy of the model whose parameters and buffers are fake: no memory, nothing of the original touched."""
    if not isinstance(model, torch.nn.Module):
        return model
    if compat.is_sharded(model):
        raise TypeError(
            "explain() cannot trace a model whose parameters FSDP has sharded: ask before fully_shard, or "
            "explain(model) after a step, which tells what was compiled"
        )
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    memo = {}
    for tensor in tensors.values():
        if id(tensor) not in memo:
            memo[id(tensor)] = ghostly(tensor, fake_mode)
    return copy.deepcopy(model, memo)


def device_traced(model: Any, args: Any, kwargs: Any) -> torch.device:
    """Where the ghosts of a call are: where the model's first parameter is, or the first input; on the CPU where that
    has no memory."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    given = (*parameters, *pytree.tree_leaves((args, kwargs)))
    device = next((t.device for t in given if isinstance(t, torch.Tensor)), CPU)
    return CPU if device.type == "meta" else device


def ghostly(x: Any, fake_mode: compat.FakeTensorMode) -> Any:
    """A fake tensor like this one; one on the meta device becomes one on the CPU."""
    if not isinstance(x, torch.Tensor) or isinstance(x, compat.FakeTensor):
        return x
    if type(x) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return _alias(x)
    device = "cpu" if x.is_meta else x.device
    with fake_mode, torch.no_grad():
        fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    if isinstance(x, torch.nn.Parameter):
        return torch.nn.Parameter(fake, requires_grad=x.requires_grad)
    return fake.requires_grad_(x.requires_grad)


def _alias(x: torch.Tensor) -> torch.Tensor:
    """Another object with the same memory, for a class that says with attributes what its numbers mean, as quantised
    weights do: Dynamo reads those. Traced on fake tensors, nothing is written to it."""
    if compat.is_traceable_wrapper_subclass(x):
        return x
    alias = compat.same_memory(x)
    alias.__dict__.update(x.__dict__)
    return alias


def call_compiled(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], backend: Any, dynamic: bool | None = None
) -> Any:
    """The output of a call compiled by a backend, in code of its own: the model's own code gets no compiled version
    of it."""
    call = FunctionType(_call.__code__.replace(), globals())
    with compat.dynamo_config.patch(recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30):
        return torch.compile(call, backend=backend, dynamic=dynamic)(model, args, kwargs)


def _call(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)


def answer(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    answers = [n.meta.get("val") if isinstance(n, Node) else n for n in output.args[0]]
    fixed = all(isinstance(expr(n), int) for a in answers for n in _sizes(a))

    def run(args: list[Any]) -> Any:
        inputs, args[:] = list(args), []
        return list(answers) if fixed else list(gm(*inputs))  # a size of the graph's means nothing outside of it

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _sizes(answer: Any) -> Sequence[Any]:
    """The sizes in one result of a graph: a tensor's, or a number."""
    if isinstance(answer, torch.Tensor):
        return list(answer.shape)
    return [answer] if isinstance(answer, torch.SymInt) else []


def copy_graph(graph: Graph) -> Graph:
    copied = Graph()
    output = copied.graph_copy(graph, {})
    (old,) = (n for n in graph.nodes if n.op == "output")
    copied.output(output).meta.update(old.meta)
    return copied
