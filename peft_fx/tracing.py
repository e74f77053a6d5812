"""Tracing a call without its numbers: a model's ghost on fake tensors, called through a backend that computes
nothing."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from peft_fx import compat
from peft_fx.compat import pytree
from peft_fx.copying import Copies
from peft_fx.frames import with_room
from peft_fx.passes.graph.nodes import expr

CPU = torch.device("cpu")
# where a graph is only looked at, no cache answers in the place of our passes, and nothing is timed on a device
IDLE: dict[str, Any] = {"fx_graph_cache": False, "shape_padding": False}


def new_fake_mode() -> compat.FakeTensorMode:
    return compat.FakeTensorMode(allow_non_fake_inputs=True, shape_env=compat.ShapeEnv())


@contextlib.contextmanager
def telling_of_a_batch(caller: str, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Where a call fails that was given a batch as one argument, TypeError with what to write."""
    try:
        yield
    except Exception as error:
        if not _is_a_batch(model, args, kwargs):
            raise
        raise TypeError(
            f"{caller}() failed with the {type(args[0]).__name__} as one argument, which the model takes by its keys: "
            f"write {caller}(model, **batch)"
        ) from error


def _is_a_batch(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the only argument is a dictionary that the model could be called with as keywords."""
    if len(args) != 1 or not isinstance(args[0], Mapping) or not all(isinstance(key, str) for key in args[0]):
        return False
    try:
        inspect.signature(getattr(model, "forward", model)).bind(**args[0], **kwargs)
    except (TypeError, ValueError):  # it does not take these, or says of itself nothing
        return False
    return bool(args[0])


@contextlib.contextmanager
def nothing_changed() -> Iterator[None]:
    """The random state as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


class Ghosts(Copies):
    """Copies on fake tensors: no memory, nothing of the original touched. `caller` is what errors name."""

    def __init__(self, fake_mode: compat.FakeTensorMode, caller: str):
        super().__init__()
        self.fake_mode, self.caller = fake_mode, caller

    def of(self, model: Any) -> Any:
        """What stands for a model, or for another callable."""
        if isinstance(model, torch.nn.Module) and compat.is_sharded(model):
            raise TypeError(
                f"{self.caller}() cannot trace a model whose parameters FSDP has sharded: ask before fully_shard, or "
                "explain(model) after a step, which tells what was compiled"
            )
        return self(model)

    def all_of(self, x: torch.Tensor) -> torch.Tensor:
        """On the CPU for the meta device: that is where a model without weights is taken to be."""
        numbers = x.untyped_storage().nbytes() // x.dtype.itemsize
        with self.fake_mode, torch.no_grad():
            return torch.empty(numbers, dtype=x.dtype, device="cpu" if x.is_meta else x.device)

    def special(self, x: torch.Tensor) -> torch.Tensor:
        """Another object with the same memory, for a class that says with attributes what its numbers mean, as
        quantised weights do: Dynamo reads those. Traced on fake tensors, nothing is written to it."""
        if isinstance(x, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
            return copy.deepcopy(x)
        if isinstance(x, compat.FakeTensor) or type(x) is torch.Tensor or compat.is_traceable_wrapper_subclass(x):
            return x
        alias = compat.same_memory(x)
        alias.__dict__.update(x.__dict__)
        return alias


@contextlib.contextmanager
def by_nothing_but(backend: Any) -> Iterator[None]:
    """What is called inside the block is compiled by this backend, or by none (None), whatever a model, its modules or
    the functions that it calls were compiled with before, and whatever the stance: they are compiled anew."""
    limits = compat.dynamo_config.patch(recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30)
    stance = "force_eager" if backend is None else "default"
    with limits, torch.compiler.set_stance(stance, force_backend=backend), compat.without_compiled_autograd():
        yield


def device_traced(model: Any, args: Any, kwargs: Any) -> torch.device:
    """Where the ghosts of a call are: where the model's first parameter is, or the first input; on the CPU where that
    has no memory."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    given = (*parameters, *pytree.tree_leaves((args, kwargs)))
    device = next((t.device for t in given if isinstance(t, torch.Tensor)), CPU)
    return CPU if device.type == "meta" else device


def compiled_call(backend: Any, dynamic: bool | None = None) -> Callable[..., Any]:
    """What calls a model with arguments and keywords, compiled by a backend in code of its own: the model's own code
    gets no compiled version of it."""
    call = FunctionType(_call.__code__.replace(), globals())
    compiled: Callable[..., Any] = torch.compile(call, backend=backend, dynamic=dynamic)
    return compiled


@with_room
def call_compiled(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    backend: Any,
    caller: str,
    dynamic: bool | None = None,
) -> Any:
    """The output of a call compiled by a backend, and by no other. A failure of the backend is a RuntimeError of the
    `caller`'s."""
    with by_nothing_but(backend):
        try:
            return compiled_call(backend, dynamic)(model, args, kwargs)
        except compat.BackendCompilerFailed as error:
            why = error.inner_exception
            raise RuntimeError(f"{caller}() failed on a graph of this call: {type(why).__name__}: {why}") from why


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
